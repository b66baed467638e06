"""A picture whose transforms are noted down first and carried out once, at the end.

On a `LazyImage` torchvision's v2 transforms only change its `View`: which part of the source is shown, how
large, where on the canvas, mirrored or not. When the pipeline is through, the source is cropped, resized and
recoloured in one pass, so no pixel is computed that a later crop throws away. Boxes, keypoints and masks
follow from the same `View`, so nothing can drift apart from the pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf
from torchvision.transforms.v2.functional import register_kernel

from pixels.colours import LUMA, recolour
from pixels.geometry import Placement, View

# Pictures that shrink more are resized in the worker: CUDA's antialiasing kernel keeps 2 x shrink + 1 weights in shared
# memory for each of 65 rows, and fails from about 94 on.
MAX_DEVICE_SHRINK = 32


class LazyImage(tv_tensors.Image):
    """A source image and the `View` that transforms have made of it.

    As a tensor it is empty, and every operation without a kernel in this file raises TypeError instead of working on
    nothing.

    Attributes:
        pixels: uint8 [H, W, 3], the source.
        shown: What the transforms so far make of it (``view`` is a method of tensors).
        boxes: float32 [N, 4] xyxy in the source.
        is_kept: bool [N], False for boxes that a transform has dropped.
    """

    pixels: np.ndarray
    shown: View
    boxes: np.ndarray
    is_kept: np.ndarray

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let attributes of the empty tensor be read, and nothing be computed with it."""
        if func.__name__ not in ("__get__", "__repr__", "__format__", "dim", "size"):
            raise _not_supported(f"torch's {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def of(cls, pixels: np.ndarray, boxes: np.ndarray | None = None) -> "LazyImage":
        """Wrap decoded pixels, uint8 [H, W, 3], with the boxes of their objects."""
        boxes = np.zeros((0, 4), dtype=np.float32) if boxes is None else boxes
        return cls._with(pixels, View.of(*pixels.shape[:2]), boxes, np.ones(len(boxes), dtype=bool))

    @classmethod
    def _with(cls, pixels: np.ndarray, view: View, boxes: np.ndarray, is_kept: np.ndarray) -> "LazyImage":
        image = torch.empty((3, 0, 0), dtype=torch.uint8).as_subclass(cls)
        image.pixels, image.shown, image.boxes, image.is_kept = pixels, view, boxes, is_kept
        return image

    def viewed_as(self, view: View) -> "LazyImage":
        """Return the same source under another view, or the fill colour without objects where that shows nothing."""
        if view.shows_nothing:
            canvas = np.full((view.height, view.width, 3), np.array(view.fill, dtype=np.uint8))
            boxes, is_kept = np.zeros_like(self.boxes), np.zeros_like(self.is_kept)
            return self._with(canvas, View.of(view.height, view.width), boxes, is_kept)
        return self._with(self.pixels, view, self.boxes, self.is_kept)

    def keeping(self, chosen: np.ndarray) -> "LazyImage":
        """Return the same image, of whose boxes only the ``chosen``, bool [N], are still kept."""
        return self._with(self.pixels, self.shown, self.boxes, self.is_kept & chosen)

    def canvas_boxes(self) -> np.ndarray:
        """Return all boxes as the view shows them, float32 [N, 4] xyxy."""
        return self.shown.place().move_boxes(self.boxes)


@register_kernel(tvf.get_size, LazyImage)
def _get_size(image: LazyImage) -> list[int]:
    return [image.shown.height, image.shown.width]


@register_kernel(tvf.get_dimensions, LazyImage)
def _get_dimensions(image: LazyImage) -> list[int]:
    return [3, image.shown.height, image.shown.width]


@register_kernel(tvf.horizontal_flip, LazyImage)
def _flip(image: LazyImage) -> LazyImage:
    return image.viewed_as(image.shown.flip())


@register_kernel(tvf.crop, LazyImage)
def _crop(image: LazyImage, top: int, left: int, height: int, width: int) -> LazyImage:
    return image.viewed_as(image.shown.crop(top, left, height, width))


@register_kernel(tvf.center_crop, LazyImage)
def _center_crop(image: LazyImage, output_size: list[int]) -> LazyImage:
    height, width = output_size if len(output_size) == 2 else (output_size[0], output_size[0])
    top, left = round((image.shown.height - height) / 2), round((image.shown.width - width) / 2)
    return image.viewed_as(image.shown.crop(top, left, height, width))


@register_kernel(tvf.resize, LazyImage)
def _resize(
    image: LazyImage,
    size: list[int] | None,
    interpolation: Any = tvf.InterpolationMode.BILINEAR,
    max_size: int | None = None,
    antialias: Any = True,
) -> LazyImage:
    if getattr(interpolation, "value", interpolation) not in ("bilinear", 2):  # Pillow's number
        raise _not_supported(f"resize with {interpolation}")
    height, width = image.shown.height, image.shown.width
    if size is not None and len(size) == 2:
        return image.viewed_as(image.shown.resize(size[0], size[1], bool(antialias)))
    short, long = min(height, width), max(height, width)
    if size is not None:  # the short side's
        new_short, new_long = size[0], size[0] * long // short
        if max_size is not None and new_long > max_size:
            new_short, new_long = new_short * max_size // new_long, max_size
    else:
        assert max_size is not None
        new_short, new_long = short * max_size // long, max_size
    new_height, new_width = (new_short, new_long) if height <= width else (new_long, new_short)
    return image.viewed_as(image.shown.resize(new_height, new_width, bool(antialias)))


@register_kernel(tvf.resized_crop, LazyImage)
def _resized_crop(
    image: LazyImage, top: int, left: int, height: int, width: int, size: list[int], *options: Any, **named: Any
) -> LazyImage:
    return _resize(_crop(image, top, left, height, width), size, *options, **named)


@register_kernel(tvf.pad, LazyImage)
def _pad(image: LazyImage, padding: int | list[int], fill: Any = None, padding_mode: str = "constant") -> LazyImage:
    if padding_mode != "constant":
        raise _not_supported(f"pad with padding_mode {padding_mode!r}")
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = sides * (4 // len(sides))
    levels = fill if isinstance(fill, (list, tuple)) else [fill or 0]
    return image.viewed_as(image.shown.pad(left, top, right, bottom, tuple(levels) * (3 // len(levels))))


@register_kernel(tvf.adjust_brightness, LazyImage)
def _brightness(image: LazyImage, brightness_factor: float) -> LazyImage:
    return image.viewed_as(image.shown.recolour("brightness", float(brightness_factor)))


@register_kernel(tvf.adjust_contrast, LazyImage)
def _contrast(image: LazyImage, contrast_factor: float) -> LazyImage:
    return image.viewed_as(image.shown.recolour("contrast", (float(contrast_factor), mean_grey(image.pixels))))


@register_kernel(tvf.adjust_saturation, LazyImage)
def _saturation(image: LazyImage, saturation_factor: float) -> LazyImage:
    return image.viewed_as(image.shown.recolour("saturation", float(saturation_factor)))


@register_kernel(tvf.adjust_hue, LazyImage)
def _hue(image: LazyImage, hue_factor: float) -> LazyImage:
    return image.viewed_as(image.shown.recolour("hue", float(hue_factor)))


@register_kernel(tvf.permute_channels, LazyImage)
def _permute(image: LazyImage, permutation: list[int]) -> LazyImage:
    return image.viewed_as(image.shown.recolour("permute", [int(c) for c in permutation]))


@register_kernel(tvf.grayscale_to_rgb, LazyImage)
def _to_rgb(image: LazyImage) -> LazyImage:
    return image  # it has three channels


# Colour operations that look at one pixel at a time: they may come before or after any crop or resize.
_OF_ONE_PIXEL = (tvf.invert, tvf.solarize, tvf.posterize, tvf.adjust_gamma, tvf.rgb_to_grayscale)

# Those that look at a pixel's neighbours or at all pixels: a crop or resize that is only noted down would change them.
_OF_MANY_PIXELS = (
    tvf.autocontrast, tvf.equalize, tvf.adjust_sharpness, tvf.gaussian_blur, tvf.gaussian_noise, tvf.jpeg,
)  # fmt: skip

# What would need more than a `View` to be noted down, and masks and keypoints that follow.
_UNSUPPORTED = (
    tvf.affine, tvf.elastic, tvf.erase, tvf.five_crop, tvf.normalize, tvf.perspective, tvf.rotate, tvf.ten_crop,
    tvf.to_dtype, tvf.vertical_flip,
)  # fmt: skip

_NOTED = (
    "horizontal_flip", "crop", "center_crop", "resize", "resized_crop", "pad", "adjust_brightness", "adjust_contrast",
    "adjust_saturation", "adjust_hue", "permute_channels",
)  # fmt: skip


def _not_supported(what: str) -> TypeError:
    anywhere = ", ".join([*_NOTED, *(f.__name__ for f in _OF_ONE_PIXEL)])
    first = ", ".join(f.__name__ for f in _OF_MANY_PIXELS)
    return TypeError(
        f"{what} does not work on a LazyImage, whose transforms are noted down and carried out at the end; "
        f"use these: {anywhere}; and before any crop, pad or resize: {first}"
    )


def _register_repainting(functional: Callable[..., Tensor], anywhere: bool) -> None:
    """Let a colour operation that cannot be noted down work on the source pixels at once."""

    def kernel(image: LazyImage, *args: Any, **kwargs: Any) -> LazyImage:
        """Carry the operation out; refuse where the canvas is no longer the whole picture."""
        before = replace(image.shown, colour_ops=(), flipped=False)
        if not anywhere and before != View.of(*image.pixels.shape[:2]):
            raise _not_supported(f"{functional.__name__} after a crop, pad or resize")
        pixels = image.pixels
        if image.shown.colour_ops:
            pixels = _recolour_pixels(pixels, image.shown.colour_ops)
        planes = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)
        repainted = functional(planes, *args, **kwargs)
        if repainted.shape != planes.shape or repainted.dtype != torch.uint8:
            raise _not_supported(f"{functional.__name__} to {repainted.dtype} {list(repainted.shape)}")
        source = np.ascontiguousarray(repainted.permute(1, 2, 0).numpy())
        return image._with(source, replace(image.shown, colour_ops=()), image.boxes, image.is_kept)

    register_kernel(functional, LazyImage)(kernel)


def _register_refusal(functional: Callable[..., Tensor]) -> None:
    def kernel(image: LazyImage, *args: Any, **kwargs: Any) -> LazyImage:
        raise _not_supported(functional.__name__)

    register_kernel(functional, LazyImage)(kernel)


for _functional in (*_OF_ONE_PIXEL, *_OF_MANY_PIXELS):
    _register_repainting(_functional, _functional in _OF_ONE_PIXEL)
for _functional in _UNSUPPORTED:
    _register_refusal(_functional)


def render(image: LazyImage, placement: Placement, resize: bool = True) -> np.ndarray:
    """Carry out what a `LazyImage` has noted down.

    Args:
        image: The source and its view.
        placement: ``image.shown.place()``.
        resize: If False, only the crop is done here; `finish.finish_pictures` does the rest, on any device.

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


def mean_grey(pixels: np.ndarray) -> float:
    """Return the mean grey level of uint8 [H, W, 3], estimated from every fourth pixel of every fourth row."""
    return float(np.floor(pixels[::4, ::4].astype(np.float32) @ np.array(LUMA, dtype=np.float32)).mean())


def _recolour_pixels(pixels: np.ndarray, ops: tuple[tuple[str, Any], ...]) -> np.ndarray:
    """Apply colour changes to uint8 [H, W, 3]."""
    planes = torch.from_numpy(np.stack([pixels[:, :, c] for c in range(3)]).astype(np.float32))
    recolour(planes.flatten(1), [ops])
    changed = np.empty_like(pixels)
    for c, plane in enumerate(planes.numpy().astype(np.uint8)):
        changed[:, :, c] = plane
    return changed
