"""The second stage of R-CNNs in training: candidates drawn, pooled and learnt from for all pictures of a batch at once.

Not here: what masks and keypoints should be (roi_targets).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, roi_align

from models.batched_boxes import encode_boxes
from models.batched_matching import match, of_matched
from models.batched_sampling import draw_slots
from models.object_block import ObjectBlock
from models.proposal_step import SMOOTH_L1_BETA
from models.roi_targets import keypoint_loss, mask_loss, mask_targets

# What the matcher does not say: an empty place, which must not be drawn.
NO_CANDIDATE = -3


class Candidates(NamedTuple):
    """Drawn candidates of B pictures in S slots each: positives first, then negatives, then empty slots.

    Attributes:
        boxes: float32 [B, S, 4], xyxy in pixels of the batch.
        labels: int64 [B, S], classes to be predicted; 0 is background.
        places: int64 [B, S], which of its picture's objects a positive stands for; less than 0 for background.
        is_positive: bool [B, S].
        is_drawn: bool [B, S], False in empty slots, whose numbers mean nothing.
    """

    boxes: Tensor
    labels: Tensor
    places: Tensor
    is_positive: Tensor
    is_drawn: Tensor


class LevelOrder(NamedTuple):
    """N candidates in the order of the levels of the pyramid that they are pooled from.

    Attributes:
        slots: int64 [N], where they are in the flattened [B * S].
        rois: float32 [N, 5], number of the picture and box, as `roi_align` takes them.
        counts: How many are of each level.
    """

    slots: Tensor
    rois: Tensor
    counts: list[int]


class BatchedRoIHeads(RoIHeads):
    """torchvision's `RoIHeads` with a training step of its own; its evaluation is torchvision's."""

    def forward(
        self, features: dict[str, Tensor], proposals: Any, image_shapes: list[tuple[int, int]], targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and losses; a batched step has no detections.

        Args:
            features: The feature maps of the pyramid, [B, C, H, W] each.
            proposals: In a batched step boxes and which of them are proposals, see `BatchedRPN.propose`.
            image_shapes: Height and width of each picture.
            targets: In a batched step an `ObjectBlock` in pixels of the batch; with all else torchvision's way is
                taken.
        """
        if not isinstance(targets, ObjectBlock):
            return super().forward(features, proposals, image_shapes, targets)
        boxes, is_proposal = proposals
        drawn = self.draw(boxes, is_proposal, targets)
        pools = [self.box_roi_pool]
        pools += [self.mask_roi_pool] if self.has_mask() else []
        pools += [self.keypoint_roi_pool] if self.has_keypoint() else []
        for pool in pools:
            if pool.scales is None:  # it works them out from the first batch that it sees
                pool(features, [boxes.new_zeros((0, 4))], image_shapes)
            assert vars(pool.map_levels) == vars(self.box_roi_pool.map_levels), "pooling layers choose different levels"
        order, positives, per_picture = order_by_level(self.box_roi_pool, drawn)

        losses = self.box_losses(features, drawn, order, targets)
        if self.has_mask():
            losses["loss_mask"] = self.mask_loss(features, drawn, positives, per_picture, image_shapes, targets)
        if self.has_keypoint():
            losses["loss_keypoint"] = self.keypoint_loss(features, drawn, positives, targets)
        return [], losses

    @torch.no_grad()
    def draw(self, boxes: Tensor, is_proposal: Tensor, objects: ObjectBlock) -> Candidates:
        """Draw what is learnt from among proposals and objects: `select_training_samples`.

        Args:
            boxes: float32 [B, P, 4], xyxy in pixels of the batch.
            is_proposal: bool [B, P], False in empty places.
            objects: In pixels of the batch; their boxes are candidates too.
        """
        boxes = torch.cat([boxes, objects.boxes], dim=1)
        is_candidate = torch.cat([is_proposal, objects.is_object], dim=1)
        matches = match(objects, boxes, self.proposal_matcher)
        slots = draw_slots(matches.masked_fill(~is_candidate, NO_CANDIDATE), self.fg_bg_sampler)
        places = matches.gather(1, slots.candidates)
        return Candidates(
            boxes.gather(1, slots.candidates[..., None].expand(-1, -1, 4)),
            of_matched(objects.labels, places) * slots.is_positive,
            places,
            slots.is_positive,
            slots.is_drawn,
        )

    def box_losses(
        self, features: dict[str, Tensor], drawn: Candidates, order: LevelOrder, objects: ObjectBlock
    ) -> dict[str, Tensor]:
        """Return the losses of classes and boxes, as `fastrcnn_loss` has them.

        Args:
            features: The feature maps.
            drawn: What is learnt from.
            order: All of it.
            objects: In pixels of the batch.

        Returns:
            loss_classifier and loss_box_reg, float32 scalars.
        """
        pooled = pool_by_level(self.box_roi_pool, features, order)
        logits, codes = self.box_predictor(self.box_head(pooled))
        boxes, labels = order.rois[:, 1:], drawn.labels.flatten()[order.slots]
        object_boxes = of_matched(objects.boxes, drawn.places).flatten(0, 1)[order.slots]
        is_positive = (labels > 0)[:, None]
        wanted = encode_boxes(torch.where(is_positive, object_boxes, boxes), boxes, self.box_coder.weights)
        index = labels[:, None, None].expand(-1, 1, 4)
        given = torch.where(is_positive, codes.view(len(codes), -1, 4).gather(1, index)[:, 0], wanted)
        box_loss = F.smooth_l1_loss(given, wanted, beta=SMOOTH_L1_BETA, reduction="sum") / len(labels)
        return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss}

    def mask_loss(
        self,
        features: dict[str, Tensor],
        drawn: Candidates,
        order: LevelOrder,
        per_picture: list[int],
        image_shapes: list[tuple[int, int]],
        objects: ObjectBlock,
    ) -> Tensor:
        """Return the loss of masks; the head runs on the positives alone.

        Args:
            features: The feature maps.
            drawn: What is learnt from.
            order: The positives.
            per_picture: Positives of each picture.
            image_shapes: Height and width of each picture.
            objects: With masks, which are not yet resized.
        """
        assert objects.masks is not None
        logits = self.mask_predictor(self.mask_head(pool_by_level(self.mask_roi_pool, features, order)))
        targets = mask_targets(objects.masks, image_shapes, drawn.boxes, drawn.places, per_picture, logits.shape[-1])
        # Targets come picture by picture, logits level by level.
        numbers = drawn.is_positive.flatten().cumsum(dim=0) - 1
        return mask_loss(logits, targets[numbers[order.slots]], drawn.labels.flatten()[order.slots])

    def keypoint_loss(
        self, features: dict[str, Tensor], drawn: Candidates, order: LevelOrder, objects: ObjectBlock
    ) -> Tensor:
        """Return the loss of keypoints; the head runs on the positives alone.

        Args:
            features: The feature maps.
            drawn: What is learnt from.
            order: The positives.
            objects: In pixels of the batch, with keypoints.
        """
        assert objects.keypoints is not None
        logits = self.keypoint_predictor(self.keypoint_head(pool_by_level(self.keypoint_roi_pool, features, order)))
        keypoints = of_matched(objects.keypoints, drawn.places).flatten(0, 1)[order.slots]
        return keypoint_loss(logits, order.rois[:, 1:], keypoints)


