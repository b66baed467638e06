"""Arithmetic of boxes for all pictures of a batch at once, in float32, and small numbers on their way to the device."""

import functools
from typing import Any

import torch
from torch import Tensor

# Keeps the quotients of GIoU finite; as in torchvision's.
GIOU_EPS = 1e-7


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers that never change, float32 [N] on ``device``: copied there once, for a copy may wait for it."""
    with torch.inference_mode(False):  # an evaluation may come first; training cannot use tensors made in that mode
        return torch.tensor(values, dtype=torch.float32, device=device)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor; to a GPU from pinned memory, without a wait for what is queued there."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Return what a head has to predict to turn anchors into boxes, as `BoxCoder.encode_single` does.

    Args:
        boxes: float32 [..., 4], xyxy. Where they do not count, give the anchors: logarithms of 0 would not be numbers,
            and stay none when they are multiplied by 0.
        anchors: float32 [..., 4], xyxy; broadcast.
        weights: Factors of x, y, width and height.

    Returns:
        float32 [..., 4].
    """
    anchor_sides = anchors[..., 2:] - anchors[..., :2]
    anchor_centers = anchors[..., :2] + 0.5 * anchor_sides
    sides = boxes[..., 2:] - boxes[..., :2]
    centers = boxes[..., :2] + 0.5 * sides
    codes = torch.cat([(centers - anchor_centers) / anchor_sides, torch.log(sides / anchor_sides)], dim=-1)
    return codes if weights == (1, 1, 1, 1) else codes * constant(tuple(weights), codes.device)


def decode_boxes(codes: Tensor, anchors: Tensor, coder: Any) -> Tensor:
    """Turn a head's predictions into boxes, as `BoxCoder.decode_single` does.

    Args:
        codes: float32 [..., 4].
        anchors: float32 [..., 4], xyxy; broadcast.
        coder: torchvision's `BoxCoder`, whose weights and limit count.

    Returns:
        float32 [..., 4], xyxy.
    """
    if tuple(coder.weights) != (1, 1, 1, 1):
        codes = codes / constant(tuple(coder.weights), codes.device)
    anchor_sides = anchors[..., 2:] - anchors[..., :2]
    centers = codes[..., :2] * anchor_sides + (anchors[..., :2] + 0.5 * anchor_sides)
    half_sides = 0.5 * (codes[..., 2:].clamp(max=coder.bbox_xform_clip).exp() * anchor_sides)
    return torch.cat([centers - half_sides, centers + half_sides], dim=-1)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return `torchvision.ops.generalized_box_iou_loss` without its boolean indexing, which waits for the device.

    Args:
        boxes: float32 [..., 4], xyxy.
        targets: float32 [..., 4], xyxy.

    Returns:
        float32 [...], 0 to 2.
    """
    sides, target_sides = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    common = torch.minimum(boxes[..., 2:], targets[..., 2:]) - torch.maximum(boxes[..., :2], targets[..., :2])
    # No gradient where boxes only touch: `clamp` would let one through.
    inter = (common[..., 0] * common[..., 1]).masked_fill((common <= 0).any(dim=-1), 0.0)
    union = sides[..., 0] * sides[..., 1] + target_sides[..., 0] * target_sides[..., 1] - inter
    around = torch.maximum(boxes[..., 2:], targets[..., 2:]) - torch.minimum(boxes[..., :2], targets[..., :2])
    enclosing = around[..., 0] * around[..., 1]
    return 1 - (inter / (union + GIOU_EPS) - (enclosing - union) / (enclosing + GIOU_EPS))
