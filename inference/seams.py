"""What was found in overlapping tiles, joined: every object once, and whole where any tile shows it whole.

Two detections of a class from different tiles are of one object

- where no border cuts either: if they overlap as much as a model's own suppression allows no two of its boxes to do,
- where a border cuts one of them: if the other covers this piece (its share of the piece counts, not the IoU),
- where each is cut by a border towards the other: if both are the same in the part of the picture that both tiles show.

A detection is cut where it reaches an inner border of its tile. Of several candidates in a tile the one that agrees
best in the common part is taken, so that an object in front of another of its class keeps to itself. Detections of one
tile are never joined: the model has told them apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pixels.masks import MaskBlock

# Overlaps from here on are one object; models suppress boxes of the same class from an IoU of 0.45 to 0.6 on.
SAME = 0.5
# How near to a border a box is cut by it: boxes are off by some share of their size.
REACH_SHARE = 0.05
REACH_PIXELS = 2.0
# A detection with less than this share of another's score is not used to complete it, only taken for the same.
SCORE_SHARE = 0.25


@dataclass(frozen=True)
class Pieces:
    """Detections in the pixels of the whole picture.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        labels: int64 [N].
        scores: float32 [N].
        masks: N blocks; None where the model has none.
        keypoints: float32 [N, K, 3]; None where the model has none.
        heats: float32 [N, K], how sure the model is of each keypoint; None where unknown.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[MaskBlock] | None = None
    keypoints: np.ndarray | None = None
    heats: np.ndarray | None = None


class _Link(NamedTuple):
    """One detection that is perhaps of the same object as another.

    Attributes:
        other: Its number.
        agreement: IoU of both in the part of the picture that both tiles show.
        inside: Whether the first one is a piece that this one covers.
    """

    other: int
    agreement: float
    inside: bool


def join_pieces(parts: Sequence[Pieces], windows: np.ndarray) -> Pieces:
    """Join what was found in the tiles of a picture.

    A joined object has the best score of its pieces. Box, mask and keypoints are those of the best detection that no
    border cuts; without one they are put together from the pieces.

    Args:
        parts: The detections of each tile.
        windows: int64 [T, 4], the tiles as x1, y1, x2, y2; the outermost end where the picture ends.

    Returns:
        The objects in falling order of scores.
    """
    tiles = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    pieces = Pieces(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.scores for part in parts]),
        None if parts[0].masks is None else [mask for part in parts for mask in part.masks or ()],
        None if parts[0].keypoints is None else np.concatenate([part.keypoints for part in parts]),
        None if parts[0].heats is None else np.concatenate([part.heats for part in parts]),
    )
    cut = _cut_sides(pieces.boxes, windows[tiles], windows)
    links = _find_links(pieces, cut, tiles, windows)
    groups = _Grouping(pieces.scores, tiles, links).groups
    return _stack([_one_object(pieces, np.array(group), cut, links) for group in groups], pieces)


