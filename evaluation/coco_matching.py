"""COCO's matching and accumulation, restated for arrays: the two slow loops of pycocotools and nothing else.

Results are bit-equal to ``COCOeval`` (a randomised test compares every cell). What makes it fast: matches at all IoU
thresholds and in all area ranges are bits of one integer, so each candidate pair is looked at once.

Bit ``a * T + t`` belongs to area range a and threshold t, for T thresholds and A area ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params


@dataclass(frozen=True, eq=False)
class Grid:
    """The thresholds and ranges of pycocotools' ``Params`` in the form that matching needs.

    Attributes:
        thresholds: float64 [T], ascending; 1.0 is lowered a little as COCOeval does.
        area_ranges: float64 [A, 2].
        recall_grid: float64 [R].
        max_dets: Ascending; matching looks at the largest.
    """

    thresholds: np.ndarray
    area_ranges: np.ndarray
    recall_grid: np.ndarray
    max_dets: tuple[int, ...]

    @classmethod
    def of(cls, params: Params) -> "Grid":
        """Read ``Params``.

        Raises:
            ValueError: Thresholds do not ascend, or there are more than 64 pairs of threshold and range.
        """
        thresholds = np.minimum(np.asarray(params.iouThrs, dtype=np.float64), 1 - 1e-10)
        if (np.diff(thresholds) < 0).any():
            raise ValueError(f"IoU thresholds must ascend, got {params.iouThrs}")
        area_ranges = np.asarray(params.areaRng, dtype=np.float64)
        if len(thresholds) * len(area_ranges) > 64:
            raise ValueError(f"{len(thresholds)} thresholds times {len(area_ranges)} area ranges are more than 64")
        return cls(thresholds, area_ranges, np.asarray(params.recThrs), tuple(sorted(params.maxDets)))

    @property
    def num_bits(self) -> int:
        """T * A."""
        return len(self.thresholds) * len(self.area_ranges)

    def area_bits(self, areas: np.ndarray) -> np.ndarray:
        """Return the bits of the ranges that do not contain each area, uint64 [len(areas)]."""
        bits = np.zeros(len(areas), dtype=np.uint64)
        all_thresholds = (1 << len(self.thresholds)) - 1
        for a, (low, high) in enumerate(self.area_ranges):
            outside = (areas < low) | (areas > high)
            bits |= outside * np.uint64(all_thresholds << (a * len(self.thresholds)))
        return bits


def rank_detections(categories: np.ndarray, scores: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort one image's detections by category and falling score, and keep the ``limit`` best of each category.

    Returns:
        (positions of the kept detections, rank of each within its category from 0); ties keep their order.
    """
    order = np.lexsort((-scores, categories))
    sorted_categories = categories[order]
    starts = np.flatnonzero(np.r_[True, sorted_categories[1:] != sorted_categories[:-1]])
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    kept = ranks < limit
    return order[kept], ranks[kept]


