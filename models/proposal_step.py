"""The region proposal network in training: proposals and losses of all pictures of a batch at once."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import nms

from models.anchor_cache import anchors_of
from models.batched_boxes import decode_boxes, encode_boxes, to_device
from models.batched_matching import match, of_matched
from models.batched_pictures import PictureBatch
from models.batched_sampling import draw_slots
from models.object_block import ObjectBlock

# Boxes of one call of nms on a GPU, whose table of pairs takes N * N / 8 bytes: 512 MiB. That is 7 pictures of
# 800 x 1333; a picture is never cut in two.
MOST_BOXES_OF_NMS = 2**16

# How wrong a box is, in torchvision's losses, where its error stops counting by the square.
SMOOTH_L1_BETA = 1 / 9


class BatchedRPN(RegionProposalNetwork):
    """torchvision's `RegionProposalNetwork` with a training step of its own; its evaluation is torchvision's."""

    def forward(self, images: Any, features: dict[str, Tensor], targets: Any = None) -> tuple[Any, dict[str, Tensor]]:
        """Return the proposals, and in training the losses.

        Args:
            images: In a batched step a `PictureBatch`.
            features: The feature maps of the pyramid, [B, C, H, W] each.
            targets: In a batched step an `ObjectBlock` in pixels of ``images``; with all else torchvision's way is
                taken.

        Returns:
            In a batched step boxes and which of them are proposals, see `propose`, and the losses by torchvision's
            names.
        """
        if not isinstance(targets, ObjectBlock):
            return super().forward(images, features, targets)
        maps = list(features.values())
        objectness, codes = self.head(maps)
        anchors = anchors_of(self.anchor_generator, images, maps)
        level_sizes = [map_[0].numel() for map_ in objectness]
        objectness, codes = by_anchor(objectness, 1).squeeze(2), by_anchor(codes, 4)
        proposals = self.propose(anchors, objectness, codes, level_sizes, images)
        return proposals, self.losses(anchors, objectness, codes, targets)

    @torch.no_grad()
    def propose(
        self, anchors: Tensor, objectness: Tensor, codes: Tensor, level_sizes: list[int], images: PictureBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the best boxes of each picture, what `filter_proposals` does; boxes are decoded after the choice.

        Boxes that are too small or have too low a score cannot be left out, which would take their number: they get
        the score -1, with which they come last in nms and suppress none, and are no proposals.

        Args:
            anchors: float32 [A, 4], xyxy in pixels of the batch.
            objectness: Logits, float32 [B, A].
            codes: float32 [B, A, 4], how anchors are to be moved.
            level_sizes: Anchors of each level of the pyramid.
            images: The batch that boxes are clipped to.

        Returns:
            boxes: float32 [B, P, 4], xyxy, the highest score first; numbers without a meaning in empty places.
            is_proposal: bool [B, P], False in empty places.
        """
        counts = [min(self.pre_nms_top_n(), size) for size in level_sizes]
        levels = objectness.split(level_sizes, dim=1)
        logits, places = zip(*(level.topk(count, dim=1) for level, count in zip(levels, counts)))
        firsts = [sum(level_sizes[:level]) for level in range(len(level_sizes))]
        chosen = torch.cat(places, dim=1) + spread(tuple(firsts), tuple(counts), objectness.device)  # [B, K]
        scores = torch.cat(logits, dim=1).sigmoid()
        boxes = decode_boxes(codes.gather(1, chosen[..., None].expand(-1, -1, 4)), anchors[chosen], self.box_coder)
        boxes = torch.minimum(boxes.clamp(min=0), images.sizes.flip(1).repeat(1, 2)[:, None])

        is_large = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(dim=-1)
        # Written so that what is not a number is out as well: no later kernel could read from such a place.
        is_out = ~(is_large & (scores >= self.score_thresh))
        scores = scores.masked_fill_(is_out, -1.0)
        boxes = boxes.masked_fill_(is_out[..., None], 0.0)
        kept = kept_by_nms(boxes, scores, counts, self.nms_thresh, max(images.tensors.shape[-2:]))
        # By their scores again, because nms gives pictures or levels one after the other; equal ones as torchvision's.
        is_suppressed = torch.ones_like(is_out).view(-1).index_fill_(0, kept, False).view_as(is_out)
        scores, order = scores.masked_fill_(is_suppressed, -1.0).sort(dim=1, descending=True, stable=True)
        best = order[:, : self.post_nms_top_n(), None].expand(-1, -1, 4)
        return boxes.gather(1, best), scores[:, : best.shape[1]] >= 0

    def losses(self, anchors: Tensor, objectness: Tensor, codes: Tensor, objects: ObjectBlock) -> dict[str, Tensor]:
        """Return the losses of `assign_targets_to_anchors` and `compute_loss`, over the drawn anchors alone.

        Args:
            anchors: float32 [A, 4], xyxy in pixels of the batch.
            objectness: Logits, float32 [B, A].
            codes: float32 [B, A, 4], how anchors are to be moved.
            objects: In pixels of the batch.

        Returns:
            loss_objectness and loss_rpn_box_reg, float32 scalars.
        """
        matches = match(objects, anchors, self.proposal_matcher)
        slots = draw_slots(matches, self.fg_bg_sampler)
        count = slots.is_drawn.sum()
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.gather(1, slots.candidates),
            slots.is_positive.float(),
            weight=slots.is_drawn.float(),
            reduction="sum",
        )
        positives = slots.candidates[:, : slots.most_positives]
        is_positive = slots.is_positive[:, : slots.most_positives, None]
        moved = anchors[positives]
        boxes = torch.where(is_positive, of_matched(objects.boxes, matches.gather(1, positives)), moved)
        wanted = encode_boxes(boxes, moved, self.box_coder.weights)
        # Where there is no positive nothing is wrong, and no gradient: not even by a number times 0, which may be none.
        given = torch.where(is_positive, codes.gather(1, positives[..., None].expand(-1, -1, 4)), wanted)
        box_loss = F.smooth_l1_loss(given, wanted, beta=SMOOTH_L1_BETA, reduction="sum")
        return {"loss_objectness": objectness_loss / count, "loss_rpn_box_reg": box_loss / count}


