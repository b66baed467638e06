"""Do results belong to other pictures than their ids say?"""

from dataclasses import dataclass

import numpy as np

from annotations.arrays import Annotations
from annotations.record_reader import Record
from pixels.geometry import xywh_to_xyxy

# So many pictures are looked at; each is compared with all of the ground truth.
MAX_PICTURES = 200

# Detections this far from their own picture's objects, and this near to another's, were made of that one.
FAR, NEAR = 0.2, 0.8


@dataclass(frozen=True)
class ForeignIds:
    """Results that fit another picture.

    Attributes:
        image_id: Id that the results have.
        fits: Position of the image that they fit.
        own: Mean IoU with the objects of the image that their id names, over all images looked at.
        other: Median over images of the mean IoU with the objects of the image that fits best.
    """

    image_id: int
    fits: int
    own: float
    other: float


def find_foreign_ids(annotations: Annotations, records: list[Record]) -> ForeignIds | None:
    """Return proof that the ids of results are not those of the ground truth, or None.

    Looks at pictures with two detections or more: a single box finds a likeness in any large dataset.

    Args:
        annotations: The ground truth.
        records: Results with ``bbox``, from `read_results`, of images of the ground truth.
    """
    position_of = {int(image_id): i for i, image_id in enumerate(annotations.image_ids)}
    of_image: dict[int, list[Record]] = {}
    for record in records:
        if "bbox" in record:
            of_image.setdefault(record["image_id"], []).append(record)
    counts = np.diff(annotations.object_starts)
    chosen = [k for k, found in of_image.items() if len(found) >= 2 and counts[position_of[k]] >= 2]
    if len(chosen) < 2:
        return None
    chosen = chosen[:: -(-len(chosen) // MAX_PICTURES)]
    truth, starts = xywh_to_xyxy(annotations.boxes_xywh), annotations.object_starts[:-1][counts > 0]
    images = np.flatnonzero(counts > 0)
    own, other, fits = [], [], []
    for image_id in chosen:
        best = sorted(of_image[image_id], key=lambda record: -record["score"])[: counts[position_of[image_id]]]
        boxes = xywh_to_xyxy(np.array([record["bbox"] for record in best], dtype=np.float64))
        classes = np.array([record["category_id"] for record in best])
        overlap = _iou(boxes, truth) * (classes[:, None] == annotations.category_ids[None])
        per_image = np.maximum.reduceat(overlap, starts, axis=1).mean(axis=0)
        here = int(np.searchsorted(images, position_of[image_id]))
        own.append(per_image[here])
        per_image[here] = 0
        fits.append(int(images[per_image.argmax()]))
        other.append(per_image.max())
    if np.mean(own) >= FAR or np.median(other) < NEAR:
        return None
    k = int(np.argmax(np.array(other) - np.array(own)))
    return ForeignIds(chosen[k], fits[k], float(np.mean(own)), float(np.median(other)))


def _iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of corner boxes [D, 4] and [G, 4]."""
    sides = np.minimum(boxes[:, None, 2:], truth[None, :, 2:]) - np.maximum(boxes[:, None, :2], truth[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None] + (truth[:, 2:] - truth[:, :2]).prod(axis=1)[None]
    return shared / np.maximum(areas - shared, 1e-9)