def match_image(
    similarity: np.ndarray,
    detection_areas: np.ndarray,
    truth_areas: np.ndarray,
    truth_ignored: np.ndarray,
    truth_crowd: np.ndarray,
    grid: Grid,
) -> tuple[np.ndarray, np.ndarray]:
    """Match one image's detections to its objects at all thresholds and in all area ranges.

    COCOeval's greedy rule: detections choose in the order of their score; each takes the most similar free
    object that counts, else the most similar one that is to be ignored; of equal ones the last; crowds stay free.

    Args:
        similarity: float64 [D, G], IoU or OKS; -1 where categories differ. Detections of one category are
            in the order of falling score.
        detection_areas: float64 [D].
        truth_areas: float64 [G].
        truth_ignored: bool [G], objects that never count.
        truth_crowd: bool [G], objects that may be matched more than once.
        grid: Thresholds and ranges.

    Returns:
        uint64 [D] bits where a detection is a true positive, and uint64 [D] bits where it is ignored.
    """
    positive = np.zeros(len(similarity), dtype=np.uint64)
    outside = grid.area_bits(detection_areas)
    ignored = outside.copy()
    num_reached = np.searchsorted(grid.thresholds, similarity.ravel(), side="right").reshape(similarity.shape)
    rows, columns = np.nonzero(num_reached)
    if not len(rows):
        return positive, ignored

    everything = (1 << grid.num_bits) - 1
    one_each = sum(1 << (a * len(grid.thresholds)) for a in range(len(grid.area_ranges)))
    skipped = [everything if never else int(bits) for bits, never in zip(grid.area_bits(truth_areas), truth_ignored)]
    crowd = truth_crowd.tolist()
    taken = [0] * len(skipped)
    # Best similarity first, of equal ones the last object first.
    order = np.lexsort((-columns, -similarity[rows, columns], rows))
    pairs: dict[int, list[tuple[int, int]]] = {}
    for d, g, n in zip(rows[order].tolist(), columns[order].tolist(), num_reached[rows, columns][order].tolist()):
        pairs.setdefault(d, []).append((g, ((1 << n) - 1) * one_each))
    for d, candidates in pairs.items():
        open_bits = everything
        hits = 0
        for g, reached in candidates:  # objects that count
            free = reached & open_bits & ~skipped[g] & (everything if crowd[g] else ~taken[g])
            taken[g] |= free
            open_bits &= ~free
            hits |= free
        positive[d] = hits
        for g, reached in candidates:  # objects to be ignored, for whatever is still open
            free = reached & open_bits & skipped[g] & (everything if crowd[g] else ~taken[g])
            taken[g] |= free
            open_bits &= ~free
        ignored[d] = (everything & ~open_bits & ~hits) | (int(outside[d]) & open_bits)
    return positive, ignored


# Instead of a class in `Matches.partners`.
NO_PARTNER, CROWD_PARTNER = -1, -2


def match_across_classes(iou: np.ndarray, scores: np.ndarray, truth_crowd: np.ndarray) -> np.ndarray:
    """Pair detections and objects whatever their classes, for the confusion matrix.

    Detections choose in the order of their score; each takes the free object of highest IoU, 0.5 or more. Leaving out
    all detections below a score leaves the other pairs as they are.

    Args:
        iou: float64 [D, G].
        scores: float64 [D].
        truth_crowd: bool [G].

    Returns:
        int64 [D]: position of the object, `NO_PARTNER`, or `CROWD_PARTNER` for a detection inside a crowd.
    """
    partners = np.full(len(iou), NO_PARTNER)
    rows, columns = np.nonzero(iou >= 0.5)
    order = np.lexsort((-iou[rows, columns], rows, -scores[rows]))
    taken: set[int] = set()
    for d, g in zip(rows[order].tolist(), columns[order].tolist()):
        if truth_crowd[g]:
            if partners[d] == NO_PARTNER:
                partners[d] = CROWD_PARTNER
        elif partners[d] < 0 and g not in taken:
            partners[d] = g
            taken.add(g)
    return partners


@dataclass(frozen=True, eq=False)
class Matches:
    """What is kept of every detection.

    Attributes:
        images: int32 [D], position of the image among the evaluated ones, sorted by image id.
        categories: int16 [D], position of the category among the sorted ones.
        ranks: int16 [D], within its image and category.
        partners: int16 [D], category of the object underneath, see `match_across_classes`; for boxes.
        scores: float64 [D].
        positive: uint64 [D], see `match_image`.
        ignored: uint64 [D].
    """

    images: np.ndarray
    categories: np.ndarray
    ranks: np.ndarray
    partners: np.ndarray
    scores: np.ndarray
    positive: np.ndarray
    ignored: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Matches"]) -> "Matches":
        """Put matches one after another."""
        dtypes = (np.int32, np.int16, np.int16, np.int16, np.float64, np.uint64, np.uint64)
        columns = zip(*(part.columns() for part in parts)) if parts else ((np.zeros(0, d),) for d in dtypes)
        return cls(*(np.concatenate(column).astype(dtype, copy=False) for column, dtype in zip(columns, dtypes)))

    def columns(self) -> tuple[np.ndarray, ...]:
        """Return the arrays in the order of the attributes."""
        return self.images, self.categories, self.ranks, self.partners, self.scores, self.positive, self.ignored

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.scores)

    def sorted(self) -> "Matches":
        """Sort by category, falling score, image and rank: the order in which COCOeval walks detections."""
        return self.take(np.lexsort((self.ranks, self.images, -self.scores, self.categories)))

    def take(self, index: np.ndarray) -> "Matches":
        """Return the detections at ``index`` (positions or a bool mask)."""
        return Matches(*(column[index] for column in self.columns()))

    def category_slices(self, num_categories: int) -> list[slice]:
        """Return where each category lies; the detections must be `sorted`."""
        bounds = np.searchsorted(self.categories, np.arange(num_categories + 1))
        return [slice(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:])]


