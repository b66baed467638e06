"""How far a figure may be trusted: COCO's figures over resampled images, from the matches of one evaluation.

A resample draws as many images as there are, with repetition; an image drawn twice counts as two images of the same
content, as if its copy stood in the annotation file. Detections are matched within their image, so that matches stay
what they are and only their weights change: nothing is matched again, and no model, image or annotation is needed.

AP of resamples is higher than AP of the images they were drawn from (repeated images agree with themselves, and the
envelope of the precision takes every stroke of luck), by several standard deviations where classes are rare. Plain
percentiles would not even hold the figure. Intervals are therefore the spread of the resamples, centred on the figure:
how far it moves with another set of as many images. A simulation in the tests counts how often that is true.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.eval_result import EvalResult, SavedMatches

SEED = 0
LEVEL = 0.95

# Figures that carry an interval.
RESAMPLED = ("AP", "AP50", "AP75", "AR")

# So many where that is cheap, fewer for large datasets, none where a tenth is not cheap either; the bound is on
# resamples times detections, or images where these are more.
RESAMPLES = 1000
MAX_WORK = 100_000_000

# Resamples times detections that are worked on at once: what fits the processor's cache.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Resampled:
    """Precision and recall of every resample; NaN where a class has no object in it.

    Attributes:
        precision: float64 [B, K, T], averaged over recall: AP of a class at a threshold.
        recall: float64 [B, K, T].
        thresholds: float64 [T].
    """

    precision: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray

    def figure(self, name: str, category: int | None = None) -> np.ndarray:
        """Return a figure of `RESAMPLED` for every resample, over all classes or of one; NaN without objects."""
        values = self.recall if name == "AR" else self.precision
        if name in ("AP50", "AP75"):
            values = values[:, :, np.isclose(self.thresholds, int(name[2:]) / 100)]
        if category is not None:
            values = values[:, category : category + 1]
        has_objects = np.isfinite(values)
        total = np.where(has_objects, values, 0).sum(axis=(1, 2))
        count = has_objects.sum(axis=(1, 2))
        return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw_weights(num_images: int, num_resamples: int, seed: int = SEED) -> np.ndarray:
    """Return how often each resample contains each image, int32 [num_resamples, num_images]; depends on the seed."""
    rng, weights = np.random.default_rng(seed), np.empty((num_resamples, num_images), dtype=np.int32)
    for row in weights:  # one at a time: the numbers drawn take four times as much memory
        row[:] = np.bincount(rng.integers(0, num_images, num_images), minlength=num_images)
    return weights


def resample(saved: SavedMatches, weights: np.ndarray) -> Resampled:
    """Compute precision and recall with every image counted as often as its weight says.

    Weights of one give COCO's figures; weights of two those of a dataset in which every image stands twice.

    Args:
        saved: The matches of one evaluation of I images.
        weights: Integers [B, I].
    """
    num_classes, num_thresholds = len(saved.class_names), len(saved.thresholds)
    precision = np.full((len(weights), num_classes, num_thresholds), np.nan)
    recall = precision.copy()
    by_class = np.argsort(saved.truth_categories, kind="stable")
    bounds = np.searchsorted(saved.truth_categories[by_class], np.arange(num_classes + 1))
    for k, span in enumerate(saved.matches.category_slices(num_classes)):
        truths = saved.truth_images[by_class[bounds[k] : bounds[k + 1]]]
        if not len(truths):
            continue
        images = saved.matches.images[span]
        positive, ignored = saved.matches.positive[span], saved.matches.ignored[span]
        step = max(1, _CHUNK // max(1, len(images)))
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            totals = weights[rows][:, truths].sum(axis=1)
            p, r = _average_precision(weights[rows], images, positive, ignored, totals, saved)
            p[totals == 0] = r[totals == 0] = np.nan
            precision[rows, k], recall[rows, k] = p, r
    return Resampled(precision, recall, saved.thresholds)


def _average_precision(
    weights: np.ndarray,
    images: np.ndarray,
    positive: np.ndarray,
    ignored: np.ndarray,
    totals: np.ndarray,
    saved: SavedMatches,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (precision averaged over recall [B, T], final recall [B, T]) of one class.

    The same sums as `coco_matching.precision_over_recall`, but only at true positives: recall rises nowhere else, and
    precision between two of them is below that of the first, so that its envelope does not see it.
    """
    num_thresholds = len(saved.thresholds)
    precision, recall = np.zeros((len(weights), num_thresholds)), np.zeros((len(weights), num_thresholds))
    found_or_ignored = np.cumsum(weights[:, images], axis=1, dtype=np.int32)
    totals = np.maximum(totals, 1)[:, None]
    for t in range(num_thresholds):
        bit = np.uint64(1 << t)
        hits, skipped = np.flatnonzero(positive & bit), np.flatnonzero(ignored & bit)
        if not len(hits):
            continue
        true_positives = np.cumsum(weights[:, images[hits]], axis=1, dtype=np.int32)
        found = found_or_ignored[:, hits]
        if len(skipped):
            before = np.zeros((len(weights), len(skipped) + 1), dtype=np.int32)
            np.cumsum(weights[:, images[skipped]], axis=1, out=before[:, 1:])
            found -= before[:, np.searchsorted(skipped, hits)]
        envelope = true_positives / (found + np.spacing(1))
        envelope = np.maximum.accumulate(envelope[:, ::-1], axis=1)[:, ::-1]
        at_recall = true_positives / totals
        # How many points of the recall grid are reached by each true positive, and first by it.
        reached = np.searchsorted(saved.recall_grid, at_recall, side="right")
        first = np.diff(reached, axis=1, prepend=0)
        precision[:, t] = (envelope * first).sum(axis=1) / len(saved.recall_grid)
        recall[:, t] = at_recall[:, -1]
    return precision, recall


