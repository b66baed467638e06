"""The named augmentations: out of ``torchvision.transforms.v2`` wherever it has the operation.

Names, order and parameters are those of torchvision's detection scripts. Pipelines take a `LazyImage`, which its
boxes, keypoints and masks follow.
"""

from torchvision.transforms import v2

from transforms import FixedSizeCrop, RandomIoUCrop

PRESETS = ("hflip", "lsj", "multiscale", "ssd", "ssdlite")

# Presets that choose the training size themselves: the model must not resize again.
RESIZING_PRESETS = ("lsj", "multiscale")

# Presets whose resize, and what follows it, a CUDA device does instead of the workers: all that resize.
DEVICE_PRESETS = ("lsj", "multiscale", "ssd", "ssdlite")

# Mean colour of ImageNet in 0..255, shown around an image that is zoomed out.
MEAN_COLOUR = (123.0, 117.0, 104.0)


def build_transforms(
    preset: str,
    *,
    hflip_prob: float = 0.5,
    min_size: int = 800,
    max_size: int = 1333,
    fixed_size: tuple[int, int] | None = None,
) -> v2.Compose:
    """Build the training pipeline called ``preset``.

    Args:
        preset: One of `PRESETS`.
        hflip_prob: Probability of mirroring; 0 where keypoints have no flip pairs.
        min_size: Short side the model is used at. The sizes of ``multiscale`` (480 to 800) and ``lsj``
            (1024) belong to 800 and scale along with it.
        max_size: Limit of the long side for ``multiscale``.
        fixed_size: (height, width) that the model resizes every image to, if it does. The resize is then the
            last step here, with the model's own interpolation, and the small image travels instead of the large.

    Raises:
        ValueError: Unknown preset.
    """
    steps: list[v2.Transform]
    if preset == "hflip":
        steps = [v2.RandomHorizontalFlip(hflip_prob)]
    elif preset == "lsj":
        side = round(1024 * min_size / 800)
        steps = [
            v2.ScaleJitter((side, side), scale_range=(0.1, 2.0)),
            FixedSizeCrop(side, side),
            v2.RandomHorizontalFlip(hflip_prob),
        ]
    elif preset == "multiscale":
        sizes = [round(size * min_size / 800) for size in range(480, 801, 32)]
        steps = [v2.RandomShortestSize(sizes, max_size=max_size), v2.RandomHorizontalFlip(hflip_prob)]
    elif preset == "ssd":
        steps = [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=list(MEAN_COLOUR)),
            RandomIoUCrop(),
            v2.RandomHorizontalFlip(hflip_prob),
        ]
    elif preset == "ssdlite":
        steps = [RandomIoUCrop(), v2.RandomHorizontalFlip(hflip_prob)]
    else:
        raise ValueError(f"unknown augmentation {preset!r}; expected one of {', '.join(PRESETS)}")
    if fixed_size is not None:
        steps.append(v2.Resize(list(fixed_size), antialias=False))
    return v2.Compose(steps)
