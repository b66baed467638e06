"""How well the anchors of a model cover the boxes of a dataset, without images and without a step of training.

The anchors come from the built model's own generator. All anchors of one shape on one feature map lie on a regular
grid, and the one whose centre is nearest to a box's overlaps it most; so the best IoU of every box is found exactly
without forming the millions of pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from models.architectures import ModelSpec, build_model

# Grid points on each side of the nearest one that FCOS may train on a box: its radius is 1.5 strides.
FCOS_NEIGHBOURS = 2


@dataclass(frozen=True)
class ObjectSizes:
    """Boxes as the model sees them.

    Attributes:
        boxes: float64 [N, 4] xyxy in pixels after the model's resize.
        heights: int64 [N], of the object's resized image.
        widths: int64 [N].
    """

    boxes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray


@dataclass(frozen=True)
class AnchorReach:
    """What the anchors of a model do for the boxes of a dataset.

    Attributes:
        best: float64 [N], IoU of each box with its best anchor; for FCOS 1 where a location is trained on the
            box and 0 where none is.
        wanted: IoU from which on every anchor is trained on the box.
        least: IoU below which an anchor is background for the box, unless it is the box's best one.
        stride: Pixels between neighbouring cells of the finest feature map.
    """

    best: np.ndarray
    wanted: float
    least: float
    stride: float


@dataclass(frozen=True)
class _Grid:
    """Anchors of one shape on one feature map: centres ``xs`` x ``ys``, float64, and their width and height."""

    level: int
    xs: np.ndarray
    ys: np.ndarray
    width: float
    height: float


def build_skeleton_model(spec: ModelSpec) -> nn.Module:
    """Build a model without weights in memory: shapes and anchors are right, tensors hold no numbers."""
    with torch.device("meta"):
        return build_model(spec).eval()


def resize_objects(model: nn.Module, boxes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> ObjectSizes:
    """Do for boxes what the model's own transform does in evaluation.

    Args:
        model: One of torchvision's detectors.
        boxes: float [N, 4] xyxy.
        heights: int [N], of each box's image.
        widths: int [N].
    """
    transform: Any = model.get_submodule("transform")
    if transform.fixed_size is not None:
        new_widths, new_heights = (np.full(len(boxes), side) for side in transform.fixed_size)
    else:
        short, long = np.minimum(heights, widths), np.maximum(heights, widths)
        scale = np.minimum(transform.min_size[-1] / short, transform.max_size / long)
        new_heights, new_widths = np.floor(heights * scale), np.floor(widths * scale)
    ratios = np.stack([new_widths / widths, new_heights / heights] * 2, axis=1)
    return ObjectSizes(boxes * ratios, new_heights.astype(np.int64), new_widths.astype(np.int64))


def reach_of_anchors(model: nn.Module, objects: ObjectSizes) -> AnchorReach:
    """Compare every box with the anchors on its image.

    Args:
        model: Gives the anchors; weights are not read, `build_skeleton_model` will do.
        objects: Boxes after the model's resize, from `resize_objects`.
    """
    divisor = model.get_submodule("transform").size_divisible
    padded = np.stack([-(-side // divisor) * divisor for side in (objects.heights, objects.widths)], axis=1)
    radius: Any = getattr(model, "center_sampling_radius", None)  # of FCOS, which has points instead of anchors
    best = np.zeros(len(objects.boxes))
    stride = np.inf
    sizes, group = np.unique(padded, axis=0, return_inverse=True)
    for k, (height, width) in enumerate(sizes.tolist()):
        grids = list(_anchor_grids(model, height, width))
        members = np.flatnonzero(group.reshape(-1) == k)
        boxes = objects.boxes[members]
        if radius is not None:
            best[members] = _has_fcos_location(boxes, grids, radius)
        else:
            best[members] = _best_iou(boxes, grids)
        stride = min(stride, *(axis[1] - axis[0] for g in grids for axis in (g.xs, g.ys) if len(axis) > 1))
    stride = round(stride, 3)
    if radius is not None:
        return AnchorReach(best, 1.0, 1.0, stride)
    matcher = _anchor_owner(model).proposal_matcher
    return AnchorReach(best, float(matcher.high_threshold), float(matcher.low_threshold), stride)


def _anchor_owner(model: nn.Module) -> Any:
    """Return the part of a detector that has the anchors and their matcher."""
    return model.get_submodule("rpn") if hasattr(model, "rpn") else model


def _anchor_grids(model: nn.Module, height: int, width: int) -> Iterator[_Grid]:
    """Let the model's generator make the anchors of one image size, and sort them into grids."""
    generator = _anchor_owner(model).anchor_generator
    device = next(model.parameters()).device
    image = torch.empty((1, 3, height, width), device=device)
    with torch.no_grad():
        features = model.get_submodule("backbone")(image)
    maps = [features] if isinstance(features, torch.Tensor) else list(features.values())
    # The generator reads only shape and type of the maps: one number, seen as a whole map.
    maps = [torch.zeros(()).expand(feature.shape) for feature in maps]
    anchors = generator(ImageList(image, [(height, width)]), maps)[0].double().numpy()
    start = 0
    for level, (feature, count) in enumerate(zip(maps, generator.num_anchors_per_location())):
        rows, columns = feature.shape[-2:]
        end = start + rows * columns * count
        of_level = anchors[start:end].reshape(rows, columns, count, 4)
        start = end
        for k in range(count):
            of_shape = of_level[:, :, k]
            first = of_shape[0, 0]
            xs, ys = of_shape[0, :, 0::2].mean(axis=1), of_shape[:, 0, 1::2].mean(axis=1)
            yield _Grid(level, xs, ys, first[2] - first[0], first[3] - first[1])
    assert start == len(anchors)