@dataclass(frozen=True, eq=False)
class Curves:
    """COCOeval's three arrays; -1 where there is no object to find.

    Attributes:
        precision: float64 [T, R, K, A, M].
        recall: float64 [T, K, A, M].
        scores: float64 [T, R, K, A, M], the score at which each recall is reached.
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


def accumulate(matches: Matches, num_truths: np.ndarray, grid: Grid) -> Curves:
    """Turn matches into precision over recall, bit-equal to ``COCOeval.accumulate``.

    Args:
        matches: `Matches.sorted`.
        num_truths: int64 [K, A], objects that count, per category and area range.
        grid: Thresholds and ranges.
    """
    shape = (len(grid.thresholds), len(grid.recall_grid), len(num_truths), len(grid.area_ranges), len(grid.max_dets))
    precision, scores = -np.ones(shape), -np.ones(shape)
    recall = -np.ones((shape[0], *shape[2:]))
    for k, span in enumerate(matches.category_slices(len(num_truths))):
        ranks = matches.ranks[span]
        previous = None
        for m in reversed(range(len(grid.max_dets))):
            chosen = np.flatnonzero(ranks < grid.max_dets[m]) + span.start
            if previous is not None and len(chosen) == previous:  # the smaller limit cuts nothing off
                for array in (precision, recall, scores):
                    array[..., k, :, m] = array[..., k, :, m + 1]
                continue
            previous = len(chosen)
            positive, ignored = matches.positive[chosen], matches.ignored[chosen]
            for a in np.flatnonzero(num_truths[k]).tolist():
                bits = np.arange(shape[0], dtype=np.uint64)[:, None] + np.uint64(a * shape[0])
                hit = ((positive >> bits) & np.uint64(1)).astype(bool)
                miss = ~hit & ~((ignored >> bits) & np.uint64(1)).astype(bool)
                total = int(num_truths[k, a])
                p, r, s = precision_over_recall(hit, miss, total, matches.scores[chosen], grid.recall_grid)
                precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = p, r, s
    return Curves(precision, recall, scores)


def precision_over_recall(
    hit: np.ndarray, miss: np.ndarray, total: float, scores: np.ndarray, recall_grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (precision [T, R] at the grid's recalls, final recall [T], scores [T, R]) of one category.

    Args:
        hit: [T, D], 1 for a true positive; detections by falling score.
        miss: [T, D], 1 for a false positive.
        total: Number of objects.
        scores: float64 [D].
        recall_grid: float64 [R].
    """
    precision, at_scores = np.zeros((len(hit), len(recall_grid))), np.zeros((len(hit), len(recall_grid)))
    if hit.shape[1] == 0:
        return precision, np.zeros(len(hit)), at_scores
    true_positives = np.cumsum(hit, axis=1).astype(float)
    false_positives = np.cumsum(miss, axis=1).astype(float)
    recall = true_positives / total
    envelope = true_positives / (false_positives + true_positives + np.spacing(1))
    envelope = np.maximum.accumulate(envelope[:, ::-1], axis=1)[:, ::-1]
    for t in range(len(hit)):
        reached = np.searchsorted(recall[t], recall_grid, side="left")
        reached = reached[reached < hit.shape[1]]
        precision[t, : len(reached)] = envelope[t, reached]
        at_scores[t, : len(reached)] = scores[reached]
    return precision, recall[:, -1], at_scores
