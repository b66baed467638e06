"""R-CNNs as one graph of tensors, see `export_form`: proposals, boxes and masks in a fixed number of slots."""

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.roi_heads import keypointrcnn_inference
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import resize_keypoints
from torchvision.ops import roi_align

from models.export_form import (
    DetectorForm,
    OneSizeForm,
    PyramidForm,
    anchors_at,
    best_rows,
    fill_slots,
    keep_best,
    take_rows,
)


def export_form(model: nn.Module) -> nn.Module:
    """Return what to export instead of one of torchvision's detectors."""
    for kind, form in ((SSD, OneSizeForm), ((RetinaNet, FCOS), PyramidForm), (FasterRCNN, TwoStageForm)):
        if isinstance(model, kind):
            return form(model).eval()
    raise ValueError(f"{type(model).__name__}: expected one of torchvision's detectors")


class TwoStageForm(DetectorForm):
    """Faster and Mask R-CNN; of Keypoint R-CNN all but the keypoints, whose loop no exporter follows so far."""

    cells: Tensor

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__(model)
        self.register_buffer("cells", torch.stack(model.rpn.anchor_generator.cell_anchors))  # [L, A, 4]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, labels, scores, perhaps masks or keypoints, and counts for ``images``, float32 [B, 3, H, W]."""
        heads = self.model.roi_heads
        batch, sides, back = self.to_batch(images)
        features = dict(self.model.backbone(batch))
        proposals, is_real = self._proposals(batch, sides, list(features.values()))
        pooled = _pool(heads.box_roi_pool, features, proposals)
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        boxes, labels, scores = self._detections(logits, codes, proposals, is_real, sides)
        found = torch.nonzero(scores.flatten()).squeeze(1)
        further: tuple[Tensor, ...] = ()
        if heads.mask_roi_pool is not None:
            pooled = _pool(heads.mask_roi_pool, features, boxes, found)
            masks = heads.mask_predictor(heads.mask_head(pooled)).sigmoid()
            masks = masks[torch.arange(found.shape[0]), labels.flatten()[found]]
            masks = paste_masks(masks, (boxes * back).reshape(-1, 4)[found], images.shape[-2], images.shape[-1])
            slots = masks.new_zeros(labels.numel(), 1, images.shape[-2], images.shape[-1])
            further = (slots.index_put((found,), masks[:, None]).reshape(*labels.shape, *slots.shape[1:]),)
        if heads.keypoint_roi_pool is not None:
            pooled = _pool(heads.keypoint_roi_pool, features, boxes, found)
            maps = heads.keypoint_predictor(heads.keypoint_head(pooled))
            (keypoints,), _ = keypointrcnn_inference(maps, [boxes.reshape(-1, 4)[found]])
            keypoints = resize_keypoints(keypoints, (sides[1], sides[0]), images.shape[-2:])
            points = keypoints.new_zeros(labels.numel(), *keypoints.shape[1:])
            further = (points.index_put((found,), keypoints).reshape(*labels.shape, *keypoints.shape[1:]),)
        return (boxes * back, labels, scores, *further, (scores > 0).sum(dim=1))

    def _proposals(self, batch: Tensor, sides: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the best proposals, float32 [B, P, 4], and which of them there are, bool [B, P]."""
        rpn, most = self.model.rpn, self.model.rpn.pre_nms_top_n()
        parts = []
        for logits, codes in zip(*rpn.head(features)):
            rank, rows = best_rows(logits.permute(0, 2, 3, 1).flatten(1), most)
            codes = codes.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            parts.append((rank, rows, take_rows(codes, rows)))
        rank, rows, codes = (torch.stack(part, dim=1) for part in zip(*parts))  # [B, L, k], [B, L, k], [B, L, k, 4]
        anchors = anchors_at(rows, self.cells, features, batch)
        boxes = rpn.box_coder.decode_single(codes.reshape(-1, 4), anchors.reshape(-1, 4))
        boxes = torch.minimum(boxes.clamp(min=0), sides).reshape(*rank.shape, 4).flatten(1, 2)
        scores = rank.sigmoid().flatten(1)
        scores = torch.where(_is_large(boxes, rpn.min_size) & (scores >= rpn.score_thresh), scores, 0.0)
        levels = torch.arange(len(features))[:, None].expand(rank.shape).flatten(1)
        scores, chosen = keep_best(boxes, scores, levels, len(features), rpn.nms_thresh, rpn.post_nms_top_n())
        return take_rows(boxes, chosen), scores > 0

    def _detections(self, logits: Tensor, codes: Tensor, proposals: Tensor, is_real: Tensor, sides: Tensor) -> Any:
        """Return boxes in pixels of the batch, labels and scores in slots."""
        heads, num_classes = self.model.roi_heads, logits.shape[-1]
        boxes = heads.box_coder.decode_single(codes, proposals.reshape(-1, 4))
        boxes = torch.minimum(boxes.reshape(-1, num_classes, 4).clamp(min=0), sides)[:, 1:]
        scores = logits.softmax(dim=-1)[:, 1:]
        counts = (scores > heads.score_thresh) & _is_large(boxes, 1e-2) & is_real.reshape(-1, 1)
        scores = torch.where(counts, scores, 0.0)
        labels = torch.arange(1, num_classes).expand(scores.shape)
        boxes, scores, labels = (
            values.reshape(proposals.shape[0], -1, *values.shape[2:]) for values in (boxes, scores, labels)
        )
        return fill_slots(heads, boxes, scores, labels, num_classes)


def _is_large(boxes: Tensor, side: float) -> Tensor:
    """Tell which boxes, xyxy [..., 4], have sides of ``side`` or more."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)


def _pool(pool: Any, features: dict[str, Tensor], boxes: Tensor, places: Tensor | None = None) -> Tensor:
    """Return `MultiScaleRoIAlign` of boxes, float32 [B, S, 4], or of some places of the flattened slots alone."""
    picture = torch.arange(boxes.shape[0]).to(boxes.dtype)[:, None].expand(boxes.shape[:2])
    regions = torch.cat([picture[..., None], boxes], dim=-1).reshape(-1, 5)
    if places is not None:
        regions = regions[places]
    maps = [map_ for name, map_ in features.items() if name in pool.featmap_names]
    options = {"output_size": pool.output_size, "sampling_ratio": pool.sampling_ratio}
    levels = pool.map_levels([regions[:, 1:]])
    pooled = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *pool.output_size)
    for level, (map_, scale) in enumerate(zip(maps, pool.scales)):
        here = torch.nonzero(levels == level).squeeze(1)
        pooled = pooled.index_put((here,), roi_align(map_, regions[here], spatial_scale=scale, **options))
    return pooled


