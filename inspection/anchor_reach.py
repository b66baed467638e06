"""How well the anchors of a model cover the boxes of a dataset, without images and without a step of training.

The anchors come from the built model's own generator. All anchors of one shape on one feature map lie on a regular
grid, and the one whose centre is nearest to a box's overlaps it most; so the best IoU of every box is found exactly
without forming the millions of pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from models.anchors import anchor_owner
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
class _Map:
    """Where the anchors of one feature map stand: centres ``xs`` x ``ys``, float64, a regular grid."""

    xs: np.ndarray
    ys: np.ndarray


class AnchorGrids:
    """The anchors of a model on pictures of any size; what was once worked out is kept.

    Args:
        model: One of torchvision's detectors; weights are not read, `build_skeleton_model` will do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.owner = model, anchor_owner(model)
        self.transform: Any = model.get_submodule("transform")
        # FCOS has points instead of anchors.
        self.radius: float | None = getattr(model, "center_sampling_radius", None)
        self._known: dict[tuple[int, int], list[_Map]] = {}

    def maps(self, height: int, width: int) -> list[_Map]:
        """Return where the anchors stand on a picture of this size, for every feature map."""
        if (height, width) not in self._known:
            self._known[height, width] = self._build_maps(height, width)
        return self._known[height, width]

    def _build_maps(self, height: int, width: int) -> list[_Map]:
        generator = self.owner.anchor_generator
        image = torch.empty((1, 3, height, width), device=next(self.model.parameters()).device)
        with torch.no_grad():
            features = self.model.get_submodule("backbone")(image)
        shapes = [map_.shape[-2:] for map_ in ([features] if isinstance(features, torch.Tensor) else features.values())]
        anchors = _generate(generator, height, width, shapes)
        maps, start = [], 0
        for (rows, columns), count in zip(shapes, generator.num_anchors_per_location()):
            end = start + rows * columns * count
            first = anchors[start:end].reshape(rows, columns, count, 4)[:, :, 0]
            maps.append(_Map(first[0, :, 0::2].mean(axis=1), first[:, 0, 1::2].mean(axis=1)))
            start = end
        assert start == len(anchors)
        return maps

    def shapes(self, generator: Any = None) -> list[np.ndarray]:
        """Return (width, height) of the anchors at a place of every feature map, float64 [A, 2] each.

        Args:
            generator: Anchors that the model might have instead of its own.
        """
        generator = generator or self.owner.anchor_generator
        width, height = self.transform.fixed_size or (1, 1)  # on which the size of anchors depends only if it is fixed
        counts = generator.num_anchors_per_location()
        anchors = _generate(generator, height, width, [(1, 1)] * len(counts))
        return np.split(anchors[:, 2:] - anchors[:, :2], np.cumsum(counts)[:-1])


