"""How alike detections and objects are: IoU of boxes and masks, OKS of keypoints, with pycocotools' own doubles."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_util

from masks import MaskBlock


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


def mask_iou(
    blocks: Sequence[MaskBlock],
    areas: np.ndarray,
    truth: MaskBlock,
    truth_crowd: bool,
    lowest: float,
) -> np.ndarray:
    """Return the IoU of masks with one object, float64 [D]; what cannot reach ``lowest`` is left at -1.

    IoU of masks is an integer over an integer, so counting pixels inside the blocks gives the double that
    pycocotools gets from run lengths. A pair is counted out only where windows and areas leave it a chance.

    Args:
        blocks: D masks.
        areas: float64 [D], their numbers of pixels.
        truth: The object's mask.
        truth_crowd: Whether it is a crowd.
        lowest: Smallest IoU of interest.
    """
    truth_area = float(np.count_nonzero(truth.pixels))
    similarity = np.full(len(blocks), -1.0)
    for d, block in enumerate(blocks):
        bound = min(_window_overlap(block, truth), areas[d], truth_area)
        if bound == 0:
            similarity[d] = 0.0
        elif bound / (areas[d] if truth_crowd else areas[d] + truth_area - bound) >= lowest:
            both = float(_common_pixels(block, truth))
            similarity[d] = both / (areas[d] if truth_crowd else areas[d] + truth_area - both)
    return similarity


def _window_overlap(a: MaskBlock, b: MaskBlock) -> float:
    """Return the number of pixels that two blocks' windows share."""
    width = min(a.left + a.pixels.shape[1], b.left + b.pixels.shape[1]) - max(a.left, b.left)
    height = min(a.top + a.pixels.shape[0], b.top + b.pixels.shape[0]) - max(a.top, b.top)
    return float(max(width, 0) * max(height, 0))


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
        area: Of the object.
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
