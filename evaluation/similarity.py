"""How alike detections and objects are: IoU of boxes and masks, OKS of keypoints, with pycocotools' own doubles."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pycocotools import mask as mask_util

from pixels.masks import MaskBlock


def box_iou(boxes_xywh: np.ndarray, truth_xywh: np.ndarray, truth_crowd: np.ndarray) -> np.ndarray:
    """Return IoU, float64 [D, G]; with a crowd it is the share of the detection that lies inside.

    Args:
        boxes_xywh: float64 [D, 4].
        truth_xywh: float64 [G, 4].
        truth_crowd: bool [G].
    """
    if not len(boxes_xywh) or not len(truth_xywh):
        return np.zeros((len(boxes_xywh), len(truth_xywh)))
    detected, truth = np.ascontiguousarray(boxes_xywh), np.ascontiguousarray(truth_xywh)
    return mask_util.iou(detected, truth, truth_crowd.astype(np.uint8))


class BlockMasks:
    """Masks of one image as blocks, compared pixel by pixel.

    IoU of masks is an integer over an integer, so counting pixels inside the blocks gives the double that
    pycocotools gets from run lengths.

    Attributes:
        areas: float64 [N], numbers of pixels.
        windows: float64 [N, 4] xywh, outside of which a mask is empty.
    """

    def __init__(self, blocks: Sequence[MaskBlock]) -> None:
        self.blocks = blocks
        self.areas = np.array([np.count_nonzero(block.pixels) for block in blocks], dtype=np.float64)
        rows = [(b.left, b.top, b.pixels.shape[1], b.pixels.shape[0]) for b in blocks]
        self.windows = np.array(rows, dtype=np.float64).reshape(-1, 4)

    def iou(self, rows: np.ndarray, truth: "BlockMasks", columns: np.ndarray, crowd: np.ndarray) -> np.ndarray:
        """Return the IoU of pairs, float64: mask ``rows[i]`` with mask ``columns[i]`` of ``truth``."""
        pairs = zip(rows.tolist(), columns.tolist())
        common = np.array([_common_pixels(self.blocks[d], truth.blocks[g]) for d, g in pairs], dtype=np.float64)
        areas = self.areas[rows]
        return common / np.where(crowd[columns], areas, areas + truth.areas[columns] - common)


class RleMasks:
    """Masks of one image as COCO's run lengths, compared by pycocotools.

    Args:
        rles: N masks.
        size: (height, width) of the image.

    Raises:
        ValueError: A mask is that of an image of another size.
    """

    def __init__(self, rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> None:
        for rle in rles:
            if tuple(rle["size"]) != size:
                raise ValueError(f"a mask of size {list(rle['size'])} for an image of {list(size)} (height, width)")
        self.rles = list(rles)
        self.areas = mask_util.area(self.rles).astype(np.float64) if self.rles else np.zeros(0)
        self.windows = mask_util.toBbox(self.rles) if self.rles else np.zeros((0, 4))

    def iou(self, rows: np.ndarray, truth: "RleMasks", columns: np.ndarray, crowd: np.ndarray) -> np.ndarray:
        """Return the IoU of pairs, float64: mask ``rows[i]`` with mask ``columns[i]`` of ``truth``."""
        detected, row = np.unique(rows, return_inverse=True)
        objects, column = np.unique(columns, return_inverse=True)
        truth_rles = [truth.rles[g] for g in objects]
        iou = mask_util.iou([self.rles[d] for d in detected], truth_rles, crowd[objects].astype(np.uint8))
        return iou[row, column]


Masks = TypeVar("Masks", BlockMasks, RleMasks)


def mask_iou(masks: Masks, truth: Masks, same: np.ndarray, crowd: np.ndarray, lowest: float) -> np.ndarray:
    """Return IoU of masks, float64 [D, G]; -1 where classes differ or ``lowest`` cannot be reached.

    What two windows have in common bounds what the masks have in common, and so their IoU.

    Args:
        masks: D detected ones.
        truth: G of the objects, in the same form.
        same: bool [D, G], whether classes agree.
        crowd: bool [G].
        lowest: Smallest IoU of interest.
    """
    similarity = np.full(same.shape, -1.0)
    rows, columns = np.nonzero(same)
    if not len(rows):
        return similarity
    low = np.maximum(masks.windows[rows, :2], truth.windows[columns, :2])
    ends, truth_ends = masks.windows[:, :2] + masks.windows[:, 2:], truth.windows[:, :2] + truth.windows[:, 2:]
    shared = (np.minimum(ends[rows], truth_ends[columns]) - low).clip(min=0).prod(axis=1)
    areas, truth_areas = masks.areas[rows], truth.areas[columns]
    bound = np.minimum(shared, np.minimum(areas, truth_areas))
    union = np.where(crowd[columns], areas, areas + truth_areas - bound)
    possible = (bound > 0) & (bound / np.maximum(union, 1) >= lowest)
    rows, columns = rows[possible], columns[possible]
    if len(rows):
        similarity[rows, columns] = masks.iou(rows, truth, columns, crowd)
    return similarity


def _common_pixels(a: MaskBlock, b: MaskBlock) -> int:
    """Return the number of pixels that are set in both blocks."""
    left, right = max(a.left, b.left), min(a.left + a.pixels.shape[1], b.left + b.pixels.shape[1])
    top, bottom = max(a.top, b.top), min(a.top + a.pixels.shape[0], b.top + b.pixels.shape[0])
    part_a = a.pixels[top - a.top : bottom - a.top, left - a.left : right - a.left]
    part_b = b.pixels[top - b.top : bottom - b.top, left - b.left : right - b.left]
    return int(np.count_nonzero(np.logical_and(part_a, part_b)))


def object_keypoint_similarity(
    points: np.ndarray, truth: np.ndarray, truth_box_xywh: np.ndarray, area: float, sigmas: np.ndarray
) -> np.ndarray:
    """Return the OKS of detections with one object, float64 [D]; the arithmetic of ``COCOeval.computeOks``.

    An object without labelled points is compared by distance to its doubled box; it is to be ignored anyway.

    Args:
        points: float64 [D, K, 3] detected; their third number is not read.
        truth: float64 [K, 3] of the object.
        truth_box_xywh: float64 [4] of the object.
        area: Area of the object in square pixels, see ``oks_area`` of `CocoEvaluator`.
        sigmas: float64 [K].
    """
    x, y, labelled = points[:, :, 0], points[:, :, 1], truth[:, 2] > 0
    if labelled.any():
        dx, dy = x - truth[:, 0], y - truth[:, 1]
    else:
        left, top, width, height = truth_box_xywh
        dx = np.maximum(0, (left - width) - x) + np.maximum(0, x - (left + width * 2))
        dy = np.maximum(0, (top - height) - y) + np.maximum(0, y - (top + height * 2))
    e = (dx**2 + dy**2) / (sigmas * 2) ** 2 / (area + np.spacing(1)) / 2
    if labelled.any():
        e = np.ascontiguousarray(e[:, labelled])
    return np.sum(np.exp(-e), axis=1) / e.shape[1]


def keypoint_extent(points: np.ndarray) -> np.ndarray:
    """Return the area of the box around each detection's points, float64 [D]: pycocotools' area of a detection."""
    if not len(points):
        return np.zeros(0)
    extent = points[:, :, :2].max(axis=1) - points[:, :, :2].min(axis=1)
    return extent[:, 0] * extent[:, 1]