def num_resamples(num_detections: int, num_images: int) -> int:
    """Return how many resamples are made; 0 where it would take too long, or more memory than a figure is worth."""
    affordable = MAX_WORK // max(1, num_detections, num_images)
    return min(RESAMPLES, affordable) if affordable >= RESAMPLES // 10 else 0


def interval(figure: float, resampled: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Return (low, high) around a figure; None if no resample has a value.

    Args:
        figure: Value with every image counted once, not resampled.
        resampled: The same of every resample, NaN where it does not exist.
        level: Share of sets of as many images whose figures are to lie inside.
    """
    spread = resampled[np.isfinite(resampled)]
    if not len(spread):
        return None
    low, high = figure + np.quantile(spread, [(1 - level) / 2, (1 + level) / 2]) - spread.mean()
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How two evaluations of the same images differ in one figure.

    Attributes:
        first: Value in the first evaluation; None without objects, and then all others are.
        second: Value in the second evaluation.
        low: Lower end of the interval of second minus first.
        high: Its upper end.
        probability: That the second one is better: share of the resamples, centred on the difference, in which it is;
            equal ones count half.
    """

    first: float | None = None
    second: float | None = None
    low: float | None = None
    high: float | None = None
    probability: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare_figure(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> Difference:
    """Compare a figure of two evaluations that were resampled with the same weights.

    Args:
        first: `Resampled.figure` of the first; its entry 0 has the images themselves, weight one each.
        second: `Resampled.figure` of the second, with the same weights.
        level: Share of the resampled differences inside the interval, in 0..1.
    """
    differences = second - first
    if not np.isfinite(differences[0]):
        return Difference()
    spread = interval(float(differences[0]), differences[1:], level)
    if spread is None:
        return Difference(float(first[0]), float(second[0]))
    resampled = differences[1:][np.isfinite(differences[1:])]
    centred = resampled - resampled.mean() + differences[0]
    # What the sums of floating point leave of an equality.
    sign = np.where(np.abs(centred) < 1e-12, 0.0, np.sign(centred))
    return Difference(float(first[0]), float(second[0]), *spread, float((sign + 1).mean() / 2))


def metric_intervals(result: EvalResult) -> dict[str, dict[str, Any]]:
    """Return the 95 % intervals of an evaluation's figures; on the first process, where the matches are.

    Returns:
        Per kind of score ``AP``, ``AP50``, ``AP75`` and ``AR``, each [low, high] or None without objects, and
        ``resamples``, their number. A kind with too many detections or images has no entry.
    """
    intervals: dict[str, dict[str, Any]] = {}
    for iou_type, saved in result.saved.items():
        number = num_resamples(len(saved.matches), len(saved.image_ids))
        if not number or not len(saved.image_ids):
            continue
        resampled = resample(saved, draw_weights(len(saved.image_ids), number))
        of_type: dict[str, Any] = {"resamples": number}
        for name in RESAMPLED:
            figure = result.metrics[iou_type][name]
            found = None if figure is None else interval(figure, resampled.figure(name))
            of_type[name] = None if found is None else [max(found[0], 0.0), min(found[1], 1.0)]
        intervals[iou_type] = of_type
    return intervals


def format_intervals(intervals: dict[str, dict[str, Any]]) -> str:
    """Return the intervals of AP as text, one line per kind of score; empty without any."""
    lines = []
    for iou_type, of_type in intervals.items():
        if of_type["AP"] is not None:
            low, high = of_type["AP"]
            lines.append(f"AP, {iou_type}: {LEVEL:.0%} interval over images {low:.4f} to {high:.4f}")
    return "\n".join(lines)
