"""Anchors that fit the boxes of a dataset better than a model's own, as flags to paste."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

from inspection.anchor_reach import (
    AnchorGrids,
    AnchorReach,
    ObjectSizes,
    best_iou,
    build_skeleton_model,
    distances_to_anchors,
)
from models.anchors import Sizes, anchor_words, build_generator
from models.architectures import ModelSpec

# Fewer objects than this say too little.
MIN_OBJECTS = 50

# Nothing is suggested unless so many more of the objects are reached.
MIN_GAIN = 0.1

# Anchors cost time and memory: one more at each place must reach so many more of the objects.
GAIN_PER_ANCHOR = 0.01

# More at a place than any of torchvision's models has is not tried.
MAX_ANCHORS = 15

# So many objects, evenly chosen, are tried with each set of anchors; the figures are of all.
NUM_TRIED = 500

# The model's own sizes are tried from a sixteenth to four times of what they are.
SCALES = 2.0 ** np.arange(-4, 2.01, 0.25)


@dataclass(frozen=True)
class AnchorAdvice:
    """Anchors that reach more of the objects.

    Attributes:
        flags: ``--anchor-sizes`` and ``--anchor-ratios`` with their values.
        missed: Share of the objects that no anchor overlaps enough, with these flags.
        count: Anchors at a place of the finest map.
    """

    flags: str
    missed: float
    count: int


@dataclass(frozen=True)
class _Candidate:
    """Values of the two flags; None for the model's own."""

    sizes: Sizes | None
    ratios: tuple[float, ...] | None


def suggest_anchors(
    spec: ModelSpec, grids: AnchorGrids, objects: ObjectSizes, reach: AnchorReach
) -> AnchorAdvice | None:
    """Look for sizes and ratios with which more boxes have an anchor that is trained on them.

    Args:
        spec: The model.
        grids: Its present anchors.
        objects: Boxes after the model's resize.
        reach: What the present anchors do for them.

    Returns:
        The best found; None where the present ones are about as good, for few objects, and for FCOS.
    """
    missed = np.count_nonzero(reach.best < reach.wanted) / max(1, len(reach.best))
    if reach.wanted >= 1 or missed < MIN_GAIN or len(reach.best) < MIN_OBJECTS:
        return None
    if spec.anchor_sizes or spec.anchor_ratios:  # those that torchvision has are where the search begins
        grids = AnchorGrids(build_skeleton_model(replace(spec, anchor_sizes=None, anchor_ratios=None)))
    distances = distances_to_anchors(grids, objects)
    tried = np.arange(0, len(objects.boxes), max(1, len(objects.boxes) // NUM_TRIED))
    boxes = objects.boxes[tried]
    candidates: list[_Candidate] = []
    shapes: list[list[np.ndarray]] = []
    for candidate in _candidates(grids, boxes):
        with contextlib.suppress(ValueError):  # an anchor so thin that nothing is left of it
            generator = build_generator(grids.model, spec.name, candidate.sizes, candidate.ratios)
            if max(generator.num_anchors_per_location()) <= MAX_ANCHORS:
                candidates.append(candidate)
                shapes.append(grids.shapes(generator))
    counts = np.array([len(of_candidate[0]) for of_candidate in shapes])
    reached = _shares_reached(boxes, distances[:, tried], shapes, reach.wanted)
    best = candidates[int(np.argmax(reached - GAIN_PER_ANCHOR * counts))]
    generator = build_generator(grids.model, spec.name, best.sizes, best.ratios)
    still_missed = float(np.mean(best_iou(objects.boxes, distances, grids.shapes(generator)) < reach.wanted))
    if missed - still_missed < MIN_GAIN:
        return None
    words = [f"--anchor-sizes {anchor_words(best.sizes)}"] if best.sizes else []
    words += [f"--anchor-ratios {anchor_words(best.ratios)}"] if best.ratios else []
    return AnchorAdvice(" ".join(words), still_missed, generator.num_anchors_per_location()[0])


def _shares_reached(
    boxes: np.ndarray, distances: np.ndarray, shapes: list[list[np.ndarray]], wanted: float
) -> np.ndarray:
    """Return for each set of shapes which share of the boxes has an anchor with the wanted IoU, float64.

    Sets share most of their shapes, so each shape is compared with the boxes once.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    reached = np.zeros((len(shapes), len(boxes)), dtype=bool)
    for level, distance in enumerate(distances):
        of_map = [of_set[level] for of_set in shapes]
        known, rows = np.unique(np.concatenate(of_map), axis=0, return_inverse=True)
        anchors = known[:, None]
        low, high = np.maximum(-sides / 2, distance - anchors / 2), np.minimum(sides / 2, distance + anchors / 2)
        overlap = (high - low).clip(0).prod(axis=2)
        fits = overlap >= wanted * (sides.prod(axis=1) + anchors.prod(axis=2) - overlap)
        for k, chosen in enumerate(np.split(rows.reshape(-1), np.cumsum([len(part) for part in of_map])[:-1])):
            reached[k] |= fits[chosen].any(axis=0)
    return reached.mean(axis=1)


def _candidates(grids: AnchorGrids, boxes: np.ndarray) -> Iterator[_Candidate]:
    """Yield what is tried: the model's own sizes scaled, and divided finer, with its own ratios and with the boxes'."""
    sides = boxes[:, 2:] - boxes[:, :2]
    logs = np.log(sides[:, 1] / sides[:, 0])
    if isinstance(grids.owner.anchor_generator, DefaultBoxGenerator):
        logs = np.abs(logs)  # it has every ratio's inverse too
    shapes = {tuple(sorted({float(f"{ratio:.2g}") for ratio in np.exp(_centres(logs, k))})) for k in range(1, 6)}
    for sizes in _scaled_sizes(grids):
        for ratios in [None, *sorted(shapes)]:
            yield _Candidate(sizes, ratios)


def _scaled_sizes(grids: AnchorGrids) -> Iterator[Sizes | None]:
    """Yield sizes: None for the model's own, and these times a factor; one to three a map where maps differ in size."""
    own = grids.owner.anchor_generator
    yield None
    for scale in SCALES:
        if isinstance(own, DefaultBoxGenerator):
            yield tuple(_whole([part * grids.transform.fixed_size[0] * scale]) for part in own.scales)
        elif len(set(own.sizes)) == 1:
            yield (_whole(size * scale for size in own.sizes[0]),)
        else:  # each map's are twice the last one's
            for count in (1, 2, 3):
                finer = 2 ** (np.arange(count) / count)
                yield tuple(_whole((group[0] * scale * finer).tolist()) for group in own.sizes)


def _whole(sizes: Iterable[float]) -> tuple[float, ...]:
    """Return sizes to the pixel, small ones to a tenth of it, in rising order, each once."""
    return tuple(sorted({float(round(size, 0 if size >= 10 else 1)) for size in sizes}))


def _centres(values: np.ndarray, count: int) -> np.ndarray:
    """Return the centres of ``count`` groups of numbers (k-means from their quantiles), float64 [count]."""
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(20):
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        centres = np.array([values[nearest == k].mean() if (nearest == k).any() else centres[k] for k in range(count)])
    return centres
