"""What the masks and keypoints of drawn candidates should be, and how far the heads are from it."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.batched_boxes import to_device

# Marks a keypoint that is not learnt from, in `torch.nn.functional.cross_entropy`.
NOT_LEARNT = -100

# Pixels of resized masks that may always be laid out together, five bytes each: 320 MiB. Masks of 800 x 1333: 62, of 8
# pictures with 7 objects. And how many may never be: torchvision's kernels count them in 32 bits with a sign.
ALWAYS_MASK_PIXELS, NEVER_MASK_PIXELS = 2**26, 2**31


@torch.no_grad()
def mask_targets(
    masks: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    boxes: Tensor,
    places: Tensor,
    counts: Sequence[int],
    size: int,
) -> Tensor:
    """Return what the mask head should give for each positive: masks resized and cut for several pictures at once.

    It stands for the resize of masks in `_resize_image_and_masks` and for `project_masks_on_boxes`. A resize to the
    nearest pixel only picks values: the masks of a group of pictures, each of its own size, are picked out of one flat
    row of pixels onto canvases of the batch's size. Beyond its picture a canvas repeats the picture's last row and
    column, which are what `roi_align` takes there; weights of two equal pixels then add up to 1 but for rounding.

    Args:
        masks: uint8 [N, H, W] of each picture's objects, not yet resized.
        image_sizes: Height and width of each picture in the batch.
        boxes: float32 [B, S, 4], xyxy in pixels of the batch; of each picture the first ``counts`` are used.
        places: int64 [B, S], which of its picture's objects each box stands for.
        counts: Positives of each picture.
        size: Side of the head's output.

    Returns:
        float32 [P, size, size], in 0..1, the positives of one picture after the other.
    """
    canvas = max(height for height, _ in image_sizes), max(width for _, width in image_sizes)
    groups = _group_pictures([len(mask) * max(mask[0:1].numel(), math.prod(canvas)) for mask in masks])
    rows, columns, firsts = _pixels_to_pick(masks, image_sizes, canvas, groups, boxes.device)
    rois = torch.cat([(places + firsts[:, None])[..., None].to(boxes.dtype), boxes], dim=-1)
    targets, done = [], 0
    for group in groups:
        of_group = slice(done, done + sum(map(len, masks[group])))
        flat = [mask.reshape(-1) for mask in masks[group]]
        picked = (rows[of_group, :, None] + columns[of_group, None]).view(-1)
        values = (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, picked)
        del picked  # four bytes a pixel, as many as the next line needs
        canvases = values.view(-1, 1, *canvas).to(boxes.dtype)
        positives = torch.cat([of_picture[:count] for of_picture, count in zip(rois[group], counts[group])])
        # The kernel itself, as `models.acceleration.cut_masks_by_kernel` has it: no gradient is needed.
        targets.append(torch.ops.torchvision.roi_align(canvases, positives, 1.0, size, size, -1, False))
        done = of_group.stop
    return torch.cat(targets)[:, 0]


def _pixels_to_pick(
    masks: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    canvas: tuple[int, int],
    groups: Sequence[slice],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what canvases of masks are picked from; worked out on the host, which knows all of it, and sent at once.

    Returns:
        rows: int [N, canvas height], N masks of all pictures: where the pixels of each row begin in its group's masks.
        columns: int [N, canvas width], which of them each column is.
        firsts: int [B], how many masks come before those of each picture in its group.
    """
    numbers, pixels = [len(mask) for mask in masks], [mask.shape[-2] * mask.shape[-1] for mask in masks]
    sources = [
        (_nearest(mask.shape[-2], height, canvas[0]) * mask.shape[-1], _nearest(mask.shape[-1], width, canvas[1]))
        for mask, (height, width) in zip(masks, image_sizes)
    ]
    pictures = np.repeat(np.arange(len(masks)), numbers)
    starts = [_before(np.repeat(pixels[group], numbers[group])) for group in groups]  # of each mask
    firsts = [_before(numbers[group]) for group in groups]
    is_small = max(sum(map(math.prod, zip(numbers[group], pixels[group]))) for group in groups) < 2**31
    known = np.concatenate([*itertools.chain(*sources), pictures, *starts, *firsts])
    on_device = to_device(torch.from_numpy(known.astype(np.int32 if is_small else np.int64)), device)
    table, of_masks, before, first = on_device.split([len(masks) * sum(canvas), *[len(pictures)] * 2, len(masks)])
    rows, columns = table.view(len(masks), -1).index_select(0, of_masks).split(canvas, dim=1)
    return rows + before[:, None], columns, first


def most_together(pixels: Sequence[int]) -> int:
    """Return how many pixels of resized masks are laid out at once, of pictures with so many each.

    torchvision keeps the resized masks of all pictures, a byte a pixel, and lays out those of one picture in four more.
    What takes as much memory, at five bytes a pixel, makes four groups of 16 pictures alike, however large they are.
    """
    as_torchvision = (sum(pixels) + 4 * max(pixels)) // 5
    return min(max(ALWAYS_MASK_PIXELS, as_torchvision), NEVER_MASK_PIXELS - 1)


def _group_pictures(pixels: Sequence[int]) -> list[slice]:
    """Return pictures, each with so many pixels of masks, in groups of `most_together` at most or of one picture."""
    bounds, in_group, most = [0], 0, most_together(pixels)
    for picture, number in enumerate(pixels):
        if picture > bounds[-1] and in_group + number > most:
            bounds.append(picture)
            in_group = 0
        in_group += number
    return [slice(*pair) for pair in itertools.pairwise([*bounds, len(pixels)])]


def _nearest(source: int, size: int, length: int) -> np.ndarray:
    """Return which of ``source`` pixels a resize to ``size`` picks, int64 [length], the last one beyond ``size``.

    In float32, as `upsample_nearest2d` computes it.
    """
    picked = np.arange(length, dtype=np.float32) * (np.float32(source) / np.float32(size))
    return np.minimum(picked.astype(np.int64), source - 1)


def _before(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the sum of the numbers before each one, int64."""
    return np.cumsum([0, *numbers], dtype=np.int64)[:-1]


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
