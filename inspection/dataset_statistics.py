"""What the annotations of a split look like to the model, without opening an image.

All of it is computed on the flat arrays of `Annotations`; keypoints have a file of their own. Nothing here keeps a run
from starting: what does is checked where annotations are read.
"""

import difflib
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_util

from annotations.arrays import Annotations
from inspection.anchor_reach import AnchorReach, ObjectSizes
from inspection.anchor_suggestion import AnchorAdvice
from inspection.observations import Observation, observe_worst
from loading.samples import MIN_BOX_SIDE, clipped_boxes
from loading.split import Split
from pixels.geometry import xywh_to_xyxy

# A class with fewer training objects is called rare.
RARE = 10

# An object is called huge when it covers more of its image.
HUGE_SHARE = 0.95

# A box and its segmentation disagree when an edge is farther off than both of these.
MAX_EDGE_PIXELS = 4.0
MAX_EDGE_SHARE = 0.1

# So many boxes are needed to tell their format, and so large a share over the edge to doubt it.
MIN_BOXES = 5
MIN_BOXES_CORNER = 20
MIN_SHARE_OVER_EDGE = 0.1


@dataclass(frozen=True)
class SplitObjects:
    """The objects of a split that count: no crowds, no empty boxes, only images that are used.

    Attributes:
        role: ``train`` or ``val``.
        split: Where they come from.
        images: int64, the images that are used.
        objects: int64 [N], positions in the annotations.
        image_of: int64 [N], image of each object.
        boxes: float64 [N, 4] xyxy, cut to the image.
        writes_corners: Whether the files have [x1, y1, x2, y2] instead of [x, y, width, height].
    """

    role: str
    split: Split
    images: np.ndarray
    objects: np.ndarray
    image_of: np.ndarray
    boxes: np.ndarray
    writes_corners: bool = False

    @classmethod
    def of(cls, role: str, split: Split, images: np.ndarray, writes_corners: bool = False) -> "SplitObjects":
        """Collect the objects on ``images``, int64."""
        annotations = split.annotations
        image_of = annotations.object_images()
        boxes = clipped_boxes(annotations, image_of, np.arange(annotations.num_objects)).astype(np.float64)
        used = np.zeros(len(annotations), dtype=bool)
        used[images] = True
        counts = used[image_of] & ~annotations.is_crowd & (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(axis=1)
        objects = np.flatnonzero(counts)
        return cls(role, split, images, objects, image_of[objects], boxes[objects], writes_corners)

    @property
    def annotations(self) -> Annotations:
        """All annotations of the split, of which ``objects`` are looked at."""
        return self.split.annotations

    @property
    def sizes(self) -> np.ndarray:
        """(width, height) of the image of each object, int64 [N, 2]."""
        a = self.annotations
        return np.stack([a.widths[self.image_of], a.heights[self.image_of]], axis=1).astype(np.int64)

    def class_name(self, n: int) -> str:
        """Return the class of object ``n`` of these."""
        return dict(self.annotations.categories)[int(self.annotations.category_ids[self.objects[n]])]

    def place(self, n: int) -> str:
        """Return file, class and box of object ``n`` of these, as the file writes them."""
        x, y, width, height = self.annotations.boxes_xywh[self.objects[n]].tolist()
        numbers = [x, y, x + width, y + height] if self.writes_corners else [x, y, width, height]
        box = ", ".join(f"{v:.6g}" for v in numbers)
        return f"{self.annotations.file_name(int(self.image_of[n]))}: {self.class_name(n)} [{box}]"


def format_split(part: SplitObjects) -> list[str]:
    """Return a few lines: images, objects, classes."""
    annotations, is_member = part.annotations, part.split.is_member()
    per_image = np.diff(annotations.object_starts)[is_member]
    heights, widths = annotations.heights[is_member], annotations.widths[is_member]
    num_crowds = np.count_nonzero(annotations.is_crowd & is_member[annotations.object_images()])
    crowds = f", {num_crowds} of them crowds" if num_crowds else ""
    sizes, number = np.unique(
        np.stack([heights.astype(np.int64) * widths, widths, heights]), axis=1, return_counts=True
    )
    shown = [f"{width} x {height}" for _, width, height in sizes.T.tolist()]
    if len(shown) > 3:
        size = f"{shown[0]} to {shown[-1]} pixels"
    else:
        size = ", ".join(f"{count} of {text} pixels" for count, text in zip(number.tolist(), shown))
    counts = sorted(_class_counts(part).items(), key=lambda item: -item[1])
    classes = ", ".join(f"{name} {count}" for name, count in counts[:8] if count)
    more = sum(count > 0 for _, count in counts) - 8
    empty = int((per_image == 0).sum())
    return [
        f"{len(per_image)} images ({size}), {empty} without objects",
        f"{per_image.sum()} objects{crowds}: {classes}" + (f", and {more} classes more" if more > 0 else ""),
    ]


def _class_counts(part: SplitObjects) -> dict[str, int]:
    """Return the number of objects that count of every class."""
    ids = part.annotations.category_ids[part.objects]
    known, counts = np.unique(ids, return_counts=True)
    found = dict(zip(known.tolist(), counts.tolist()))
    return {name: found.get(id_, 0) for id_, name in part.annotations.categories}


def check_classes(train: SplitObjects | None, val: SplitObjects) -> list[Observation]:
    """Look for classes that are rarely used, or only in one split; training warns of those that never are."""
    if train is None:
        return []
    trained, scored = _class_counts(train), _class_counts(val)
    seen = []

    def note(title: str, names: list[str], advice: str) -> None:
        if names:
            shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
            seen.append(Observation(f"{len(names)} of {len(trained)} classes {title}: {shown}", (), advice, len(names)))

    note(
        f"have fewer than {RARE} objects to train on",
        [f"{name} {count}{_like_of(name, trained)}" for name, count in trained.items() if 0 < count < RARE],
        "expect little of them; add pictures, or merge classes",
    )
    note(
        "are trained on and not in val",
        [name for name, count in trained.items() if count and not scored.get(name)],
        "their score will be n/a; move pictures of them to val",
    )
    note(
        "are in val and not trained on",
        [name for name, count in scored.items() if count and not trained.get(name)],
        "all their objects will count as missed",
    )
    return seen


def _like_of(rare: str, counts: dict[str, int]) -> str:
    """Return a question where a rare class has nearly the name of one that is not rare: a misspelt label is a class."""
    common = [name for name, count in counts.items() if count >= RARE]
    likes = difflib.get_close_matches(rare, common, n=1, cutoff=0.8)
    return f" (is {likes[0]!r} meant?)" if likes else ""


def check_sizes(
    part: SplitObjects, resized: ObjectSizes, reach: AnchorReach, advice: AnchorAdvice | None, is_fixed: bool
) -> list[Observation]:
    """Look for objects that are tiny or huge after the model's resize, and for boxes that no anchor reaches.

    Args:
        part: The objects.
        resized: They after the model's resize.
        reach: How well the model's anchors fit the resized boxes.
        advice: Anchors that fit better.
        is_fixed: Whether the model resizes all pictures to one size, whatever the flags.
    """
    larger = "a model with another size" if is_fixed else "a larger --min-size"
    sides = resized.boxes[:, 2:] - resized.boxes[:, :2]
    short = sides.min(axis=1)

    def shown(n: int) -> str:
        return f"{part.place(n)} is {sides[n, 0]:.1f} x {sides[n, 1]:.1f} pixels for the model"

    share = (part.boxes[:, 2:] - part.boxes[:, :2]).prod(axis=1) / part.sizes.prod(axis=1)
    seen = observe_worst(
        f"objects are narrower than {reach.stride:g} pixels (a cell of the finest map) after the model's resize",
        np.where(short < reach.stride, -short, np.nan),
        shown,
        f"they are hard to find; {larger}, a model with finer maps, or pictures cut into parts help",
    )
    seen += observe_worst(
        f"objects cover more than {HUGE_SHARE:.0%} of their picture",
        np.where(share > HUGE_SHARE, share, np.nan),
        lambda n: f"{part.place(n)} covers {share[n]:.0%}",
        "a box around the whole picture teaches little; is it meant?",
    )
    if reach.wanted == 1:  # FCOS: points instead of anchors
        seen += observe_worst(
            "objects are trained on by no location of FCOS",
            np.where(reach.best == 0, -short, np.nan),
            shown,
            f"they are too thin or too small between its points; {larger} or a model with anchors helps",
        )
    else:
        remedy = f"{'a model with another size' if is_fixed else 'another --min-size'}, or one with finer maps helps"
        if advice is not None:
            remedy = f"anchors that fit better: {advice.flags}"
        seen += observe_worst(
            f"objects have no anchor with even IoU {reach.least:g}",
            np.where(reach.best < reach.least, -reach.best, np.nan),
            lambda n: f"{shown(n)}, its best anchor has IoU {reach.best[n]:.2f}",
            f"each is trained on by that one alone; {remedy}",
        )
    return seen


def format_sizes(resized: ObjectSizes, reach: AnchorReach, advice: AnchorAdvice | None) -> list[str]:
    """Return lines about size and anchors of all objects."""
    if not len(reach.best):
        return []
    sides = resized.boxes[:, 2:] - resized.boxes[:, :2]
    (width, height), (low, high) = np.median(sides, axis=0), np.quantile(sides.max(axis=1), (0.05, 0.95))
    lines = [
        f"objects after the model's resize: {width:.0f} x {height:.0f} pixels in the median, "
        f"9 in 10 have a longer side of {low:.0f} to {high:.0f}"
    ]
    if reach.wanted < 1:
        lines.append(
            f"anchors: {np.mean(reach.best < reach.wanted):.0%} of the objects have none with IoU {reach.wanted:g} and "
            f"are trained on by their best one alone; best IoU {np.median(reach.best):.2f} in the median"
        )
    if advice is not None:
        lines.append(f"with {advice.count} anchors a place it is {advice.missed:.0%}; add to the flags of training:")
        lines.append(f"      {advice.flags}")
    return lines


def check_box_format(part: SplitObjects) -> list[Observation]:
    """Look for corners written where width and height belong, or the other way round."""
    boxes, sizes = part.annotations.boxes_xywh[part.objects], part.sizes
    over = (boxes[:, :2] + boxes[:, 2:] > sizes + 1).any(axis=1)
    if not part.writes_corners and len(boxes) >= MIN_BOXES:
        fits = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= sizes + 1).all(axis=1)
        if fits.all() and over.mean() >= MIN_SHARE_OVER_EDGE:
            return observe_worst(
                "boxes lie over the edge of their picture, and none would if they were [x1, y1, x2, y2]",
                np.where(over, boxes[:, 2], np.nan),
                part.place,
                "COCO's boxes are [x, y, width, height]; convert them, the model would learn wrong ones",
            )
    if part.writes_corners and len(boxes) >= MIN_BOXES_CORNER:
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        if (centres <= sizes / 2 + 1).all():
            return observe_worst(
                "boxes lie in the top left quarter of their picture, as [x, y, width, height] would",
                boxes[:, 0],
                part.place,
                "write boxes as [x1, y1, x2, y2] if these are not; --view shows them",
            )
    return []


