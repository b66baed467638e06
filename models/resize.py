"""By what a model's resize multiplies the sides of a picture, and of which pictures it leaves nothing."""

import numpy as np

from models.architectures import ModelSpec


def resize_scales(
    heights: np.ndarray, widths: np.ndarray, spec: ModelSpec, *, short_side: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return by what width and height of pictures are multiplied, float64 [I] each.

    Args:
        heights: int [I], pixels of each picture.
        widths: int [I].
        spec: Has the sizes that the model resizes to.
        short_side: One of those that training draws from; None for that of evaluation.
    """
    architecture = spec.architecture
    if architecture.fixed_size is not None:
        height, width = architecture.fixed_size
        return width / widths, height / heights
    if short_side is None:
        short_side = short_sides(spec)[-1]
    long_side = spec.max_size or architecture.max_size
    # In float64, as torchvision's _resize_image_and_masks does outside of tracing and scripting.
    scales = np.minimum(short_side / np.minimum(heights, widths), long_side / np.maximum(heights, widths))
    return scales, scales


def short_sides(spec: ModelSpec) -> tuple[int, ...]:
    """Return the short sides that training draws from; evaluation takes the last one."""
    return spec.min_size or (spec.architecture.min_size,)


def leaves_nothing(
    heights: np.ndarray, widths: np.ndarray, spec: ModelSpec, *, short_side: int | None = None
) -> np.ndarray:
    """Return of which pictures the resize leaves no pixel in one direction, bool [I]; arguments as `resize_scales`."""
    of_widths, of_heights = resize_scales(heights, widths, spec, short_side=short_side)
    return np.minimum(widths * of_widths, heights * of_heights) < 1


def describe_vanishing(height: int, width: int) -> str:
    """Say why a picture of which the resize leaves nothing cannot be used."""
    return f"{width} x {height} pixels, the model's resize leaves nothing of it"