def by_anchor(maps: Sequence[Tensor], numbers: int) -> Tensor:
    """Put a head's outputs in the order of anchors: `concat_box_prediction_layers`, but pictures stay apart.

    Args:
        maps: [B, A * numbers, H, W] of each level.
        numbers: Per anchor.

    Returns:
        [B, anchors of all levels, numbers].
    """
    by_place = [map_.flatten(2).transpose(1, 2) for map_ in maps]  # views: only `cat` copies
    return torch.cat(by_place, dim=1).view(len(maps[0]), -1, numbers)


@functools.lru_cache(maxsize=64)
def spread(values: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return each value as many times as its count says, int64 [sum of counts]; kept: it depends on shapes alone."""
    with torch.inference_mode(False):
        return to_device(torch.tensor(values).repeat_interleave(torch.tensor(counts)), device)


def calls_nms_once(device: torch.device) -> bool:
    """Return whether nms is called for all pictures and levels at once: where a call makes the host wait.

    On a CPU nothing waits, and time grows with the square of the boxes of a call.
    """
    return device.type != "cpu"


def kept_by_nms(boxes: Tensor, scores: Tensor, level_sizes: list[int], threshold: float, side: int) -> Tensor:
    """Return which boxes no better box of the same picture and level overlaps: `batched_nms` for a batch.

    Args:
        boxes: float32 [B, K, 4], xyxy, from 0 to ``side``.
        scores: float32 [B, K].
        level_sizes: Boxes of each level, one level after the other; their sum is K.
        threshold: IoU above which a box is left out.
        side: The longer side of the batch.

    Returns:
        int64, numbers in the flattened [B * K], in no particular order.
    """
    num_pictures, num_boxes = scores.shape
    if not calls_nms_once(boxes.device):
        kept = []
        for picture in range(num_pictures):
            first = 0
            for size in level_sizes:
                level = slice(first, first + size)
                kept.append(nms(boxes[picture, level], scores[picture, level], threshold) + picture * num_boxes + first)
                first += size
        return torch.cat(kept)

    # Boxes are moved apart: pictures to the right, levels down, which keeps coordinates small and so their rounding.
    step = max(1, MOST_BOXES_OF_NMS // num_boxes)
    across = torch.arange(num_pictures, device=boxes.device).remainder_(step)[:, None].expand_as(scores)
    down = spread(tuple(range(len(level_sizes))), tuple(level_sizes), boxes.device).expand_as(scores)
    moved = boxes + torch.stack([across, down, across, down], dim=-1) * (side + 1)
    kept = []
    for first in range(0, num_pictures, step):
        part = slice(first, first + step)
        kept.append(nms(moved[part].reshape(-1, 4), scores[part].reshape(-1), threshold) + first * num_boxes)
    return torch.cat(kept)
