"""More than COCO's figures, from the same matches: precision over recall, best thresholds, confusions, false alarms."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.coco_matching import CROWD_PARTNER, Matches
from evaluation.eval_result import EvalResult

# IoU (or OKS) 0.5 and area range "all" are the first of their kind: bit 0.
_FIRST_BIT = np.uint64(1)


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that is said about an evaluation beside COCO's figures; for the first process.

    Attributes:
        class_names: K names.
        num_truths: Objects per class that count, int [K].
        recall: float [R], the grid of the curves.
        precision: Per kind of score float [R, K], precision at IoU (OKS) 0.5; NaN without objects.
        best_f1: Per kind of score and class name ``f1``, ``score`` (the threshold that gives it), ``precision``,
            ``recall``; empty without objects.
        score_threshold: The threshold that gives the best F1 over all classes together, for boxes.
        confusion: int [K + 1, K + 1] at that threshold: rows are the object's class, columns the detection's; the
            last row holds detections on no object, the last column objects without a detection.
        background_images: Number of images without any object.
        background_false_positives: Detections at the threshold on them.
    """

    class_names: list[str]
    num_truths: np.ndarray
    recall: np.ndarray
    precision: dict[str, np.ndarray]
    best_f1: dict[str, dict[str, dict[str, float]]]
    score_threshold: float
    confusion: np.ndarray
    background_images: int
    background_false_positives: int

    def to_plain(self) -> dict[str, Any]:
        """Return what goes beside the metrics, as plain values; curves and matrix go into files of their own."""
        per_image = self.background_false_positives / self.background_images if self.background_images else None
        return {
            "best_f1": self.best_f1,
            "score_threshold": self.score_threshold,
            "background_images": self.background_images,
            "false_positives_per_background_image": per_image,
        }


def build_analysis(result: EvalResult) -> Analysis:
    """Work out the analysis of an evaluation; on the first process, where the matches are."""
    any_type = next(iter(result.saved))
    names = list(result.saved[any_type].class_names)
    precision: dict[str, np.ndarray] = {}
    best_f1: dict[str, dict[str, dict[str, float]]] = {}
    for iou_type, saved in result.saved.items():
        curves = result.curves[iou_type].precision[0, :, :, 0, -1]
        precision[iou_type] = np.where(curves < 0, np.nan, curves)
        best_f1[iou_type] = {}
        for k, span in enumerate(saved.matches.category_slices(len(names))):
            total = int(result.num_truths[iou_type][k, 0])
            best_f1[iou_type][names[k]] = _best_f1(saved.matches.take(np.arange(span.start, span.stop)), total)
    threshold = 0.0
    confusion = np.zeros((len(names) + 1, len(names) + 1), dtype=np.int64)
    false_alarms = 0
    if "bbox" in result.saved:
        boxes = result.saved["bbox"].matches
        by_score = boxes.take(np.argsort(-boxes.scores, kind="stable"))
        threshold = _best_f1(by_score, int(result.num_truths["bbox"][:, 0].sum())).get("score", 0.0)
        shown = boxes.take(boxes.scores >= threshold)
        confusion = _confusion(shown, result.num_truths["bbox"][:, 0])
        false_alarms = int(result.is_background[shown.images].sum())
    return Analysis(
        names,
        result.num_truths[any_type][:, 0],
        result.saved[any_type].recall_grid,
        precision,
        best_f1,
        threshold,
        confusion,
        int(result.is_background.sum()),
        false_alarms,
    )


def _best_f1(matches: Matches, total: int) -> dict[str, float]:
    """Return the best F1 over all score thresholds at IoU 0.5, of detections sorted by falling score."""
    positive = (matches.positive & _FIRST_BIT).astype(bool)
    counts = positive | ~(matches.ignored & _FIRST_BIT).astype(bool)
    if total == 0 or not positive.any():
        return {}
    hits, found = np.cumsum(positive), np.cumsum(counts)
    f1 = 2 * hits / (total + found)
    # A threshold cannot part detections of equal score: only the last of them is a choice.
    is_last = np.r_[matches.scores[1:] != matches.scores[:-1], True]
    best = int(np.argmax(np.where(is_last, f1, -1)))
    return {
        "f1": float(f1[best]),
        "score": float(matches.scores[best]),
        "precision": float(hits[best] / found[best]),
        "recall": float(hits[best] / total),
    }


