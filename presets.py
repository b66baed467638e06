"""The named augmentations: out of ``torchvision.transforms.v2`` wherever it has the operation.

Names, order and parameters are those of torchvision's detection scripts. Pipelines take a `LazyImage`, which its
boxes, keypoints and masks follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torchvision.transforms import v2

from transforms import FixedSizeCrop, RandomIoUCrop

# Mean colour of ImageNet in 0..255, shown around an image that is zoomed out.
MEAN_COLOUR = (123.0, 117.0, 104.0)


@dataclass(frozen=True)
class Preset:
    """A named augmentation.

    Attributes:
        steps: Returns its transforms from the mirroring step, the short side the model is used at, and the limit of the
            long side.
        resizes: Whether it chooses the training size itself: the model must not resize again.
        on_device: Whether a CUDA device does the resize, and what follows it, instead of the workers.
    """

    steps: Callable[[v2.Transform, int, int], list[v2.Transform]]
    resizes: bool = False
    on_device: bool = True


def _lsj_steps(flip: v2.Transform, min_size: int, max_size: int) -> list[v2.Transform]:
    side = round(1024 * min_size / 800)
    return [v2.ScaleJitter((side, side), scale_range=(0.1, 2.0)), FixedSizeCrop(side, side), flip]


def _multiscale_steps(flip: v2.Transform, min_size: int, max_size: int) -> list[v2.Transform]:
    sizes = [round(size * min_size / 800) for size in range(480, 801, 32)]
    return [v2.RandomShortestSize(sizes, max_size=max_size), flip]


def _ssd_steps(flip: v2.Transform, min_size: int, max_size: int) -> list[v2.Transform]:
    return [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=list(MEAN_COLOUR)), RandomIoUCrop(), flip]


PRESETS = {
    "hflip": Preset(lambda flip, min_size, max_size: [flip], on_device=False),  # nothing to resize
    "lsj": Preset(_lsj_steps, resizes=True),
    "multiscale": Preset(_multiscale_steps, resizes=True),
    "ssd": Preset(_ssd_steps),
    "ssdlite": Preset(lambda flip, min_size, max_size: [RandomIoUCrop(), flip]),
}


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
    if preset not in PRESETS:
        raise ValueError(f"unknown augmentation {preset!r}; expected one of {', '.join(PRESETS)}")
    steps = PRESETS[preset].steps(v2.RandomHorizontalFlip(hflip_prob), min_size, max_size)
    if fixed_size is not None:
        steps.append(v2.Resize(list(fixed_size), antialias=False))
    return v2.Compose(steps)
