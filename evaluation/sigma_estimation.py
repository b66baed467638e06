"""OKS sigmas from repeated annotations, and what a sigma means on a dataset."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from coco_utils import read_coco, read_json
from evaluation.similarity import box_iou
from pixels.geometry import xyxy_to_xywh
from pixels.image_files import list_folder
from utils import seeded_numpy_rng

# Below so many objects an estimate says little: its standard error is 7 % at 50 objects annotated twice.
FEW_OBJECTS = 50
BOOTSTRAPS = 1000

# Pixels are given for these OKS thresholds.
CARD_THRESHOLDS = (0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Annotator:
    """One person's annotations.

    Attributes:
        images: Per image, by its path without suffix, (boxes float64 [N, 4] xywh, keypoints float64 [N, K, 3]).
        names: K keypoint names, or empty.
    """

    images: dict[str, tuple[np.ndarray, np.ndarray]]
    names: tuple[str, ...] = ()


def read_annotator(path: Path) -> Annotator:
    """Read a COCO json, or a folder (to any depth) with one json per image, or with such a folder ``annotations``.

    Raises:
        FileNotFoundError: There is nothing to read.
        ValueError: An entry is malformed, two have one name, or there are no keypoints.
    """
    images: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(name: str, boxes_xywh: np.ndarray, points: np.ndarray) -> None:
        key = str(PurePosixPath(name).with_suffix(""))
        if key in images:
            raise ValueError(f"{path}: two entries are of one image, {key}, or of two that differ by their suffix only")
        images[key] = boxes_xywh, points

    names: tuple[str, ...] = ()
    if path.is_file():
        annotations = read_coco(path, uses=["keypoints"])
        names = annotations.keypoint_names
        for i in range(len(annotations)):
            objects = annotations.objects(i)
            add(annotations.file_name(i), annotations.boxes_xywh[objects], annotations.keypoints[objects])
    else:
        folder = path / "annotations" if (path / "annotations").is_dir() else path
        names_of_files = [name for name in list_folder(folder).files if name.lower().endswith(".json")]
        if not names_of_files:
            raise FileNotFoundError(f"{path}: neither a COCO json nor a folder with one json per image")
        for name in names_of_files:
            content = read_json(folder / name)
            try:
                boxes = np.array(content["bboxes"], dtype=np.float64).reshape(-1, 4)
                of_boxes = content["keypoints"] if len(boxes) else content.get("keypoints") or []
                rows = [[point or [0, 0, 0] for point in points] for points in of_boxes]
                points = np.array(rows, dtype=np.float64).reshape(len(boxes), -1 if rows else 0, 3)
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{folder / name}: expected bboxes [[x1, y1, x2, y2], ...] and keypoints [[[x, y, v], ...]]"
                ) from None
            add(name, xyxy_to_xywh(boxes), points)
    if not any(points.size for _, points in images.values()):
        raise ValueError(f"{path}: no keypoints")
    return Annotator(images, names)


def read_annotators(paths: Sequence[Path]) -> list[Annotator]:
    """Read each with `read_annotator`; their images go by the file's name alone where no one has a name twice.

    So files of different tools, whose paths begin at different folders, are of the same images.
    """
    annotators = [read_annotator(path) for path in paths]
    if any(len({PurePosixPath(key).name for key in a.images}) < len(a.images) for a in annotators):
        return annotators
    return [
        replace(a, images={PurePosixPath(key).name: content for key, content in a.images.items()}) for a in annotators
    ]


@dataclass(frozen=True, eq=False)
class SigmaEstimate:
    """What repeated annotations say.

    Attributes:
        sigmas: float64 [K]; NaN where no object has the keypoint twice.
        low: float64 [K], 2.5 % end of the bootstrap interval.
        high: float64 [K], 97.5 % end.
        num_objects: int64 [K], objects that were used.
        names: K names, or empty.
    """

    sigmas: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_objects: np.ndarray
    names: tuple[str, ...]


def estimate_sigmas(annotators: Sequence[Annotator], *, area_factor: float = 1.0, seed: int = 0) -> SigmaEstimate:
    """Estimate one sigma per keypoint from images that were annotated twice or more.

    sigma_i^2 = mean over objects of [sum over R annotators of the squared distance to their mean / (R - 1)] / area.
    The division by R - 1 makes it unbiased: with R the estimate from two annotators would be 30 % low. Objects are
    paired with the first annotator's by their boxes (IoU 0.5 or more).

    Args:
        annotators: Two or more.
        area_factor: Area of an object as a share of its box, the mean box of the annotators: 1 for ``--oks-area
            box``, 0.53 for ``box53``.
        seed: Chooses the objects of each resample, for the intervals.

    Raises:
        ValueError: Fewer than two annotators, other numbers of keypoints, or no object or keypoint in common.
    """
    if len(annotators) < 2:
        raise ValueError("sigmas are estimated from two annotators or more")
    counts = {points.shape[1] for a in annotators for _, points in a.images.values() if len(points)}
    if len(counts) > 1:
        raise ValueError(f"the annotators have different numbers of keypoints: {sorted(counts)}")
    with_objects = [stem for stem, (boxes, _) in annotators[0].images.items() if len(boxes)]
    of_images = [_spreads_of_image(annotators, stem, area_factor) for stem in with_objects]
    if not any(map(len, of_images)):
        raise ValueError(
            "no object was annotated by two annotators (boxes of IoU 0.5 or more in images of the same name)"
        )
    spreads = np.concatenate(of_images)
    num_objects = np.isfinite(spreads).sum(axis=0)
    known = num_objects > 0
    if not known.any():
        raise ValueError("no keypoint of any object was labelled by two annotators (v above 0)")
    rng = seeded_numpy_rng(seed, "sigmas")
    draws = rng.integers(0, len(spreads), (BOOTSTRAPS, len(spreads)))
    samples = np.sqrt(np.stack([_mean(spreads[draw]) for draw in draws]))
    low, high = np.full((2, len(known)), np.nan)
    low[known], high[known] = np.nanpercentile(samples[:, known], (2.5, 97.5), axis=0)
    names = next((a.names for a in annotators if a.names), ())
    return SigmaEstimate(np.sqrt(_mean(spreads)), low, high, num_objects, names)


def check_independent(annotators: Sequence[Annotator], names: Sequence[str]) -> None:
    """Raise ValueError where two annotators say the same to the last digit, which no two people do.

    Args:
        annotators: What several people marked in the same images.
        names: What the user calls them.
    """
    for n, first in enumerate(annotators):
        for m in range(n + 1, len(annotators)):
            other = annotators[m]
            shared = [stem for stem in first.images if stem in other.images and len(first.images[stem][1])]
            if shared and all(np.array_equal(first.images[stem][1], other.images[stem][1]) for stem in shared):
                raise ValueError(
                    f"{names[n]} and {names[m]} have the same keypoints to the last digit on {len(shared)} images of "
                    "both: the same files, or copies; give annotations that two people made on their own"
                )


def _mean(spreads: np.ndarray) -> np.ndarray:
    """Return the mean over objects without NaN, float64 [K]."""
    known = np.isfinite(spreads)
    total = np.where(known, spreads, 0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _spreads_of_image(annotators: Sequence[Annotator], stem: str, area_factor: float) -> np.ndarray:
    """Return per object of the first annotator and keypoint the unbiased spread over the area, float64 [N, K]."""
    boxes, points = annotators[0].images[stem]
    all_boxes = [[box] for box in boxes]
    all_points = [[p] for p in points]
    for annotator in annotators[1:]:
        if stem not in annotator.images:
            continue
        other_boxes, other_points = annotator.images[stem]
        iou = box_iou(boxes, other_boxes, np.zeros(len(other_boxes), dtype=bool))
        while iou.size and iou.max() >= 0.5:
            n, m = np.unravel_index(int(iou.argmax()), iou.shape)
            all_boxes[n].append(other_boxes[m])
            all_points[n].append(other_points[m])
            iou[n, :] = iou[:, m] = -1
    rows = [
        _spread(np.stack(p), float(np.stack(b)[:, 2:].prod(axis=1).mean()) * area_factor)
        for b, p in zip(all_boxes, all_points)
        if len(b) > 1
    ]
    return np.stack(rows) if rows else np.zeros((0, points.shape[1]))


def _spread(points: np.ndarray, area: float) -> np.ndarray:
    """Return sum of squared distances to the mean / (R - 1) / area per keypoint; NaN where labelled less than twice.

    Args:
        points: float64 [R, K, 3].
        area: Area of the object in square pixels.
    """
    labelled = points[:, :, 2] > 0
    count = labelled.sum(axis=0)
    mean = np.where(labelled[:, :, None], points[:, :, :2], 0).sum(axis=0) / np.maximum(count, 1)[:, None]
    squares = np.where(labelled, np.square(points[:, :, :2] - mean).sum(axis=2), 0).sum(axis=0)
    return np.where(count > 1, squares / np.maximum(count - 1, 1) / max(area, 1e-9), np.nan)


def pixels_for_oks(sigma: float, threshold: float, area: float) -> float:
    """Return the error in pixels at which one keypoint alone has the given OKS on an object of ``area``.

    From OKS = exp(-d^2 / (2 area (2 sigma)^2)).
    """
    return 2 * sigma * math.sqrt(-2 * math.log(threshold) * area)


def format_card(sigmas: np.ndarray, names: tuple[str, ...], areas: np.ndarray) -> str:
    """Return a card: for each keypoint, how many pixels off it may be at the median object."""
    area = float(np.median(areas))
    width = max([len(name) for name in names] + [8])
    heads = " ".join(f"{'OKS ' + format(t, 'g'):>9}" for t in CARD_THRESHOLDS)
    lines = [
        f"pixels of error at the median object ({math.sqrt(area):.0f} x {math.sqrt(area):.0f} pixels):",
        f"  {'keypoint':<{width}} {'sigma':>7} {heads}",
    ]
    for k, sigma in enumerate(sigmas.tolist()):
        cells = " ".join(f"{pixels_for_oks(sigma, t, area):>9.1f}" for t in CARD_THRESHOLDS)
        lines.append(f"  {names[k] if names else str(k):<{width}} {sigma:>7.4f} {cells}")
    return "\n".join(lines)
