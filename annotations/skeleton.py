"""Skeletons: which points swap in a mirror, and how far off a point may be (OKS sigmas)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The "1" of pycocotools' table after its division by ten: looser than any point of a COCO person but the hips.
DEFAULT_SIGMA = 0.1

COCO_PERSON_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip

# How COCO's sigmas become pycocotools': by a division of its own, since 0.26 / 10 and 0.026 are different doubles.
COCO_PERSON_SIGMAS = (
    np.array([0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89])
    / 10.0
)

# Where users say which keypoints swap.
WHERE_PAIRS = "dataset.json (YOLO: flip_idx in data.yaml; COCO: names with left and right in the json's categories)"

_MIRROR_WORDS = {"left": "right", "right": "left", "l": "r", "r": "l"}

# A mirror map is refused when it fits the labels worse than no map at all by so many standard errors.
REFUSAL_ERRORS = 3.0
MIN_OBJECTS_FOR_PROOF = 10

# A map that leaves points in place is refused only where some pairs fit the labels so many times as well.
REFUSAL_RATIO = 2.0


@dataclass(frozen=True)
class Skeleton:
    """What is known about a dataset's keypoints.

    Attributes:
        names: K names, or empty.
        links: Pairs of indices that are joined in pictures.
        flip_pairs: Pairs of indices that swap in a mirror, () if no point has a partner; None if not known.
        sigmas: K OKS sigmas that came with the data, or None.
    """

    names: tuple[str, ...] = ()
    links: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] | None = None
    sigmas: tuple[float, ...] | None = None


def infer_flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Return the pairs that names with left and right (or L and R) imply; None where no name has a side.

    Raises:
        ValueError: A sided name has no partner.
    """
    pairs, alone = _sided_names(names)
    if alone:
        raise ValueError(
            f"keypoint {names[alone[0]]!r} has no partner on the other side; correct the names, or give flip_pairs in "
            f"{WHERE_PAIRS}"
        )
    return tuple(pairs) or None


