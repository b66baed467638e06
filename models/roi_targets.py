"""What the masks and keypoints of drawn candidates should be, and how far the heads are from it."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Marks a keypoint that is not learnt from, in `torch.nn.functional.cross_entropy`.
NOT_LEARNT = -100


@torch.no_grad()
def mask_targets(masks: list[Tensor], boxes: Tensor, places: Tensor, counts: list[int], size: int) -> Tensor:
    """Return what the mask head should give for each positive: `project_masks_on_boxes` for a batch.

    A picture at a time: pictures differ in size, and float32 masks of one are already as large as a feature map.

    Args:
        masks: uint8 [N, H, W] of each picture's objects.
        boxes: float32 [B, S, 4], xyxy; of each picture the first ``counts`` are used.
        places: int64 [B, S], which of its picture's objects each box stands for.
        counts: Positives of each picture.
        size: Side of the head's output.

    Returns:
        float32 [P, size, size], in 0..1, the positives of one picture after the other.
    """
    rois = torch.cat([places[..., None].to(boxes.dtype), boxes], dim=-1)  # the place is the number of the mask
    targets = [boxes.new_zeros((0, 1, size, size))]
    for picture, count in enumerate(counts):
        if count:
            values = masks[picture][:, None].to(boxes.dtype)
            # The kernel itself, as `models.acceleration.cut_masks_by_kernel` has it: no gradient is needed.
            targets.append(torch.ops.torchvision.roi_align(values, rois[picture, :count], 1.0, size, size, -1, False))
    return torch.cat(targets)[:, 0]


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross entropy of the masks of the right class, as `maskrcnn_loss` does.

    Args:
        logits: float32 [P, C, size, size] of the positives.
        targets: float32 [P, size, size], see `mask_targets`.
        labels: int64 [P], their classes.
    """
    if not len(logits):  # a mean of nothing is not a number; the sum keeps the head in the graph
        return logits.sum() * 0
    index = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    return F.binary_cross_entropy_with_logits(logits.gather(1, index)[:, 0], targets)


def keypoint_loss(logits: Tensor, boxes: Tensor, keypoints: Tensor) -> Tensor:
    """Return the cross entropy of the cells that keypoints lie in: `keypoints_to_heatmap` and `keypointrcnn_loss`.

    Args:
        logits: float32 [P, K, size, size] of the positives.
        boxes: float32 [P, 4], xyxy, what the heatmaps cover.
        keypoints: float32 [P, K, 3] as (x, y, visibility), in pixels of the batch.

    Returns:
        The mean over visible keypoints within their boxes, 0 where there are none.
    """
    size = logits.shape[-1]
    corners, ends = boxes[:, None, :2], boxes[:, None, 2:]
    points = keypoints[..., :2]
    cells = ((points - corners) * (size / (ends - corners))).floor()
    cells = cells.masked_fill(points == ends, size - 1)  # the far edges belong to the last cells
    is_learnt = (cells == cells.clamp(0, size - 1)).all(dim=-1) & (keypoints[..., 2] > 0)
    targets = (cells[..., 1] * size + cells[..., 0]).long().masked_fill(~is_learnt, NOT_LEARNT)
    losses = F.cross_entropy(
        logits.flatten(0, 1).flatten(1), targets.flatten(), ignore_index=NOT_LEARNT, reduction="sum"
    )
    return losses / is_learnt.sum().clamp(min=1)