def _cut_sides(boxes: np.ndarray, own: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Return which sides of a box a border within the picture cuts, bool [N, 4] as left, top, right, bottom.

    Args:
        boxes: float32 [N, 4] xyxy.
        own: int64 [N, 4], the tile of each.
        windows: int64 [T, 4], all tiles.
    """
    picture = np.r_[windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)]
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    reach = np.maximum(REACH_PIXELS, REACH_SHARE * sides)
    return (np.abs(boxes - own) <= reach) & (own != picture)


def _find_links(pieces: Pieces, cut: np.ndarray, tiles: np.ndarray, windows: np.ndarray) -> list[list[_Link]]:
    """Return for each detection those of other tiles that may be of the same object."""
    links: list[list[_Link]] = [[] for _ in tiles]
    bounds = np.searchsorted(tiles, np.arange(len(windows) + 1))
    for a, b, common in _neighbours(windows):
        first, second = _touching(pieces, *(np.arange(*bounds[n : n + 2]) for n in (a, b)))
        # Only a side beyond which the other tile sees more cuts towards it.
        cut_first = (cut[first] & _is_passed(windows[a], windows[b])).any(axis=1)
        cut_second = (cut[second] & _is_passed(windows[b], windows[a])).any(axis=1)
        both, of_first, of_second, seen_first, seen_second = _areas(pieces, first, second, common)
        agreement = both / np.maximum(seen_first + seen_second - both, 1e-9)
        share_first, share_second = both / np.maximum(of_first, 1e-9), both / np.maximum(of_second, 1e-9)
        iou = both / np.maximum(of_first + of_second - both, 1e-9)
        goes_on = cut_first & cut_second & (agreement >= SAME)
        # A piece is the smaller one: of two that are cut and do not agree, the one with less area.
        first_inside = cut_first & ~goes_on & (share_first >= SAME) & (~cut_second | (of_first <= of_second))
        second_inside = cut_second & ~goes_on & (share_second >= SAME) & (~cut_first | (of_first > of_second))
        is_same = goes_on | first_inside | second_inside | (~cut_first & ~cut_second & (iou >= SAME))
        for n in np.flatnonzero(is_same).tolist():
            i, j = int(first[n]), int(second[n])
            links[i].append(_Link(j, float(agreement[n]), bool(first_inside[n])))
            links[j].append(_Link(i, float(agreement[n]), bool(second_inside[n])))
    return links


def _neighbours(windows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield each pair of tiles that have pixels in common, and these as x1, y1, x2, y2."""
    for a, window in enumerate(windows):
        common = _clip(windows[a + 1 :], window)
        for n in np.flatnonzero((common[:, :2] < common[:, 2:]).all(axis=1)).tolist():
            yield a, a + 1 + n, common[n]


def _is_passed(window: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return beyond which sides of a tile another one sees more, bool [4]."""
    return np.r_[other[:2] < window[:2], other[2:] > window[2:]]


def _touching(pieces: Pieces, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of the two tiles' detections that are of one class and whose boxes overlap, int64 [P] each."""
    a, b = pieces.boxes[first][:, None], pieces.boxes[second][None]
    overlap = (np.minimum(a[..., 2:], b[..., 2:]) > np.maximum(a[..., :2], b[..., :2])).all(axis=-1)
    rows, columns = np.nonzero(overlap & (pieces.labels[first][:, None] == pieces.labels[second][None]))
    return first[rows], second[columns]


def _areas(pieces: Pieces, first: np.ndarray, second: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return areas of pairs, float64 [P] each: what both cover, each whole, and each within ``common`` (xyxy)."""
    if pieces.masks is None:
        a, b = (pieces.boxes[part].astype(np.float64) for part in (first, second))
        return _area(_clip(a, b)), _area(a), _area(b), _area(_clip(a, common)), _area(_clip(b, common))
    masks = pieces.masks
    used = set(first.tolist()) | set(second.tolist())
    whole = {n: np.count_nonzero(masks[n].pixels) for n in used}
    seen = {n: np.count_nonzero(_cut_out(masks[n], common)) for n in used}
    both = [_shared_pixels(masks[i], masks[j]) for i, j in zip(first.tolist(), second.tolist())]
    columns = [both, *([counts[n] for n in part.tolist()] for counts in (whole, seen) for part in (first, second))]
    return tuple(np.array(column, dtype=np.float64) for column in columns)


def _clip(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what boxes share with others, xyxy; empty where a side is not positive."""
    return np.concatenate(
        [np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])], axis=-1
    )


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1)


def _cut_out(mask: MaskBlock, window: np.ndarray | tuple[int, ...]) -> np.ndarray:
    """Return the pixels of a mask within a window of the picture, as far as its block reaches."""
    left, top, right, bottom = (int(side) for side in window)
    rows = slice(max(top - mask.top, 0), max(bottom - mask.top, 0))
    return mask.pixels[rows, max(left - mask.left, 0) : max(right - mask.left, 0)]


def _window(mask: MaskBlock) -> tuple[int, int, int, int]:
    """Return where a mask's block lies, xyxy."""
    height, width = mask.pixels.shape
    return mask.left, mask.top, mask.left + width, mask.top + height


def _shared_pixels(a: MaskBlock, b: MaskBlock) -> int:
    """Return how many pixels two masks have in common."""
    ours, theirs = _cut_out(a, _window(b)), _cut_out(b, _window(a))
    return int(np.count_nonzero(ours & theirs)) if ours.size else 0


