"""A detector as one graph of tensors, for exporters that follow no Python: a batch in, a fixed number of slots out.

torchvision's own forward loops over pictures and classes, and keeps as many candidates as there are. Here every picture
has the same number of candidates, a score of 0 marks those that do not count, and one suppression serves the whole
batch. Numbers are torchvision's, but for the last digits of an overlap.
"""

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import nms

# What a form gives, as far as its model has it, in this order. Empty slots have 0 everywhere; ``counts`` says how many
# of a picture's slots are filled, from the first on.
OUTPUTS = ("boxes", "labels", "scores", "masks", "keypoints", "counts")

# Pixels. A graph is made for pictures whose sides are this or longer.
SMALLEST_SIDE = 16


class ToBatch(nn.Module):
    """Pictures of one size, normalised, resized and padded as torchvision does."""

    mean: Tensor
    std: Tensor

    def __init__(self, transform: GeneralizedRCNNTransform) -> None:
        super().__init__()
        self.fixed_size, self.divisor = transform.fixed_size, transform.size_divisible
        self.min_size, self.max_size = transform.min_size[-1], transform.max_size
        self.register_buffer("mean", torch.tensor(transform.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.image_std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch, the pictures' sides in it, and what brings boxes back into ``images``.

        Args:
            images: float32 [B, 3, H, W] in 0..1.

        Returns:
            float32 [B, 3, h, w]; float32 [4], (width, height, width, height) without the padding; float32 [4].
        """
        given = images.shape[-2], images.shape[-1]
        size, padded = self._sizes(given)
        images = nnf.interpolate((images - self.mean) / self.std, size=size, mode="bilinear", align_corners=False)
        images = nnf.pad(images, (0, padded[1] - size[1], 0, padded[0] - size[0]))
        before, after = (stack_numbers((sides[1], sides[0]) * 2, torch.float32) for sides in (given, size))
        return images, after, before / after

    def _sizes(self, given: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Return (height, width) after the resize, and padded; in float64 as torchvision computes them."""
        divisor = self.divisor
        if self.fixed_size is not None:
            size = self.fixed_size[1], self.fixed_size[0]
        elif all(isinstance(side, int) for side in given):
            scale = min(self.min_size / min(given), self.max_size / max(given))
            size = int(given[0] * scale), int(given[1] * scale)
        else:
            sizes = resized_shape(stack_numbers(given, torch.float64), self.min_size, self.max_size)
            blocks = torch.div(sizes + (divisor - 1), divisor, rounding_mode="floor")
            most = -(-self.max_size // divisor)
            height, width = (_at_most(side, self.max_size) for side in sizes.unbind())
            rows, columns = (_at_most(count, most) for count in blocks.unbind())
            torch._check(rows * divisor >= height)
            torch._check(columns * divisor >= width)
            return (height, width), (rows * divisor, columns * divisor)
        height, width = (-(-side // divisor) * divisor for side in size)
        return size, (height, width)


def _at_most(number: Tensor, limit: int) -> Any:
    """Return a number of the graph as a size, in 1..limit."""
    value: Any = number.item()
    torch._check(value >= 1)
    torch._check(value <= limit)
    return value


def stack_numbers(numbers: Any, dtype: torch.dtype) -> Tensor:
    """Return sizes of the graph as a tensor, [N]."""
    return torch.stack([torch.scalar_tensor(number, dtype=dtype) for number in numbers])


def resized_shape(shape: Tensor, min_size: int, max_size: int) -> Tensor:
    """Return (height, width) int64 [2] after the model's resize, of ``shape`` [2].

    Division by a tensor of one's own: ``number / tensor`` is ``number * (1 / tensor)`` in torch, which rounds twice.
    """
    sides = shape.to(torch.float64)
    limits = torch.tensor([min_size, max_size], dtype=torch.float64)
    scale = (limits / torch.stack([sides.min(), sides.max()])).min()
    return (sides * scale).floor().to(torch.int64)


def keep_best(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float, most: int) -> Any:
    """Suppress what overlaps a better candidate of its picture and group, and return the best of the rest.

    Args:
        boxes: float32 [B, K, 4], xyxy, not negative.
        scores: float32 [B, K]; 0 for candidates that do not count.
        groups: int64 [B, K], labels for example.
        num_groups: Groups are below this.
        threshold: IoU.
        most: Number of slots.

    Returns:
        Scores, float32 [B, S], falling, 0 for empty slots; and which of the K is in which slot, int64 [B, S].
    """
    # Each picture and group has a place of its own in a large plane, so that one suppression serves all.
    columns = math.ceil(math.sqrt(num_groups))
    row = torch.div(groups, columns, rounding_mode="floor")
    column = groups - row * columns
    row = row + torch.arange(boxes.shape[0])[:, None] * math.ceil(num_groups / columns)
    shifts = torch.stack([column, row, column, row], dim=-1) * (boxes.max() + 1)
    # And two that overlap nothing: the export takes for granted that at least two are left.
    apart = torch.cat([(boxes + shifts).reshape(-1, 4), torch.tensor([[-2.0, -2, -1, -1], [-4, -4, -3, -3]])])
    ranked = torch.cat([scores.reshape(-1), torch.full((2,), 1e-30)])
    places = torch.nonzero(ranked).squeeze(1)
    kept = places[nms(apart[places], ranked[places], threshold)]
    left = torch.zeros_like(ranked).scatter(0, kept, ranked[kept])[:-2]
    best, chosen = left.reshape(scores.shape).topk(min(most, scores.shape[1]), dim=1)
    return best, chosen


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return rows of every picture, [B, R, D] of ``values`` [B, N, D] at ``rows`` int64 [B, R]."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def best_rows(rank: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the ``most`` best of ``rank`` [B, N], falling, and their rows; where there are fewer, -inf and row 0."""
    rank, rows = nnf.pad(rank, (0, most), value=-math.inf).topk(most, dim=1)
    return rank, torch.where(rank > -math.inf, rows, 0)


def anchors_at(rows: Tensor, cells: Tensor, features: list[Tensor], batch: Tensor) -> Tensor:
    """Return the anchors that torchvision's `AnchorGenerator` has at some rows.

    Args:
        rows: int64 [B, L, k], in each level's order.
        cells: Anchors around 0, float32 [L, A, 4].
        features: The maps of all levels, [B, C, H, W] each.
        batch: What they were made of.

    Returns:
        float32 [B, L, k, 4], xyxy in pixels of the batch.
    """
    shapes = [map_.shape[-2:] for map_ in features]
    widths = stack_numbers([width for _, width in shapes], torch.int64)[:, None]
    x_steps = stack_numbers([batch.shape[-1] // width for _, width in shapes], torch.int64)[:, None]
    y_steps = stack_numbers([batch.shape[-2] // height for height, _ in shapes], torch.int64)[:, None]
    num_cells = cells.shape[1]
    at = torch.div(rows, num_cells, rounding_mode="floor")
    y = torch.div(at, widths, rounding_mode="floor")
    x = (at - y * widths) * x_steps
    y = y * y_steps
    levels = torch.arange(len(features))[:, None] * num_cells
    return torch.stack([x, y, x, y], dim=-1) + cells.reshape(-1, 4)[rows - at * num_cells + levels]


class DetectorForm(nn.Module):
    """What the forms of all detectors share: the way into the batch, and from candidates to slots."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.to_batch = ToBatch(self.model.transform)

    def _fill_slots(self, boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, back: Tensor) -> Any:
        """Return boxes in pixels of the pictures [B, S, 4], labels [B, S], scores [B, S] and counts [B]."""
        boxes, labels, scores = fill_slots(self.model, boxes, scores, labels, num_classes)
        return boxes * back, labels, scores, (scores > 0).sum(dim=1)


def fill_slots(limits: Any, boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int) -> Any:
    """Return what is left of candidates as `keep_best` takes them, [B, S, 4], [B, S] and [B, S], 0 in empty slots.

    Args:
        limits: Has ``nms_thresh`` and ``detections_per_img``.
        boxes: float32 [B, K, 4], xyxy.
        scores: float32 [B, K].
        labels: int64 [B, K].
        num_classes: Background included.
    """
    scores, chosen = keep_best(boxes, scores, labels, num_classes, limits.nms_thresh, limits.detections_per_img)
    found = scores > 0
    return take_rows(boxes, chosen) * found[..., None], labels.gather(1, chosen) * found, scores


class PyramidForm(DetectorForm):
    """RetinaNet and FCOS: one head for the maps of all levels, any size of pictures."""

    cells: Tensor

    def __init__(self, model: RetinaNet | FCOS) -> None:
        super().__init__(model)
        self.register_buffer("cells", torch.stack(model.anchor_generator.cell_anchors))  # [L, A, 4]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes, labels, scores and counts for ``images``, float32 [B, 3, H, W] in 0..1."""
        model = self.model
        batch, sides, back = self.to_batch(images)
        features = list(model.backbone(batch).values())
        parts = [self._best_anchors(map_) for map_ in features]
        rows, scores, codes = (
            torch.stack(part, dim=1) for part in zip(*parts)
        )  # [B, L, k], [B, L, k, C], [B, L, k, 4]
        num_classes = scores.shape[-1]
        # The best of all classes at the level's best anchors.
        scores = torch.where(scores > model.score_thresh, scores, 0.0).flatten(2)
        scores, places = scores.topk(model.topk_candidates, dim=2)  # [B, L, k]
        which = torch.div(places, num_classes, rounding_mode="floor")
        labels = places - which * num_classes
        codes = codes.gather(2, which[..., None].expand(-1, -1, -1, 4)).reshape(-1, 4)
        anchors = anchors_at(rows.gather(2, which), self.cells, features, batch).reshape(-1, 4)
        coder = model.box_coder
        boxes = coder.decode(codes, anchors) if isinstance(model, FCOS) else coder.decode_single(codes, anchors)
        boxes = torch.minimum(boxes.clamp(min=0), sides).reshape(*labels.shape, 4).flatten(1, 2)
        return self._fill_slots(boxes, scores.flatten(1), labels.flatten(1), num_classes, back)

    def _best_anchors(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a level's anchors with the highest scores in any class: the best candidates are among these.

        A level with fewer than ``topk_candidates`` anchors has its first one again and again, with scores of 0.
        """
        outputs = self.model.head([features])
        logits, most = outputs["cls_logits"], self.model.topk_candidates
        rank = logits.max(dim=2).values
        if "bbox_ctrness" in outputs:
            rank = rank.sigmoid() * outputs["bbox_ctrness"].sigmoid()[..., 0]
        rank, rows = best_rows(rank, most)
        scores = take_rows(logits, rows).sigmoid()
        if "bbox_ctrness" in outputs:
            scores = torch.sqrt(scores * take_rows(outputs["bbox_ctrness"], rows).sigmoid())
        return rows, scores * (rank > -math.inf)[..., None], take_rows(outputs["bbox_regression"], rows)


class OneSizeForm(DetectorForm):
    """SSDs: every picture is resized to one size, so that their boxes are constants."""

    anchors: Tensor

    def __init__(self, model: SSD) -> None:
        super().__init__(model)
        width, height = model.transform.fixed_size
        with torch.no_grad():
            batch = torch.zeros(1, 3, height, width)
            features = list(model.backbone(batch).values())
            (anchors,) = model.anchor_generator(ImageList(batch, [(height, width)]), features)
        self.register_buffer("anchors", anchors)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes, labels, scores and counts for ``images``, float32 [B, 3, H, W] in 0..1."""
        model = self.model
        batch, sides, back = self.to_batch(images)
        outputs = model.head(list(model.backbone(batch).values()))
        codes, scores = outputs["bbox_regression"], outputs["cls_logits"].softmax(dim=-1)
        anchors = self.anchors.expand(codes.shape[0], -1, -1)
        boxes = model.box_coder.decode_single(codes.reshape(-1, 4), anchors.reshape(-1, 4))
        boxes = torch.minimum(boxes.clamp(min=0), sides).reshape(codes.shape)
        # The best of each class.
        by_class = scores[..., 1:].transpose(1, 2)
        by_class = torch.where(by_class > model.score_thresh, by_class, 0.0)
        best, rows = by_class.topk(min(model.topk_candidates, self.anchors.shape[0]), dim=2)  # [B, C - 1, k]
        num_classes = scores.shape[-1]
        labels = torch.arange(1, num_classes)[:, None].expand_as(best).flatten(1)
        return self._fill_slots(take_rows(boxes, rows.flatten(1)), best.flatten(1), labels, num_classes, back)
