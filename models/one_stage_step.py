"""The training step of RetinaNet, FCOS and SSD for all pictures of a batch at once: their losses, without a wait.

torchvision selects the anchors of each loss picture by picture, and has to wait for their number each time. Here every
anchor has a part in every loss, and a weight of 0 where it does not count; what is computed for those is made harmless
first, since 0 times infinity is not a number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from models.anchor_cache import anchors_of
from models.batched_boxes import decode_boxes, encode_boxes, giou_loss
from models.batched_matching import match, of_matched, picture_slices
from models.object_block import ObjectBlock, objects_of

# Of torchvision's sigmoid_focal_loss: what objects weigh. Its gamma is 2.
ALPHA = 0.25


class OneStageStep(nn.Module):
    """What the three have in common; evaluation stays torchvision's."""

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None) -> Any:
        """Return the losses of a batch in training, detections otherwise; as torchvision's, without its checks.

        Args:
            images: float [3, H, W] each, in 0..1.
            targets: ``boxes`` and ``labels`` of each picture, or a `BatchTargets`.
        """
        if not self.training or targets is None:
            return super().forward(images, targets)
        model: Any = self  # what a module holds has no types
        pictures, objects = model.transform.batch(images, objects_of(targets))
        features = model.backbone(pictures.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        outputs = {name: values.float() for name, values in model.head(features).items()}
        anchors = anchors_of(model.anchor_generator, pictures, features)
        return self.losses_of_batch(objects, outputs, anchors, [map_.shape[-2:].numel() for map_ in features])

    def losses_of_batch(
        self, objects: ObjectBlock, outputs: dict[str, Tensor], anchors: Tensor, level_sizes: list[int]
    ) -> dict[str, Tensor]:
        """Return each loss, a scalar, by torchvision's name for it.

        Args:
            objects: In pixels of the resized pictures.
            outputs: What the head gives, float32 [B, A, ...] each.
            anchors: float32 [A, 4], xyxy.
            level_sizes: Places of each feature map.
        """
        raise NotImplementedError


class BatchedRetinaNet(OneStageStep, RetinaNet):
    """torchvision's RetinaNet with `compute_loss` and those of its heads for a batch."""

    def losses_of_batch(
        self, objects: ObjectBlock, outputs: dict[str, Tensor], anchors: Tensor, level_sizes: list[int]
    ) -> dict[str, Tensor]:
        """See `OneStageStep`; the mean over pictures of what is the mean over a picture's matched anchors."""
        model: Any = self
        matches = match(objects, anchors, model.proposal_matcher)
        is_matched = matches >= 0
        weight = (is_matched.sum(dim=1, keepdim=True).clamp(min=1) * len(matches)).reciprocal()  # [B, 1]
        counts = (matches != model.proposal_matcher.BETWEEN_THRESHOLDS) * weight
        head = model.head.regression_head
        boxes = torch.where(is_matched[..., None], of_matched(objects.boxes, matches), anchors)
        if head._loss_type == "l1":
            codes = encode_boxes(boxes, anchors, head.box_coder.weights)
            box_losses = F.l1_loss(outputs["bbox_regression"], codes, reduction="none").sum(dim=-1)
        else:
            assert head._loss_type == "giou", head._loss_type
            box_losses = giou_loss(decode_boxes(outputs["bbox_regression"], anchors, head.box_coder), boxes)
        return {
            "classification": focal_loss(
                outputs["cls_logits"], of_matched(objects.labels, matches), is_matched, counts
            ),
            "bbox_regression": (box_losses * (is_matched * weight)).sum(),
        }


class BatchedFCOS(OneStageStep, FCOS):
    """torchvision's FCOS with `compute_loss` and that of its head for a batch."""

    def losses_of_batch(
        self, objects: ObjectBlock, outputs: dict[str, Tensor], anchors: Tensor, level_sizes: list[int]
    ) -> dict[str, Tensor]:
        """See `OneStageStep`; means over the matched points of the batch."""
        model: Any = self
        points, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
        matches = match_points(objects, points, sides[:, 0], model.center_sampling_radius, level_sizes)
        is_matched = matches >= 0
        weight = is_matched.sum().clamp(min=1).reciprocal()
        counts = is_matched * weight
        boxes = torch.where(is_matched[..., None], of_matched(objects.boxes, matches), anchors)
        # The head predicts how far the four edges are from a point, in anchors' sides: BoxLinearCoder.
        assert model.head.box_coder.normalize_by_size
        to_start, to_end = (outputs["bbox_regression"].unflatten(-1, (2, 2)) * sides[:, None]).unbind(-2)
        box_losses = giou_loss(torch.cat([points - to_start, points + to_end], dim=-1), boxes)
        # Centerness compares a point's distances from opposite edges. Unmatched points are their anchors' centers.
        to_start, to_end = points - boxes[..., :2], boxes[..., 2:] - points  # [B, A, 2]
        centerness = (torch.minimum(to_start, to_end) / torch.maximum(to_start, to_end)).prod(dim=-1).sqrt()
        center_losses = F.binary_cross_entropy_with_logits(
            outputs["bbox_ctrness"].squeeze(dim=2), centerness, reduction="none"
        )
        labels = of_matched(objects.labels, matches)
        return {
            "classification": focal_loss(outputs["cls_logits"], labels, is_matched, weight.expand(labels.shape)),
            "bbox_regression": (box_losses * counts).sum(),
            "bbox_ctrness": (center_losses * counts).sum(),
        }


class BatchedSSD(OneStageStep, SSD):
    """torchvision's SSD, SSDlite as well, with `compute_loss` for a batch."""

    def losses_of_batch(
        self, objects: ObjectBlock, outputs: dict[str, Tensor], anchors: Tensor, level_sizes: list[int]
    ) -> dict[str, Tensor]:
        """See `OneStageStep`; means over the matched anchors of the batch."""
        model: Any = self
        matches = match(objects, anchors, model.proposal_matcher)
        is_matched = matches >= 0
        num_matched = is_matched.sum(dim=1, keepdim=True)  # [B, 1]
        weight = num_matched.sum().clamp(min=1).reciprocal()
        boxes = torch.where(is_matched[..., None], of_matched(objects.boxes, matches), anchors)
        codes = encode_boxes(boxes, anchors, model.box_coder.weights)
        box_losses = F.smooth_l1_loss(outputs["bbox_regression"], codes, reduction="none").sum(dim=-1)

        labels = of_matched(objects.labels, matches) * is_matched
        class_losses = F.cross_entropy(outputs["cls_logits"].flatten(0, 1), labels.flatten(), reduction="none")
        class_losses = class_losses.view(labels.shape)
        # Hard negatives: of each picture its unmatched anchors of the largest losses, three for each matched one. Where
        # they are too few, matched ones follow in their order and count twice, as torchvision has it.
        order = class_losses.detach().masked_fill(is_matched, -torch.inf).sort(dim=1, descending=True).indices
        is_hard = torch.arange(labels.shape[1], device=labels.device) < model.neg_to_pos_ratio * num_matched
        times = is_matched + torch.zeros_like(class_losses).scatter_(1, order, is_hard.to(class_losses.dtype))
        return {
            "bbox_regression": (box_losses * is_matched).sum() * weight,
            "classification": (class_losses * times).sum() * weight,
        }


def focal_loss(logits: Tensor, labels: Tensor, is_matched: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of torchvision's `sigmoid_focal_loss` over all anchors and classes.

    Its targets are 1 for the label of a matched anchor and 0 elsewhere. Here all classes are summed up as if they were
    no object, in a third of its operations on tensors of this size, and the one label of each matched anchor is put
    right afterwards.

    Args:
        logits: float32 [B, A, C].
        labels: int64 [B, A]; of matched anchors they count.
        is_matched: bool [B, A].
        weights: float32 [B, A].
    """
    losses = _background_term(logits).sum(dim=-1)
    own = logits.gather(2, labels[..., None]).squeeze(2)
    wrong, right = _background_term(torch.stack([own, -own]))  # without an object, and of it: 1 - p is that of -logit
    losses = losses + (ALPHA / (1 - ALPHA) * right - wrong) * is_matched
    return (losses * weights).sum() * (1 - ALPHA)


def _background_term(logits: Tensor) -> Tensor:
    """Return p ** 2 * -log(1 - p): the loss of a class that is not there, but for its factor."""
    return logits.sigmoid().square() * F.softplus(logits)


@torch.no_grad()
def match_points(objects: ObjectBlock, points: Tensor, sides: Tensor, radius: float, level_sizes: list[int]) -> Tensor:
    """Return which object each of FCOS's points stands for: the first part of `FCOS.compute_loss`.

    Args:
        objects: In pixels of the resized pictures. No point is inside of the box of an empty place.
        points: float32 [A, 2], level by level.
        sides: float32 [A] of the squares around them.
        radius: How far a point may be from an object's center, in sides.
        level_sizes: Points of each level.

    Returns:
        int64 [B, A]: the place of the smallest object, -1 for background.
    """
    shortest, longest = sides * 4, sides * 8  # each level is responsible for a range of sizes
    shortest[: level_sizes[0]].fill_(0)
    longest[-level_sizes[-1] :].fill_(torch.inf)
    reach, points = radius * sides, points.T  # x and y before the points: reductions over them run along the points
    parts = []
    for part in picture_slices(len(objects.boxes), 2 * objects.boxes.shape[1] * len(sides)):
        starts, ends = objects.boxes[part, ..., None].split(2, dim=2)  # [B, G, 2, 1] each
        is_match = (points - (starts + ends) / 2).abs_().amax(dim=2) < reach  # [B, G, A]
        to_starts, to_ends = points - starts, ends - points
        is_match &= torch.minimum(to_starts, to_ends).amin(dim=2) > 0
        farthest = torch.maximum(to_starts, to_ends).amax(dim=2)
        is_match &= (farthest > shortest) & (farthest < longest)
        best_value, best = (is_match * (1e8 - (ends - starts).prod(dim=2))).max(dim=1)  # the first of equal areas
        parts.append(best.masked_fill_(best_value < 1e-5, -1))
    return torch.cat(parts)