@torch.no_grad()
def order_by_level(pool: MultiScaleRoIAlign, drawn: Candidates) -> tuple[LevelOrder, LevelOrder, list[int]]:
    """Sort candidates by the level that they are pooled from, and read all numbers of a step that the host must know.

    torchvision looks for the candidates of each level and waits each time. Here this is the only wait of the stage.

    Args:
        pool: torchvision's layer, which knows the levels.
        drawn: Candidates [B, S].

    Returns:
        All candidates, the positives among them, and the number of positives of each picture.
    """
    num_levels, num_slots = len(pool.scales), drawn.labels.shape[1]
    levels = pool.map_levels([drawn.boxes.flatten(0, 1)])
    # Twice the level, one more for positives; empty slots come last.
    keys = (levels * 2 + drawn.is_positive.flatten()).masked_fill_(~drawn.is_drawn.flatten(), num_levels * 2)
    slots = keys.argsort(stable=True)
    counts = (keys[:, None] == torch.arange(num_levels * 2, device=keys.device)).sum(dim=0)
    numbers = torch.cat([counts, drawn.is_positive.sum(dim=1)]).tolist()
    groups, per_picture = numbers[: num_levels * 2], numbers[num_levels * 2 :]
    negatives, positives = groups[::2], groups[1::2]

    slots = slots[: sum(groups)]
    pictures = torch.div(slots, num_slots, rounding_mode="floor")[:, None]
    rois = torch.cat([pictures.to(drawn.boxes.dtype), drawn.boxes.flatten(0, 1)[slots]], dim=1)
    everything = LevelOrder(slots, rois, [sum(pair) for pair in zip(negatives, positives)])
    slots, rois = (torch.cat(values.split(groups)[1::2]) for values in (slots, rois))
    return everything, LevelOrder(slots, rois, positives), per_picture


def pool_by_level(pool: MultiScaleRoIAlign, features: dict[str, Tensor], order: LevelOrder) -> Tensor:
    """Cut candidates out of the feature maps: `MultiScaleRoIAlign.forward`, but the result stays in levels' order.

    Args:
        pool: torchvision's layer, whose scales and sizes count.
        features: The feature maps, [B, C, H, W] each.
        order: Which candidates.

    Returns:
        [N, C, height, width] in the type of the first map.
    """
    maps = [values for name, values in features.items() if name in pool.featmap_names]
    levels = zip(maps, order.rois.split(order.counts), pool.scales)
    parts = [roi_align(map_, part, pool.output_size, scale, pool.sampling_ratio) for map_, part, scale in levels]
    return torch.cat([part.to(maps[0].dtype) for part in parts])