def _nearest(points: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of regular ``points`` for every position, int64."""
    step = points[1] - points[0] if len(points) > 1 else 1.0
    return np.rint((positions - points[0]) / step).clip(0, len(points) - 1).astype(np.int64)


def _best_iou(boxes: np.ndarray, grids: list[_Grid]) -> np.ndarray:
    """Return the highest IoU of every box with any anchor, float64 [N]."""
    best = np.zeros(len(boxes))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for grid in grids:
        overlap = np.ones(len(boxes))
        for axis, points, side in ((0, grid.xs, grid.width), (1, grid.ys, grid.height)):
            low, high = boxes[:, axis], boxes[:, axis + 2]
            centre = points[_nearest(points, (low + high) / 2)]
            overlap *= (np.minimum(high, centre + side / 2) - np.maximum(low, centre - side / 2)).clip(0)
        np.maximum(best, overlap / (areas + grid.width * grid.height - overlap), out=best)
    return best


def _has_fcos_location(boxes: np.ndarray, grids: list[_Grid], radius: float) -> np.ndarray:
    """Tell for every box whether FCOS trains a location on it; bool [N].

    The rules of torchvision's ``FCOS.compute_loss``: the location lies inside the box and within ``radius``
    strides of its centre, and the farthest side is 4 to 8 strides away, any less on the first level and any
    more on the last. Boxes that share a location are not told apart.
    """
    found = np.zeros(len(boxes), dtype=bool)
    near = np.arange(-FCOS_NEIGHBOURS, FCOS_NEIGHBOURS + 1)
    last = max(grid.level for grid in grids)
    for grid in grids:
        sides, is_near = [], []
        for axis, points in ((0, grid.xs), (1, grid.ys)):
            centre = (boxes[:, axis] + boxes[:, axis + 2]) / 2
            index = _nearest(points, centre)[:, None] + near
            position = points[index.clip(0, len(points) - 1)]  # [N, 5]
            sides.append(np.stack([position - boxes[:, axis, None], boxes[:, axis + 2, None] - position], axis=-1))
            is_near.append(np.abs(position - centre[:, None]) < radius * grid.width)
        (x_sides, y_sides), (x_near, y_near) = sides, is_near
        inside = np.minimum(x_sides.min(axis=-1)[:, None], y_sides.min(axis=-1)[:, :, None]) > 0
        farthest = np.maximum(x_sides.max(axis=-1)[:, None], y_sides.max(axis=-1)[:, :, None])
        in_range = farthest > (0 if grid.level == 0 else 4 * grid.width)
        if grid.level != last:
            in_range &= farthest < 8 * grid.width
        found |= (inside & in_range & x_near[:, None] & y_near[:, :, None]).any(axis=(1, 2))
    return found
