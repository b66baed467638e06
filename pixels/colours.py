"""Colour changes of many pictures at once, on any device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ColourOps = tuple[tuple[str, Any], ...]

# ITU-R BT.601 luma, the weights of torchvision's and Pillow's grey conversion.
LUMA = (0.2989, 0.587, 0.114)

# By what they cost; where pictures need others next, the dear ones wait until more pictures are due for them.
_NAMES = ("brightness", "contrast", "permute", "saturation", "hue")


def recolour(planes: Tensor, ops: Sequence[ColourOps], sizes: Sequence[int] | None = None) -> None:
    """Apply its own colour changes to each of several pictures, in place.

    The same operations as torchvision's ``adjust_*`` on uint8, each cut to whole levels as there. What does not depend
    on a picture's own number is done for all of them at once: whole levels stay as they are when they are cut again.

    Args:
        planes: float [3, P], whole levels 0..255, the pixels of one picture after the other.
        ops: (name, value) in order for each picture, as `View.colour_ops`; the value of a contrast is (factor,
            `mean_grey` of the whole source image), towards which it pulls.
        sizes: Pixels of each picture; None with a single one.
    """
    sizes = [planes.shape[1]] if sizes is None else list(sizes)
    parts = planes.split(sizes, dim=1)
    brightness = [1.0] * len(parts)
    left = [list(ops_of_picture) for ops_of_picture in ops]
    while any(left):
        name = _next_name(left)
        values = {i: waiting.pop(0)[1] for i, waiting in enumerate(left) if waiting and waiting[0][0] == name}
        if name == "brightness":
            for i, value in values.items():
                parts[i].mul_(value)
                brightness[i] *= value
            planes.clamp_(max=255).floor_()
        elif name == "contrast":
            for i, (factor, mean) in values.items():
                parts[i].mul_(factor).add_((1 - factor) * min(mean * brightness[i], 255))
            planes.clamp_(0, 255).floor_()
        elif name == "saturation":
            grey = (planes[0] * LUMA[0] + planes[1] * LUMA[1] + planes[2] * LUMA[2]).floor_().split(sizes)
            for i, value in values.items():
                parts[i].mul_(value).add_(grey[i], alpha=1 - value)
            planes.clamp_(0, 255).floor_()
        elif name == "hue":
            chosen = planes if len(values) == len(parts) else torch.cat([parts[i] for i in values], dim=1)
            chosen_sizes = [sizes[i] for i in values]
            _shift_hue(chosen, list(values.values()), chosen_sizes)
            chosen.mul_(255.999 / 255).floor_()
            if chosen is not planes:
                for i, part in zip(values, chosen.split(chosen_sizes, dim=1)):
                    parts[i].copy_(part)
        elif name == "permute":
            for i, order in values.items():
                parts[i].copy_(torch.stack([parts[i][c] for c in order]))
        else:
            raise ValueError(f"unknown colour change {name!r}")


def _next_name(left: list[list[tuple[str, Any]]]) -> str:
    """Return the change to make next: one that some picture is due for, and the fewest others later."""
    due = dict.fromkeys(waiting[0][0] for waiting in left if waiting)
    later = {name: sum(name in (other for other, _ in waiting[1:]) for waiting in left) for name in due}
    return min(due, key=lambda name: (later[name], _NAMES.index(name) if name in _NAMES else 0))


def _shift_hue(planes: Tensor, shifts: Sequence[float], sizes: Sequence[int]) -> None:
    """Turn the hue of float [3, P] by a part of a full circle for each picture, in place.

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
    for part, shift in zip(hue.split(list(sizes)), shifts):
        part.add_(6 * shift)
    for plane, n in zip(planes, (5, 3, 1)):
        k = hue + n
        k.sub_((k / 6).floor_(), alpha=6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, k, chroma, value=-1, out=plane)