def _confusion(matches: Matches, num_truths: np.ndarray) -> np.ndarray:
    """Return the matrix of `Analysis.confusion` for the given detections; those inside crowds are left out."""
    num_classes = len(num_truths)
    matches = matches.take(matches.partners != CROWD_PARTNER)
    rows = np.where(matches.partners >= 0, matches.partners, num_classes).astype(np.int64)
    flat = np.bincount(rows * (num_classes + 1) + matches.categories, minlength=(num_classes + 1) ** 2)
    matrix = flat.reshape(num_classes + 1, num_classes + 1)
    matrix[:num_classes, num_classes] = num_truths - matrix[:num_classes, :num_classes].sum(axis=1)
    return matrix


@dataclass(frozen=True, eq=False)
class ImageScores:
    """How well each image is done: counts of boxes at IoU 0.5, of detections at a score threshold or above.

    Attributes:
        positions: int64 [I], of the images in the annotations; sorted by image id.
        objects: int64 [I], objects that count.
        detections: int64 [I], detections that count; those inside crowds do not.
        hits: int64 [I], objects found.
        f1: float64 [I], 2 * hits / (objects + detections); NaN with neither objects nor detections.
    """

    positions: np.ndarray
    objects: np.ndarray
    detections: np.ndarray
    hits: np.ndarray
    f1: np.ndarray

    def ranked(self) -> np.ndarray:
        """Return which images (positions in the arrays) to look at, worst first, int64.

        By F1; of equal ones the one with more mistakes is worse, and without mistakes that with fewer objects.
        """
        judged = np.flatnonzero(np.isfinite(self.f1))
        mistakes = (self.objects + self.detections - 2 * self.hits)[judged]
        return judged[np.lexsort((self.objects[judged], -mistakes, self.f1[judged]))]


def score_images(result: EvalResult, score_threshold: float) -> ImageScores:
    """Count hits and mistakes of every evaluated image; on the first process, for boxes."""
    saved, num_images = result.saved["bbox"], len(result.positions)
    matches = saved.matches.take(saved.matches.scores >= score_threshold)
    positive = (matches.positive & _FIRST_BIT).astype(bool)
    counts = positive | ~(matches.ignored & _FIRST_BIT).astype(bool)
    objects = np.bincount(saved.truth_images, minlength=num_images)
    detections = np.bincount(matches.images[counts], minlength=num_images)
    hits = np.bincount(matches.images[positive], minlength=num_images)
    with np.errstate(invalid="ignore"):
        f1 = 2 * hits / (objects + detections)
    return ImageScores(result.positions, objects, detections, hits, f1)


def format_classes(result: EvalResult, analysis: Analysis, iou_type: str = "bbox") -> str:
    """Return a table with one line per class: objects, AP, AP50, AR, best F1 and its threshold."""
    width = max([len(name) for name in analysis.class_names] + [5])
    lines = [f"  {'class':<{width}} {'objects':>8} {'AP':>7} {'AP50':>7} {'AR':>7} {'best F1':>8} {'at score':>9}"]
    for k, name in enumerate(analysis.class_names):
        figures, best = result.per_class[iou_type][name], analysis.best_f1[iou_type][name]
        shown = " ".join(
            f"{'n/a' if figures[f] is None else format(figures[f], '.4f'):>7}" for f in ("AP", "AP50", "AR")
        )
        f1 = f"{best['f1']:>8.4f} {best['score']:>9.4f}" if best else f"{'n/a':>8} {'n/a':>9}"
        lines.append(f"  {name:<{width}} {int(analysis.num_truths[k]):>8} {shown} {f1}")
    return "\n".join(lines)
