"""A picture whose transforms are noted down first and carried out once, at the end.

On a `LazyImage` torchvision's v2 transforms only change its `View`: which part of the source is shown, how
large, where on the canvas, mirrored or not. When the pipeline is through, the source is cropped, resized and
recoloured in one pass, so no pixel is computed that a later crop throws away. Boxes, keypoints and masks
follow from the same `View`, so nothing can drift apart from the pixels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf
from torchvision.transforms.v2.functional import register_kernel

from pixels.geometry import Placement, View

# Pictures that shrink more are resized in the worker: CUDA's antialiasing kernel keeps 2 x shrink + 1 weights in shared
# memory for each of 65 rows, and fails from about 94 on.
MAX_DEVICE_SHRINK = 32

# ITU-R BT.601 luma, the weights of torchvision's and Pillow's grey conversion.
LUMA = (0.2989, 0.587, 0.114)


class LazyImage(tv_tensors.Image):
    """A source image and the `View` that transforms have made of it.

    As a tensor it is empty, so that an operation without a kernel of its own fails instead of working on
    stale pixels.

    Attributes:
        pixels: uint8 [H, W, 3], the source.
        view: What the transforms so far make of it.
        boxes: float32 [N, 4] xyxy in the source.
        is_kept: bool [N], False for boxes that a transform has dropped.
    """

    pixels: np.ndarray
    view: View
    boxes: np.ndarray
    is_kept: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray, boxes: np.ndarray | None = None) -> "LazyImage":
        """Wrap decoded pixels, uint8 [H, W, 3], with the boxes of their objects."""
        boxes = np.zeros((0, 4), dtype=np.float32) if boxes is None else boxes
        return cls._with(pixels, View.of(*pixels.shape[:2]), boxes, np.ones(len(boxes), dtype=bool))

    @classmethod
    def _with(cls, pixels: np.ndarray, view: View, boxes: np.ndarray, is_kept: np.ndarray) -> "LazyImage":
        image = torch.empty((3, 0, 0), dtype=torch.uint8).as_subclass(cls)
        image.pixels, image.view, image.boxes, image.is_kept = pixels, view, boxes, is_kept
        return image

    def viewed_as(self, view: View) -> "LazyImage":
        """Return the same source under another view."""
        return self._with(self.pixels, view, self.boxes, self.is_kept)

    def keeping(self, chosen: np.ndarray) -> "LazyImage":
        """Return the same image, of whose boxes only the ``chosen``, bool [N], are still kept."""
        return self._with(self.pixels, self.view, self.boxes, self.is_kept & chosen)

    def canvas_boxes(self) -> np.ndarray:
        """Return all boxes as the view shows them, float32 [N, 4] xyxy."""
        return self.view.place().move_boxes(self.boxes)


@register_kernel(tvf.get_size, LazyImage)
def _get_size(image: LazyImage) -> list[int]:
    return [image.view.height, image.view.width]


@register_kernel(tvf.get_dimensions, LazyImage)
def _get_dimensions(image: LazyImage) -> list[int]:
    return [3, image.view.height, image.view.width]


@register_kernel(tvf.horizontal_flip, LazyImage)
def _flip(image: LazyImage) -> LazyImage:
    return image.viewed_as(image.view.flip())


@register_kernel(tvf.crop, LazyImage)
def _crop(image: LazyImage, top: int, left: int, height: int, width: int) -> LazyImage:
    return image.viewed_as(image.view.crop(top, left, height, width))


@register_kernel(tvf.resize, LazyImage)
def _resize(
    image: LazyImage, size: list[int], interpolation: Any = None, max_size: Any = None, antialias: Any = True
) -> LazyImage:
    return image.viewed_as(image.view.resize(size[0], size[1], bool(antialias)))


@register_kernel(tvf.pad, LazyImage)
def _pad(image: LazyImage, padding: list[int], fill: Any = None, padding_mode: str = "constant") -> LazyImage:
    left, top, right, bottom = padding
    return image.viewed_as(image.view.pad(left, top, right, bottom, tuple(fill or (0, 0, 0))))


@register_kernel(tvf.adjust_brightness, LazyImage)
def _brightness(image: LazyImage, brightness_factor: float) -> LazyImage:
    return image.viewed_as(image.view.recolour("brightness", float(brightness_factor)))


@register_kernel(tvf.adjust_contrast, LazyImage)
def _contrast(image: LazyImage, contrast_factor: float) -> LazyImage:
    return image.viewed_as(image.view.recolour("contrast", (float(contrast_factor), mean_grey(image.pixels))))


@register_kernel(tvf.adjust_saturation, LazyImage)
def _saturation(image: LazyImage, saturation_factor: float) -> LazyImage:
    return image.viewed_as(image.view.recolour("saturation", float(saturation_factor)))


@register_kernel(tvf.adjust_hue, LazyImage)
def _hue(image: LazyImage, hue_factor: float) -> LazyImage:
    return image.viewed_as(image.view.recolour("hue", float(hue_factor)))


@register_kernel(tvf.permute_channels, LazyImage)
def _permute(image: LazyImage, permutation: list[int]) -> LazyImage:
    return image.viewed_as(image.view.recolour("permute", [int(c) for c in permutation]))


def render(image: LazyImage, placement: Placement, resize: bool = True) -> np.ndarray:
    """Carry out what a `LazyImage` has noted down.

    Args:
        image: The source and its view.
        placement: ``image.view.place()``.
        resize: If False, only the crop is done here; `finish_pixels` does the rest, on any device.

    Returns:
        uint8 [H, W, 3]: the canvas, or without ``resize`` the shown part at the source's resolution.
    """
    x1, y1, x2, y2 = placement.source
    part = image.pixels[y1:y2, x1:x2]
    if not resize:
        return part
    if placement.target_size != placement.source_size:
        part = _resize_pixels(part, placement.target_size, placement.antialias)
    if placement.colour_ops:
        part = _recolour_pixels(part, placement.colour_ops)
    if not placement.fills_canvas:
        canvas = np.empty((placement.height, placement.width, 3), dtype=np.uint8)
        canvas[:] = np.tile(np.array(placement.fill, dtype=np.uint8), (placement.width, 1))  # rows, not pixels
        left, top, right, bottom = placement.target
        canvas[top:bottom, left:right] = part
        part = canvas
    return _mirror(part) if placement.flipped else part


def _mirror(pixels: np.ndarray) -> np.ndarray:
    """Mirror uint8 [H, W, 3] left to right; twenty times faster than numpy, which copies three bytes at a time."""
    return torch.from_numpy(np.require(pixels, requirements="W")).flip(1).numpy()


def _resize_pixels(pixels: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
    """Resize uint8 [H, W, 3] bilinearly; torch's channels-last uint8 kernel is its fastest on a CPU."""
    pixels = np.require(pixels, requirements=("C", "W"))
    source = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # unsqueezed first, it counts as channels-last
    resized = nnf.interpolate(source, size=size, mode="bilinear", antialias=antialias)
    return resized[0].permute(1, 2, 0).numpy()