def _sided_names(names: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return (pairs of names that differ by left and right only, names with a side but no partner), as indices."""
    words = [tuple(_split_words(name)) for name in names]
    pairs, alone = [], []
    for k, own in enumerate(words):
        mirrored = tuple(_MIRROR_WORDS.get(word, word) for word in own)
        if mirrored == own:
            continue
        if mirrored not in words:
            alone.append(k)
        elif k < (partner := words.index(mirrored)):
            pairs.append((k, partner))
    return pairs, alone


def ignored_pairs(names: Sequence[str], flip_pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the pairs that names with left and right imply and ``flip_pairs`` leaves out."""
    given = {frozenset(pair) for pair in flip_pairs}
    return [pair for pair in _sided_names(names)[0] if frozenset(pair) not in given]


def _split_words(name: str) -> list[str]:
    """Split "leftEye", "left_eye", "L-eye" and "eyeleft" into lower-case words."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    split: list[str] = []
    for word in (w.lower() for w in words):
        match = re.fullmatch(r"(left|right)(.+)|(.+)(left|right)", word)
        split.extend(part for part in match.groups() if part) if match else split.append(word)
    return split


def flip_order(flip_pairs: Sequence[tuple[int, int]], num_keypoints: int) -> np.ndarray:
    """Return int64 [K]: in a mirror, point k is drawn where point ``order[k]`` was.

    Raises:
        ValueError: An index is out of range, or in two pairs (the map would not be its own inverse).
    """
    order = np.arange(num_keypoints)
    used: set[int] = set()
    for a, b in flip_pairs:
        if not (0 <= a < num_keypoints and 0 <= b < num_keypoints) or a == b:
            raise ValueError(f"flip pair [{a}, {b}]: expected two different keypoints from 0 to {num_keypoints - 1}")
        if used & {a, b}:
            raise ValueError(f"flip pair [{a}, {b}]: a keypoint is in two pairs, so mirroring twice would not undo it")
        used |= {a, b}
        order[a], order[b] = b, a
    assert (order[order] == np.arange(num_keypoints)).all()
    return order


def check_flip_order(order: np.ndarray, keypoints: np.ndarray, boxes_xywh: np.ndarray) -> None:
    """Prove a mirror map on the labels: mirrored objects must look more like the mean object with it than without.

    Points that the map leaves in place are judged against the pairs that the labels themselves suggest, so the identity
    is judged like any other map.

    Args:
        order: int64 [K].
        keypoints: float64 [N, K, 3].
        boxes_xywh: float64 [N, 4].

    Raises:
        ValueError: The map is plainly wrong. Too few objects, or a skeleton without sides, prove nothing.
    """
    sides = np.maximum(boxes_xywh[:, None, 2:], 1e-9)
    layout = (keypoints[:, :, :2] - boxes_xywh[:, None, :2]) / sides - 0.5
    labelled = keypoints[:, :, 2] > 0
    identity = np.arange(len(order))
    worse = _compare_maps(order, identity, layout, labelled, _mean_layout(layout, labelled))
    if worse is not None:
        count, with_map, without = worse
        raise ValueError(
            f"flip_pairs look wrong: on {count} labelled objects the mirrored skeleton fits the mean one "
            f"worse with the pairs than without (squared distance {with_map:.4f} against "
            f"{without:.4f}, in units of the box); correct them in {WHERE_PAIRS}"
        )
    # Pairs found on one half of the objects are judged on the other: on the same ones chance would look like proof.
    mean = _mean_layout(layout[::2], labelled[::2])
    found = _suggest_order(order, mean)
    worse = _compare_maps(order, found, layout[1::2], labelled[1::2], mean)
    if worse is not None and worse[1] > REFUSAL_RATIO * worse[2]:
        count, with_map, without = worse
        pairs = ", ".join(f"[{k}, {found[k]}]" for k in identity.tolist() if k < found[k] and found[k] != order[k])
        raise ValueError(
            f"flip_pairs look wrong: expected {pairs} (keypoints from 0) among them: on {count} labelled objects the "
            f"mirrored skeleton fits the mean one better with than without (squared distance {without:.4f} against "
            f"{with_map:.4f}, in units of the box); add what is missing, or leave flip_pairs out, in {WHERE_PAIRS}: "
            "pictures are then mirrored only if names with left and right say how"
        )


def _mean_layout(layout: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Return the mean place of each labelled point, float64 [K, 2] from the box's centre, in units of the box."""
    return np.where(labelled[:, :, None], layout, 0).sum(axis=0) / np.maximum(labelled.sum(axis=0), 1)[:, None]


def _suggest_order(order: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return ``order`` with pairs for unmoved points that lie nearest to each other's mirror image; int64 [K]."""
    unmoved = np.flatnonzero(order == np.arange(len(order)))
    distance = np.square(mean[unmoved, None] * [-1, 1] - mean[None, unmoved]).sum(axis=2)
    nearest = distance.argmin(axis=1) if len(unmoved) else unmoved
    found = order.copy()
    for a, b in enumerate(nearest.tolist()):
        if nearest[b] == a:
            found[unmoved[a]] = unmoved[b]
    return found


def _compare_maps(
    order: np.ndarray, other: np.ndarray, layout: np.ndarray, labelled: np.ndarray, mean: np.ndarray
) -> tuple[int, float, float] | None:
    """Return (objects judged, squared distance to ``mean`` with ``order``, with ``other``) where ``order`` is worse.

    Only points count that the maps treat differently, and that both can judge: labelled themselves and where they
    would move to. None where the difference is not proved.
    """
    mirrored = layout * [-1, 1]
    judged = labelled & labelled[:, order] & labelled[:, other] & (order != other)
    objects = judged.any(axis=1)
    if objects.sum() < MIN_OBJECTS_FOR_PROOF:
        return None
    with_map = np.square(mirrored[:, order] - mean).sum(axis=2)
    with_other = np.square(mirrored[:, other] - mean).sum(axis=2)
    difference = np.where(judged, with_map - with_other, 0).sum(axis=1)[objects] / judged.sum(axis=1)[objects]
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    if difference.mean() <= REFUSAL_ERRORS * max(error, 1e-9):
        return None
    return len(difference), float(with_map[judged].mean()), float(with_other[judged].mean())


def choose_sigmas(given: Sequence[float] | None, skeleton: Skeleton, num_keypoints: int) -> tuple[np.ndarray, str]:
    """Return (OKS sigmas float64 [K], where they come from).

    Args:
        given: ``--kpt-oks-sigmas``: one value for all, or K values; pycocotools' unit after its division by ten.
        skeleton: May carry the dataset's own.
        num_keypoints: K.

    Raises:
        ValueError: Neither 1 nor K values, or a value that is not positive.
    """
    if given is not None:
        values, source = np.array(given, dtype=np.float64), "--kpt-oks-sigmas"
        if len(values) == 1:
            values = np.repeat(values, num_keypoints)
    elif skeleton.sigmas is not None:
        values, source = np.array(skeleton.sigmas, dtype=np.float64), "the dataset"
    elif skeleton.names == COCO_PERSON_KEYPOINTS:
        values, source = COCO_PERSON_SIGMAS.copy(), "COCO's persons"
    else:
        values, source = np.full(num_keypoints, DEFAULT_SIGMA), f"the default of {DEFAULT_SIGMA} for each"
    if len(values) != num_keypoints:
        raise ValueError(
            f"{len(values)} OKS sigmas (from {source}) for objects with {num_keypoints} keypoints; "
            f"give one value, or {num_keypoints}"
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"OKS sigmas (from {source}) must be positive and finite, got {values.tolist()}")
    return values, source
