"""How often each keypoint is labelled and visible, and which look misplaced or swapped left to right."""

from collections.abc import Sequence

import numpy as np

from inspection.dataset_statistics import SplitObjects
from inspection.observations import Observation, observe_worst

# A keypoint is doubted when it lies farther outside its box than this share of the box.
MAX_OUTSIDE = 0.5

# A pair of points tells a side when it is this far apart, as a share of the box's width.
CLEAR_SHARE = 0.1

# A pair has a usual side when so many objects with a clear one agree, and there are so many of them.
USUAL_SHARE = 0.9
MIN_CLEAR_OBJECTS = 10

# Without a usual side an object is judged by its own other pairs, at least so many of them, and by its links: swapped,
# they would be shorter than this share. Persons seen from the side fail the first test alone, crossed arms the second.
MIN_OTHER_PAIRS = 2
MAX_LINK_SHARE = 0.75


def keypoint_names(part: SplitObjects) -> list[str]:
    """Return the names, or numbers where there are none."""
    names = part.split.skeleton.names
    return list(names) or [f"keypoint {k}" for k in range(part.annotations.num_keypoints)]


def format_keypoints(parts: list[SplitObjects]) -> list[str]:
    """Return a table: per keypoint the share of objects on which it is labelled, and visible."""
    names = keypoint_names(parts[0])
    width = max(map(len, names))
    heads = "".join(f"  {part.role + ' labelled':>15}{part.role + ' visible':>15}" for part in parts)
    lines = [f"{'':{width}}{heads}"]
    for k, name in enumerate(names):
        cells = ""
        for part in parts:
            v = part.annotations.keypoints[part.objects, k, 2] if part.annotations.num_keypoints else np.zeros(0)
            shares = (np.mean(v > 0), np.mean(v == 2)) if len(v) else (0.0, 0.0)
            cells += "  " + "".join(f"{share:15.0%}" for share in shares)
        lines.append(f"{name:{width}}{cells}")
    without = [int((part.annotations.num_labelled_keypoints()[part.objects] == 0).sum()) for part in parts]
    if any(without):
        counts = ", ".join(f"{n} of {len(part.objects)} in {part.role}" for n, part in zip(without, parts))
        lines.append(f"objects without any labelled keypoint: {counts}")
    return lines


def check_keypoint_labels(part: SplitObjects) -> list[Observation]:
    """Look for keypoints that are never labelled, lie far from their object, or look swapped."""
    keypoints = part.annotations.keypoints[part.objects]
    names = keypoint_names(part)
    if not len(keypoints) or not keypoints.shape[1]:
        return []
    labelled = keypoints[:, :, 2] > 0
    seen: list[Observation] = []
    never = [name for name, used in zip(names, labelled.any(axis=0)) if not used]
    if never:
        title = f"{len(never)} of {len(names)} keypoints are never labelled: {', '.join(never)}"
        seen.append(Observation(title, (), "the model cannot learn them; label them, or leave them out", len(never)))
    outside = _distance_outside(part, keypoints, labelled)
    worst = outside.argmax(axis=1)
    seen += observe_worst(
        "objects have a keypoint far outside their box",
        np.where(outside.max(axis=1) > MAX_OUTSIDE, outside.max(axis=1), np.nan),
        lambda n: f"{part.place(n)}: {names[worst[n]]} at {_point(keypoints[n, worst[n]])}",
        "Keypoint R-CNN finds points inside the box only; correct point or box",
    )
    return seen + _check_sides(part, keypoints, names)


def _point(point: np.ndarray) -> str:
    return f"({point[0]:g}, {point[1]:g})"


def _distance_outside(part: SplitObjects, keypoints: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Return how far each labelled point lies outside its box, as a share of the box's side; float64 [N, K]."""
    boxes = part.annotations.boxes_xywh[part.objects]
    offset = keypoints[:, :, :2] - boxes[:, None, :2]
    sides = boxes[:, None, 2:]
    share = np.maximum(-offset, offset - sides) / np.maximum(sides, 1)
    return np.where(labelled, share.max(axis=2), 0)


def _check_sides(part: SplitObjects, keypoints: np.ndarray, names: list[str]) -> list[Observation]:
    """Look for pairs whose left point lies on the other side than usual.

    Usual is what nearly all objects of the dataset show; where they do not agree (persons face both ways), what
    all other pairs of the same object show, if a swap would also shorten the links to them.
    """
    pairs = np.array(part.split.skeleton.flip_pairs or (), dtype=np.int64).reshape(-1, 2)
    if not len(pairs):
        return []
    left, right = keypoints[:, pairs[:, 0]], keypoints[:, pairs[:, 1]]
    width = np.maximum(part.annotations.boxes_xywh[part.objects, 2], 1)[:, None]
    gap = (left[:, :, 0] - right[:, :, 0]) / width  # [N, P], negative where "left" is left in the picture
    clear = (left[:, :, 2] > 0) & (right[:, :, 2] > 0) & (np.abs(gap) > CLEAR_SHARE)
    side = np.where(clear, np.sign(gap), 0)
    num_clear = clear.sum(axis=0)
    mean = side.sum(axis=0) / np.maximum(num_clear, 1)
    is_usual = (num_clear >= MIN_CLEAR_OBJECTS) & (np.abs(mean) >= 2 * USUAL_SHARE - 1)
    against_usual = is_usual & (side * np.sign(mean) < 0)
    others = side.sum(axis=1, keepdims=True) - side
    num_others = clear.sum(axis=1, keepdims=True) - clear
    against_others = ~is_usual & (num_others >= MIN_OTHER_PAIRS) & (side * others == -num_others)
    against_others &= _link_share_after_swap(keypoints, pairs, part.split.skeleton.links) < MAX_LINK_SHARE
    doubt = np.where(against_usual | against_others, np.abs(gap), 0)
    worst = doubt.argmax(axis=1)
    return observe_worst(
        "objects look as if left and right were swapped",
        np.where(doubt.max(axis=1) > 0, doubt.max(axis=1), np.nan),
        lambda n: f"{part.place(n)}: {names[pairs[worst[n], 0]]} and {names[pairs[worst[n], 1]]}",
        "crossed limbs look so too; look at the pictures, and swap what is wrong",
    )


def _link_share_after_swap(keypoints: np.ndarray, pairs: np.ndarray, links: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return how long the links of each pair would be if its two points were swapped, as a share of their length.

    Only links to points of other pairs tell: a shoulder is linked to the elbow of its own side.

    Args:
        keypoints: float64 [N, K, 3].
        pairs: int64 [P, 2].
        links: Joined points.

    Returns:
        float64 [N, P]; infinity where no link tells.
    """
    partner = np.arange(keypoints.shape[1])
    partner[pairs[:, 0]], partner[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    points, labelled = keypoints[:, :, :2], keypoints[:, :, 2] > 0

    def length(a: int, b: int) -> np.ndarray:
        return np.hypot(*(points[:, a] - points[:, b]).T)

    shares = np.full((len(keypoints), len(pairs)), np.inf)
    for p, (a, b) in enumerate(pairs.tolist()):
        ends = {c for x, y in links for c in ((y,) if x == a else (x,) if y == a else ())} - {b}
        now, swapped = np.zeros(len(keypoints)), np.zeros(len(keypoints))
        for c in ends:
            d = int(partner[c])
            if c != d:
                known = labelled[:, [a, b, c, d]].all(axis=1)
                now += np.where(known, length(a, c) + length(b, d), 0)
                swapped += np.where(known, length(b, c) + length(a, d), 0)
        np.divide(swapped, now, out=shares[:, p], where=now > 0)
    return shares