def finish_pixels(pixels: Tensor, placement: Placement) -> Tensor:
    """Do on ``pixels``' device what `render` left out: resize, recolour, place on the canvas, mirror.

    Args:
        pixels: float [3, h, w] in 0..1, ``placement.source_size`` large.
        placement: Where they go.

    Returns:
        float [3, placement.height, placement.width].
    """
    if placement.target_size != placement.source_size:
        size, antialias = placement.target_size, placement.antialias
        pixels = nnf.interpolate(pixels[None], size=size, mode="bilinear", antialias=antialias)[0]
    if placement.colour_ops:
        pixels = recolour(pixels.mul(255).round_(), placement.colour_ops).mul_(1 / 255)
    if not placement.fills_canvas:
        canvas = pixels.new_empty((3, placement.height, placement.width))
        for plane, level in zip(canvas, placement.fill):  # a tensor of the three levels would have to be waited for
            plane.fill_(level / 255)
        left, top, right, bottom = placement.target
        canvas[:, top:bottom, left:right] = pixels
        pixels = canvas
    return pixels.flip(-1) if placement.flipped else pixels


def finish_masks(masks: Tensor, placement: Placement) -> Tensor:
    """Do for masks, uint8 [N, h, w], what `finish_pixels` does for pixels; nearest neighbour, zeros around."""
    if placement.target_size != placement.source_size and len(masks):
        masks = nnf.interpolate(masks[:, None], size=placement.target_size, mode="nearest")[:, 0]
    elif placement.target_size != placement.source_size:
        masks = masks.new_zeros((0, *placement.target_size))
    if not placement.fills_canvas:
        left, top, right, bottom = placement.target
        masks = nnf.pad(masks, (left, placement.width - right, top, placement.height - bottom))
    return masks.flip(-1) if placement.flipped else masks