class _Grouping:
    """Puts detections of one object into one group, the best scores first.

    Attributes:
        groups: The detections that each object is made of, the best first. Those that are only taken for the same as
            one of them are in no group.
    """

    def __init__(self, scores: np.ndarray, tiles: np.ndarray, links: list[list[_Link]]) -> None:
        self.groups: list[list[int]] = []
        self._scores, self._tiles, self._links = scores, tiles, links
        self._group_of = np.full(len(scores), -1)
        for n in np.argsort(-scores, kind="stable").tolist():
            if self._group_of[n] < 0:
                known = self._known(n)
                self._group_of[n] = len(self.groups) if known is None else known
                if known is None:
                    self.groups.append([n])
                    self._grow(self.groups[-1])

    def _partners(self, n: int) -> dict[int, _Link]:
        """Return the best link into each other tile, of those whose score is not far below."""
        best: dict[int, _Link] = {}
        for link in self._links[n]:
            tile = int(self._tiles[link.other])
            if self._scores[link.other] >= SCORE_SHARE * self._scores[n] and (
                tile not in best or link.agreement > best[tile].agreement
            ):
                best[tile] = link
        return best

    def _known(self, n: int) -> int | None:
        """Return the group that shows the object of a detection already."""
        for link in self._partners(n).values():
            group = int(self._group_of[link.other])
            if group >= 0 and (link.inside or self._tiles[n] not in self._tiles[self.groups[group]]):
                return group
        return None

    def _grow(self, group: list[int]) -> None:
        """Add to a group what other tiles show of its object, one detection of each."""
        taken = {int(self._tiles[group[0]])}
        for member in group:  # grows meanwhile
            for tile, link in self._partners(member).items():
                other = link.other
                if tile in taken or self._group_of[other] >= 0:
                    continue
                back = self._partners(other).get(int(self._tiles[member]))
                if self._scores[other] < SCORE_SHARE * self._scores[group[0]] or back is None or back.other != member:
                    continue
                taken.add(tile)
                group.append(other)
                self._group_of[other] = self._group_of[group[0]]


def _one_object(pieces: Pieces, group: np.ndarray, cut: np.ndarray, links: list[list[_Link]]) -> Pieces:
    """Return the one object that detections, the best first, are of."""
    score = pieces.scores[group[:1]]
    whole = group[~cut[group].any(axis=1)]
    if len(whole):
        parts = whole[:1]
    else:
        # A piece that another one covers adds nothing but its errors. Where each covers another one, in a circle, the
        # largest stands for all.
        members = set(group.tolist())
        covered = [any(link.inside and link.other in members for link in links[n]) for n in group.tolist()]
        parts = group[~np.array(covered)]
        if not len(parts):
            parts = group[[np.argmax(_area(pieces.boxes[group]))]]
    best = parts[np.argmax(pieces.scores[parts])]
    boxes = pieces.boxes[parts]
    box = np.r_[boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]
    masks = None if pieces.masks is None else [_unite([pieces.masks[n] for n in parts.tolist()])]
    keypoints = None
    if pieces.keypoints is not None:
        keypoints = pieces.keypoints[best]
        if len(parts) > 1 and pieces.heats is not None:  # each from the piece that is surest of it
            surest = parts[np.argmax(pieces.heats[parts], axis=0)]
            keypoints = pieces.keypoints[surest, np.arange(len(surest))]
        keypoints = keypoints[None]
    return Pieces(box[None], pieces.labels[best][None], score, masks, keypoints)


def _unite(masks: list[MaskBlock]) -> MaskBlock:
    """Return the union of masks."""
    if len(masks) == 1:
        return masks[0]
    corners = np.array([_window(mask) for mask in masks if mask.pixels.size])
    if not len(corners):
        return masks[0]
    left, top = corners[:, :2].min(axis=0).tolist()
    right, bottom = corners[:, 2:].max(axis=0).tolist()
    pixels = np.zeros((bottom - top, right - left), dtype=np.uint8)
    for mask in masks:
        x1, y1, x2, y2 = _window(mask)
        if mask.pixels.size:
            pixels[y1 - top : y2 - top, x1 - left : x2 - left] |= mask.pixels
    return MaskBlock(left, top, pixels)


def _stack(objects: list[Pieces], like: Pieces) -> Pieces:
    """Return single objects as one record, with the fields that ``like`` has."""
    if not objects:
        empty = slice(0)
        keypoints = None if like.keypoints is None else like.keypoints[empty]
        return Pieces(
            like.boxes[empty], like.labels[empty], like.scores[empty], None if like.masks is None else [], keypoints
        )
    return Pieces(
        np.concatenate([found.boxes for found in objects]),
        np.concatenate([found.labels for found in objects]),
        np.concatenate([found.scores for found in objects]),
        None if like.masks is None else [mask for found in objects for mask in found.masks or ()],
        None if like.keypoints is None else np.concatenate([found.keypoints for found in objects]),
    )
