"""What a `Placement` leaves to the device: resize, colours, canvas and mirroring, for all pictures of a batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pixels.colours import recolour
from pixels.geometry import Placement


def finish_pictures(pictures: Sequence[Tensor], placements: Sequence[Placement | None]) -> list[Tensor]:
    """Do on the pictures' device what `render` left out: resize, recolour, place on the canvas, mirror.

    A resize is an operation of every picture; the others are shared as far as they can be.

    Args:
        pictures: float [3, h, w] in 0..1, each ``placement.source_size`` large.
        placements: Where they go; pictures without one are finished.

    Returns:
        float [3, placement.height, placement.width] each.
    """
    finished = list(pictures)
    placed = {i: placement for i, placement in enumerate(placements) if placement is not None}
    for i, placement in placed.items():
        if placement.target_size != placement.source_size:
            size, antialias = placement.target_size, placement.antialias
            finished[i] = nnf.interpolate(finished[i][None], size=size, mode="bilinear", antialias=antialias)[0]
    _recolour(finished, {i: placement for i, placement in placed.items() if placement.colour_ops})
    alike: dict[tuple[int, int, tuple[float, ...], bool], list[int]] = {}
    for i, placement in placed.items():
        if not placement.fills_canvas:
            key = (placement.height, placement.width, placement.fill, placement.flipped)
            alike.setdefault(key, []).append(i)
        elif placement.flipped:
            finished[i] = finished[i].flip(-1)
    for (height, width, fill, flipped), members in alike.items():
        canvases = finished[members[0]].new_empty((len(members), 3, height, width))
        for channel, level in enumerate(fill):  # a tensor of the three levels would have to be waited for
            canvases[:, channel].fill_(level / 255)
        for canvas, i in zip(canvases, members):
            left, top, right, bottom = placed[i].target
            canvas[:, top:bottom, left:right] = finished[i]
        for canvas, i in zip(canvases.flip(-1) if flipped else canvases, members):
            finished[i] = canvas
    return finished


def _recolour(pictures: list[Tensor], placements: dict[int, Placement]) -> None:
    """Replace the pictures that have a placement here by recoloured ones."""
    if not placements:
        return
    sizes = [pictures[i].shape[1] * pictures[i].shape[2] for i in placements]
    planes = torch.cat([pictures[i].flatten(1) for i in placements], dim=1).mul_(255).round_()
    recolour(planes, [placement.colour_ops for placement in placements.values()], sizes)
    for i, part in zip(placements, planes.mul_(1 / 255).split(sizes, dim=1)):
        pictures[i] = part.view(pictures[i].shape)


def finish_masks(masks: Tensor, placement: Placement) -> Tensor:
    """Do for masks, uint8 [N, h, w], what `finish_pictures` does for pixels; nearest neighbour, zeros around."""
    if placement.target_size != placement.source_size and len(masks):
        masks = nnf.interpolate(masks[:, None], size=placement.target_size, mode="nearest")[:, 0]
    elif placement.target_size != placement.source_size:
        masks = masks.new_zeros((0, *placement.target_size))
    if not placement.fills_canvas:
        left, top, right, bottom = placement.target
        masks = nnf.pad(masks, (left, placement.width - right, top, placement.height - bottom))
    return masks.flip(-1) if placement.flipped else masks
