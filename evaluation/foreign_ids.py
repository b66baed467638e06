"""Do results belong to other pictures or categories than their ids say, or are their boxes in another form or scale?

Figures near 0 have such causes more often than a detector that finds nothing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from annotations.arrays import Annotations
from annotations.record_reader import Record
from pixels.geometry import xywh_to_xyxy

# So many pictures are looked at; each is compared with all of the ground truth.
MAX_PICTURES = 200

# Detections this far from their own picture's objects, and this near to another's, were made of that one.
FAR, NEAR = 0.2, 0.8

# From so many detections on objects a category is told; above this IoU a detection lies on an object.
MIN_PAIRS, ON_OBJECT = 10, 0.7

# Other forms of boxes, from [N, 4] and (width, height) of the picture to xyxy in pixels.
_FORMS = {
    "[x1, y1, x2, y2]": lambda b, size: b,
    "[x, y, width, height] with x and y of the centre": lambda b, size: _from_centre(b),
    "[y, x, height, width]": lambda b, size: xywh_to_xyxy(b[:, [1, 0, 3, 2]]),
    "[x, y, width, height] as shares of the picture": lambda b, size: xywh_to_xyxy(b * size),
    "[x1, y1, x2, y2] as shares of the picture": lambda b, size: b * size,
    "YOLO's shares of the picture, x and y of the centre": lambda b, size: _from_centre(b * size),
}


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
    of_image: dict[int, list[Record]] = {}
    for record in records:
        if "bbox" in record:
            of_image.setdefault(record["image_id"], []).append(record)
    counts = np.diff(annotations.object_starts)
    chosen = [k for k, found in of_image.items() if len(found) >= 2 and counts[annotations.position_of[k]] >= 2]
    if len(chosen) < 2:
        return None
    chosen = chosen[:: -(-len(chosen) // MAX_PICTURES)]
    truth, starts = xywh_to_xyxy(annotations.boxes_xywh), annotations.object_starts[:-1][counts > 0]
    images = np.flatnonzero(counts > 0)
    own, other, fits = [], [], []
    for image_id in chosen:
        i = annotations.position_of[image_id]
        best = sorted(of_image[image_id], key=lambda record: -record["score"])[: counts[i]]
        boxes = xywh_to_xyxy(np.array([record["bbox"] for record in best], dtype=np.float64))
        classes = np.array([record["category_id"] for record in best])
        overlap = _iou(boxes, truth) * (classes[:, None] == annotations.category_ids[None])
        per_image = np.maximum.reduceat(overlap, starts, axis=1).mean(axis=0)
        here = int(np.searchsorted(images, i))
        own.append(per_image[here])
        per_image[here] = 0
        fits.append(int(images[per_image.argmax()]))
        other.append(per_image.max())
    if np.mean(own) >= FAR or np.median(other) < NEAR:
        return None
    k = int(np.argmax(np.array(other) - np.array(own)))
    return ForeignIds(chosen[k], fits[k], float(np.mean(own)), float(np.median(other)))


def _pictures(annotations: Annotations, records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    """Yield (position, best detections, as many as it has objects) of up to `MAX_PICTURES` pictures with both."""
    counts = np.diff(annotations.object_starts)
    of_image: dict[int, list[Record]] = {}
    for record in records:
        i = annotations.position_of[record["image_id"]]
        if "bbox" in record and counts[i]:
            of_image.setdefault(i, []).append(record)
    for i in list(of_image)[:: -(-len(of_image) // MAX_PICTURES) or 1]:
        yield i, sorted(of_image[i], key=lambda record: -record["score"])[: counts[i]]


def find_shifted_categories(annotations: Annotations, records: Sequence[Record]) -> dict[int, int] | None:
    """Return {category id of results: that of the objects they lie on} where these differ throughout, else None.

    Args:
        annotations: The ground truth.
        records: Results, from `read_results`, of images of the ground truth.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    for i, best in _pictures(annotations, records):
        objects = annotations.objects(i)
        boxes = xywh_to_xyxy(np.array([record["bbox"] for record in best], dtype=np.float64))
        overlap = _iou(boxes, xywh_to_xyxy(annotations.boxes_xywh[objects]))
        found = annotations.category_ids[objects][overlap.argmax(axis=1)].tolist()
        for record, category, iou in zip(best, found, overlap.max(axis=1).tolist()):
            if iou >= ON_OBJECT:
                pairs[record["category_id"], category] += 1
    total, own = pairs.total(), sum(count for (given, found), count in pairs.items() if given == found)
    usual: dict[int, tuple[int, int]] = {}
    for (given, category), count in pairs.items():
        usual[given] = max(usual.get(given, (0, 0)), (count, category))
    if total < MIN_PAIRS or own >= FAR * total or sum(count for count, _ in usual.values()) < NEAR * total:
        return None
    return {given: category for given, (_, category) in sorted(usual.items())}