def _generate(generator: Any, height: int, width: int, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """Let a generator make the anchors of one image size on maps of these (rows, columns); float64 [N, 4] xyxy."""
    # It reads only shape and type of image and maps: one number, seen as a whole map.
    image, *maps = (torch.zeros(()).expand(1, 1, *shape) for shape in [(height, width), *shapes])
    return generator(ImageList(image, [(height, width)]), maps)[0].double().numpy()


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


def reach_of_anchors(grids: AnchorGrids, objects: ObjectSizes) -> AnchorReach:
    """Compare every box with the anchors on its image.

    Args:
        grids: The model's anchors.
        objects: Boxes after the model's resize, from `resize_objects`.
    """
    stride = np.inf
    sizes = padded_sizes(grids, objects)
    for height, width in np.unique(sizes, axis=0).tolist():
        axes = [axis for map_ in grids.maps(height, width) for axis in (map_.xs, map_.ys)]
        stride = min(stride, *(axis[1] - axis[0] for axis in axes if len(axis) > 1))
    stride = round(stride, 3)
    if grids.radius is not None:
        return AnchorReach(_has_fcos_location(grids, objects.boxes, sizes), 1.0, 1.0, stride)
    best = best_iou(objects.boxes, distances_to_anchors(grids, objects), grids.shapes())
    matcher = grids.owner.proposal_matcher
    return AnchorReach(best, float(matcher.high_threshold), float(matcher.low_threshold), stride)


def padded_sizes(grids: AnchorGrids, objects: ObjectSizes) -> np.ndarray:
    """Return (height, width) of every object's image as the backbone sees it, int64 [N, 2]."""
    divisor = grids.transform.size_divisible
    return np.stack([-(-side // divisor) * divisor for side in (objects.heights, objects.widths)], axis=1)


def _images_of_one_size(sizes: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (height, width, int64 positions of the objects on such images)."""
    of_size, group = np.unique(sizes, axis=0, return_inverse=True)
    for k, (height, width) in enumerate(of_size.tolist()):
        yield height, width, np.flatnonzero(group.reshape(-1) == k)


def distances_to_anchors(grids: AnchorGrids, objects: ObjectSizes) -> np.ndarray:
    """Return how far each box's centre is from the nearest anchor's on every map, float64 [maps, N, 2] of x and y."""
    centres = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2
    num_maps = len(grids.owner.anchor_generator.num_anchors_per_location())
    distances = np.zeros((num_maps, *centres.shape))
    for height, width, members in _images_of_one_size(padded_sizes(grids, objects)):
        for level, map_ in enumerate(grids.maps(height, width)):
            for axis, points in enumerate((map_.xs, map_.ys)):
                of_axis = centres[members, axis]
                distances[level, members, axis] = np.abs(of_axis - points[_nearest(points, of_axis)])
    return distances


def best_iou(boxes: np.ndarray, distances: np.ndarray, shapes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the highest IoU of every box with any anchor, float64 [N].

    Args:
        boxes: float64 [N, 4] xyxy.
        distances: float64 [maps, N, 2], from `distances_to_anchors`.
        shapes: (width, height) of the anchors at a place of every map, float64 [A, 2] each.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides[:, 0] * sides[:, 1]
    best = np.zeros(len(boxes))
    for of_map, distance in zip(shapes, distances):
        for shape in of_map:
            low, high = np.maximum(-sides / 2, distance - shape / 2), np.minimum(sides / 2, distance + shape / 2)
            overlap = (high - low).clip(0).prod(axis=1)
            np.maximum(best, overlap / (areas + shape[0] * shape[1] - overlap), out=best)
    return best


def _nearest(points: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of regular ``points`` for every position, int64."""
    step = points[1] - points[0] if len(points) > 1 else 1.0
    return np.rint((positions - points[0]) / step).clip(0, len(points) - 1).astype(np.int64)


def _has_fcos_location(grids: AnchorGrids, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Tell for every box whether FCOS trains a location on it; 1 or 0, float64 [N].

    The rules of torchvision's ``FCOS.compute_loss``: the location lies inside the box and within ``radius``
    strides of its centre, and the farthest side is 4 to 8 strides away, any less on the first level and any
    more on the last. Boxes that share a location are not told apart.
    """
    found = np.zeros(len(boxes))
    for height, width, members in _images_of_one_size(sizes):
        found[members] = _has_location_on(grids, boxes[members], grids.maps(height, width))
    return found


def _has_location_on(grids: AnchorGrids, boxes: np.ndarray, maps: list[_Map]) -> np.ndarray:
    """Tell which boxes have a location on images of one size; bool [N]."""
    found = np.zeros(len(boxes), dtype=bool)
    near = np.arange(-FCOS_NEIGHBOURS, FCOS_NEIGHBOURS + 1)
    for level, (map_, shapes) in enumerate(zip(maps, grids.shapes())):
        side = shapes[0, 0]  # of its only anchor, a square
        sides, is_near = [], []
        for axis, points in ((0, map_.xs), (1, map_.ys)):
            centre = (boxes[:, axis] + boxes[:, axis + 2]) / 2
            index = _nearest(points, centre)[:, None] + near
            position = points[index.clip(0, len(points) - 1)]  # [N, 5]
            sides.append(np.stack([position - boxes[:, axis, None], boxes[:, axis + 2, None] - position], axis=-1))
            is_near.append(np.abs(position - centre[:, None]) < grids.radius * side)
        (x_sides, y_sides), (x_near, y_near) = sides, is_near
        inside = np.minimum(x_sides.min(axis=-1)[:, None], y_sides.min(axis=-1)[:, :, None]) > 0
        farthest = np.maximum(x_sides.max(axis=-1)[:, None], y_sides.max(axis=-1)[:, :, None])
        in_range = farthest > (0 if level == 0 else 4 * side)
        if level != len(maps) - 1:
            in_range &= farthest < 8 * side
        found |= (inside & in_range & x_near[:, None] & y_near[:, :, None]).any(axis=(1, 2))
    return found