def mean_grey(pixels: np.ndarray) -> float:
    """Return the mean grey level of uint8 [H, W, 3], estimated from every fourth pixel of every fourth row."""
    return float(np.floor(pixels[::4, ::4].astype(np.float32) @ np.array(LUMA, dtype=np.float32)).mean())


def _recolour_pixels(pixels: np.ndarray, ops: tuple[tuple[str, Any], ...]) -> np.ndarray:
    """Apply colour changes to uint8 [H, W, 3]."""
    planes = recolour(torch.from_numpy(np.stack([pixels[:, :, c] for c in range(3)]).astype(np.float32)), ops)
    changed = np.empty_like(pixels)
    for c, plane in enumerate(planes.numpy().astype(np.uint8)):
        changed[:, :, c] = plane
    return changed


def recolour(planes: Tensor, ops: tuple[tuple[str, Any], ...]) -> Tensor:
    """Apply colour changes, on any device.

    The same operations as torchvision's ``adjust_*`` on uint8, each cut to whole levels as there.

    Args:
        planes: float [3, H, W], whole levels 0..255; overwritten.
        ops: (name, value) in order, as `View.colour_ops`; the value of a contrast is (factor, `mean_grey` of the
            whole source image), towards which it pulls.

    Returns:
        Of the same shape and range.
    """
    brightness = 1.0
    for name, value in ops:
        if name == "brightness":
            planes.mul_(value).clamp_(max=255).floor_()
            brightness *= value
        elif name == "contrast":
            factor, mean = value
            planes.mul_(factor).add_((1 - factor) * min(mean * brightness, 255)).clamp_(0, 255).floor_()
        elif name == "saturation":
            grey = (planes[0] * LUMA[0] + planes[1] * LUMA[1] + planes[2] * LUMA[2]).floor_()
            planes.mul_(value).add_(grey, alpha=1 - value).clamp_(0, 255).floor_()
        elif name == "hue":
            _shift_hue(planes, value)
            planes.mul_(255.999 / 255).floor_()
        elif name == "permute":
            planes = torch.stack([planes[c] for c in value])
        else:
            raise ValueError(f"unknown colour change {name!r}")
    return planes


def _shift_hue(planes: Tensor, shift: float) -> None:
    """Turn the hue of float [3, H, W] by ``shift`` of a full circle, in place.

    In HSV a colour is f(n) = V - V S max(0, min(k, 4 - k, 1)) with k = (n + 6 H) mod 6 and n = 5, 3, 1 for
    red, green, blue (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative); V S is max - min.
    """
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1e-6)
    # Interpolating by 0 or 1 chooses exactly, several times faster than torch.where.
    is_largest = torch.empty_like(value)
    hue = ((red - green) / divisor).add_(4)
    hue.lerp_(((blue - red) / divisor).add_(2), torch.eq(value, green, out=is_largest))
    hue.lerp_((green - blue) / divisor, torch.eq(value, red, out=is_largest))
    hue.add_(6 * shift)
    for plane, n in zip(planes, (5, 3, 1)):
        k = hue + n
        k.sub_((k / 6).floor_(), alpha=6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, k, chroma, value=-1, out=plane)
