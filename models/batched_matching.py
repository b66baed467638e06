"""Which object each anchor stands for, for all pictures of a batch at once: torchvision's matchers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher, SSDMatcher

from models.object_block import ObjectBlock

# Pairs of object and anchor that are looked at together: 256 MiB for each of the three float32 tensors that are alive.
# RetinaNet at 800 x 1333 has 200,000 anchors: 16 pictures of 20 objects, or 3 of 100. A picture is never cut in two.
MOST_PAIRS = 2**26


def picture_slices(num_pictures: int, pairs_per_picture: int) -> Iterator[slice]:
    """Yield slices of the pictures of a batch that have at most `MOST_PAIRS` pairs, or are of one picture."""
    step = max(1, MOST_PAIRS // max(1, pairs_per_picture))
    for first in range(0, num_pictures, step):
        yield slice(first, first + step)


def box_iou(boxes: Tensor, anchors: Tensor, is_box: Tensor | None = None) -> Tensor:
    """Return `torchvision.ops.box_iou` of each picture, by the same operations in the same order.

    Args:
        boxes: float32 [B, G, 4], xyxy.
        anchors: float32 [A, 4], or [B, A, 4] where each picture has its own.
        is_box: bool [B, G]: the other boxes are empty places; their IoU is 0, with an anchor without area as well.

    Returns:
        float32 [B, G, A]. At most three tensors of this size are alive at a time: hence the operations in place.
    """
    left, top, right, bottom = boxes[..., None].unbind(2)  # [B, G, 1]
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors.unsqueeze(-3).unbind(-1)  # [1, A] or [B, 1, A]
    areas = (right - left) * (bottom - top)
    if is_box is not None:
        areas = areas.masked_fill(~is_box[..., None], 1.0)
    anchor_areas = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)

    inter = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left)).clamp_(min=0)
    inter.mul_(torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top)).clamp_(min=0))
    union = (areas + anchor_areas).sub_(inter)
    return inter.div_(union)


@torch.no_grad()
def match(objects: ObjectBlock, anchors: Tensor, matcher: Matcher) -> Tensor:
    """Return which object each anchor stands for, as ``matcher`` says picture by picture.

    Empty places come after a picture's objects and have an IoU of 0: the first of equal values wins, so they never win
    over an object.

    Args:
        objects: Boxes in pixels of the resized pictures.
        anchors: float32 [A, 4], or [B, A, 4] where each picture has its own.
        matcher: torchvision's `Matcher` or `SSDMatcher`, with thresholds above 0.

    Returns:
        int64 [B, A]: the place of an object, or ``BELOW_LOW_THRESHOLD`` (-1), or ``BETWEEN_THRESHOLDS`` (-2). All -1
        where a picture has no objects.
    """
    pairs = objects.boxes.shape[1] * anchors.shape[-2]
    parts = []
    for part in picture_slices(len(objects.boxes), pairs):
        of_part = anchors if anchors.dim() == 2 else anchors[part]
        parts.append(_match_pictures(objects.boxes[part], objects.is_object[part], of_part, matcher))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _match_pictures(boxes: Tensor, is_object: Tensor, anchors: Tensor, matcher: Matcher) -> Tensor:
    """Match some pictures: `Matcher.__call__` and `SSDMatcher.__call__` over [B, G, A] instead of [G, A]."""
    iou = box_iou(boxes, anchors, is_object)
    best_iou, best = iou.max(dim=1)  # [B, A]; the first of equal objects
    matches = best.masked_fill(best_iou < matcher.high_threshold, matcher.BETWEEN_THRESHOLDS)
    matches.masked_fill_(best_iou < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD)
    if matcher.allow_low_quality_matches:
        # Every anchor whose IoU is the highest of some object gets its own best object back. An IoU is at most 1: no
        # anchor can be the best of an empty place.
        highest = iou.amax(dim=2, keepdim=True).masked_fill_(~is_object[..., None], 2.0)
        matches = torch.where((iou == highest).any(dim=1), best, matches)
    if isinstance(matcher, SSDMatcher):
        # Each object gets its best anchor, the first of equal ones; the last object where several share it.
        places = torch.arange(boxes.shape[1], device=boxes.device).expand(is_object.shape)
        given = torch.full_like(matches, -1)
        given.scatter_reduce_(1, iou.argmax(dim=2), places.masked_fill(~is_object, -1), "amax")
        matches = torch.where(given >= 0, given, matches)
    return matches


def of_matched(values: Tensor, matches: Tensor) -> Tensor:
    """Return what belongs to each anchor's object; for anchors without one, what belongs to the first place.

    Args:
        values: [B, G, ...] of the objects.
        matches: int64 [B, A] from `match`.

    Returns:
        [B, A, ...].
    """
    places = matches.clamp(min=0).reshape(*matches.shape, *[1] * (values.dim() - 2))
    return values.gather(1, places.expand(*matches.shape, *values.shape[2:]))