def paste_masks(masks: Tensor, boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Return `paste_masks_in_image` as two products with matrices: bilinear weights of all rows and of all columns.

    Args:
        masks: float32 [N, M, M] in 0..1, each inside its box.
        boxes: float32 [N, 4], xyxy in pixels of the picture.
        height: The picture's, in pixels.
        width: The picture's, in pixels.

    Returns:
        float32 [N, height, width].
    """
    scale = (masks.shape[-1] + 2) / masks.shape[-1]
    masks = nnf.pad(masks, (1, 1, 1, 1))
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    first, last = (centre - half).to(torch.int64), (centre + half).to(torch.int64)
    columns, rows = (
        _bilinear(first[:, n], last[:, n], torch.arange(length), masks.shape[-1])
        for n, length in enumerate((width, height))
    )
    return rows @ masks @ columns.transpose(1, 2)


def _bilinear(first: Tensor, last: Tensor, pixels: Tensor, size: int) -> Tensor:
    """Return the weights of ``size`` values stretched over the pixels first..last: float32 [N, pixels, size]."""
    length = (last - first + 1).clamp(min=1)[:, None]
    source = (pixels - first[:, None] + 0.5) * (size / length) - 0.5
    weights = 1 - (source.clamp(0, size - 1)[..., None] - torch.arange(size)).abs()
    inside = (pixels >= first[:, None]) & (pixels < first[:, None] + length)
    return weights.clamp(min=0) * inside[..., None]