def find_other_form(annotations: Annotations, records: Sequence[Record]) -> str | None:
    """Return the form of box in which the results fit their pictures' objects, where that is not COCO's, else None.

    Forms are those of `_FORMS`, and boxes on resized pictures (`_fit_resize`).

    Args:
        annotations: The ground truth.
        records: Results, from `read_results`, of images of the ground truth.
    """
    ious: dict[str, list[float]] = {name: [] for name in ("", *_FORMS)}
    pictures: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for i, best in _pictures(annotations, records):
        truth = xywh_to_xyxy(annotations.boxes_xywh[annotations.objects(i)])
        boxes = np.array([record["bbox"] for record in best], dtype=np.float64)
        size = np.array([annotations.widths[i], annotations.heights[i]] * 2, dtype=np.float64)
        pictures.append((boxes, truth, size[:2]))
        ious[""] += _iou(xywh_to_xyxy(boxes), truth).max(axis=1).tolist()
        for name, convert in _FORMS.items():
            ious[name] += _iou(convert(boxes, size), truth).max(axis=1).tolist()
    if len(ious[""]) < MIN_PAIRS:
        return None
    means = {name: float(np.mean(values)) for name, values in ious.items()}
    own, best_form = means.pop(""), max(means, key=means.__getitem__)
    if means[best_form] >= NEAR and means[best_form] > 1.5 * own:
        return best_form
    for form in ("[x, y, width, height]", "[x1, y1, x2, y2]"):
        as_corners = [(xywh_to_xyxy(b) if "width" in form else b, truth, size) for b, truth, size in pictures]
        resize, iou = _fit_resize(as_corners)
        if iou >= NEAR and iou > 1.5 * own:
            return f"{form} in pixels of resized pictures ({resize})"
    return None


def _fit_resize(pictures: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[str, float]:
    """Return (the simplest resize of pictures that explains boxes well, else the best; the mean IoU that it leads to).

    Its size follows from the sides of boxes and objects: the median over pictures, so that few wrong boxes do no harm.

    Args:
        pictures: (boxes, objects, both as corners [N, 4]; (width, height)) of each.
    """
    sizes = np.array([size for _, _, size in pictures])
    sides = [[(b[:, 2:] - b[:, :2]).sum(axis=0) for b in (boxes, truth)] for boxes, truth, _ in pictures]
    ratios = np.array([found / np.maximum(true, 1e-9) for found, true in sides])  # [P, 2], of width and height
    ratio, shorter, longer = np.sqrt(np.abs(ratios).prod(axis=1)), sizes.min(axis=1), sizes.max(axis=1)
    factor, side, edge = np.median(ratio), _whole(ratio * shorter), _whole(ratio * longer)
    width, height = (_whole(ratios[:, k] * sizes[:, k]) for k in (0, 1))
    ones, none = np.ones_like(sizes), np.zeros_like(sizes)
    fitted = edge / longer[:, None] * ones
    rules = {
        f"about {factor:.2g} times as large": (factor * ones, none),
        f"their longer side {edge} pixels": (fitted, none),
        f"their shorter side {side} pixels": (side / shorter[:, None] * ones, none),
        f"{width} x {height} pixels": (np.array([width, height]) / sizes, none),
        f"in the middle of {edge} x {edge} pixels": (fitted, (edge - sizes * fitted) / 2),
    }
    best, best_iou = "", 0.0
    for name, (factors, offsets) in rules.items():
        ious: list[float] = []
        for (boxes, truth, _), by, offset in zip(pictures, factors, offsets):
            ious += _iou((boxes - np.tile(offset, 2)) / np.tile(np.maximum(by, 1e-9), 2), truth).max(axis=1).tolist()
        iou = float(np.mean(ious))
        if iou > best_iou + 0.02:
            best, best_iou = name, iou
    return best, best_iou


def _whole(values: np.ndarray) -> int:
    """Return the median of some sides in pixels, the next multiple of 32, as sizes mostly are, where that is near."""
    value = float(np.median(values))
    multiple = 32 * round(value / 32)
    return int(multiple if abs(multiple - value) <= 0.02 * value else round(value))


def _from_centre(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] of centre, width and height as corners."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of corner boxes [D, 4] and [G, 4]."""
    sides = np.minimum(boxes[:, None, 2:], truth[None, :, 2:]) - np.maximum(boxes[:, None, :2], truth[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None] + (truth[:, 2:] - truth[:, :2]).prod(axis=1)[None]
    return shared / np.maximum(areas - shared, 1e-9)