def check_segmentations_against_boxes(part: SplitObjects) -> list[Observation]:
    """Look for segmentations that fill another box than the object's, and for areas larger than the box."""
    annotations, objects = part.annotations, part.objects
    seen: list[Observation] = []
    boxes = xywh_to_xyxy(annotations.boxes_xywh[objects])
    if annotations.has_segmentations:
        bounds = _segmentation_bounds(annotations)[objects]
        sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1)
        distance = np.abs(bounds - boxes)  # NaN without a segmentation
        off = ((distance > MAX_EDGE_PIXELS) & (distance > MAX_EDGE_SHARE * np.tile(sides, 2))).any(axis=1)
        seen = observe_worst(
            "segmentations fill another box than their object's",
            np.where(off, distance.max(axis=1), np.nan),
            lambda n: f"{part.place(n)}, the segmentation is {distance[n].max():.0f} pixels off",
            "box and mask are learned side by side; correct the wrong one",
        )
    area, box_area = annotations.areas[objects], (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return seen + observe_worst(
        "areas are larger than their box",
        np.where(area > 1.02 * box_area + 1, area / np.maximum(box_area, 1e-9), np.nan),
        lambda n: f"{part.place(n)} has area {area[n]:.6g}, its box {box_area[n]:.6g}",
        "AP by size and OKS read the area; leave it out and it is computed",
    )


def _segmentation_bounds(annotations: Annotations) -> np.ndarray:
    """Return the xyxy box of every object's segmentation, float64 [N, 4]; NaN without one."""
    bounds = np.full((annotations.num_objects, 4), np.nan)
    starts = annotations.polygon_starts[annotations.object_polygons]
    filled = np.flatnonzero(np.diff(starts) > 0)
    if len(filled):
        first = starts[filled] // 2  # every polygon has an even number of coordinates
        for axis in (0, 1):
            values = annotations.polygon_points[axis::2]
            bounds[filled, axis] = np.minimum.reduceat(values, first)
            bounds[filled, axis + 2] = np.maximum.reduceat(values, first)
    encoded = np.flatnonzero(np.diff(annotations.rle_starts) > 0)
    if len(encoded):
        image_of = annotations.object_images()
        sizes = zip(annotations.heights[image_of[encoded]].tolist(), annotations.widths[image_of[encoded]].tolist())
        rles = [{"size": list(size), "counts": annotations.rle(n)} for n, size in zip(encoded.tolist(), sizes)]
        bounds[encoded] = xywh_to_xyxy(mask_util.toBbox(rles))
    return bounds


def check_repeated_objects(part: SplitObjects) -> list[Observation]:
    """Look for objects that are annotated twice: same picture, class and box."""
    ids = part.annotations.category_ids[part.objects]
    rows = np.column_stack([part.image_of, ids, part.annotations.boxes_xywh[part.objects]])
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    is_repeat = first[inverse.reshape(-1)] != np.arange(len(rows))
    return observe_worst(
        "objects have class and box of another one on the same picture",
        np.where(is_repeat, 0.0, np.nan),
        part.place,
        "remove one of each pair: the model cannot find both, and one counts as missed",
    )
