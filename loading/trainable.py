"""How many objects of a split can really be trained on, and how many are left out and why.

The one place that counts them: training's start, its plan and check_dataset.py all speak from it. It reads the flat
arrays only and opens no picture.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np

from annotations.arrays import Annotations
from annotations.findings import Findings
from annotations.labels import LabelMap
from annotations.normalised import NORMALISED, look_normalised
from loading.samples import MIN_BOX_SIDE, clipped_boxes
from loading.split import Split
from loading.splits import Data
from models.architectures import ModelSpec
from models.resize import describe_vanishing, leaves_nothing, resize_scales, short_sides

logger = logging.getLogger(__name__)

# Fewer objects than this teach a model nothing that holds on other pictures.
FEW = 10

# Warned of where more than this share of the objects is left out.
MAX_LEFT_OUT = 0.5

# Classes that a warning names.
MAX_NAMES = 20

# Why an object is left out, in the order in which it is asked; the first that holds counts.
CROWD, EMPTY, UNKNOWN, VANISHES, UNUSABLE, UNUSED = REASONS = (
    "are crowds (iscrowd 1)",
    "have a box without an inside",
    "are of a class that the model does not know",
    "are less than a pixel wide or high after the model's resize",
    "are on pictures that cannot be used",
    "are on pictures without enough to train on",
)


@dataclass(frozen=True, eq=False)
class Trainable:
    """The objects of a split, counted.

    Attributes:
        name: What messages call the split.
        categories: (id, name) of every class.
        counts: int64 [C], objects of each class that are trained on.
        left_out: int64 [reasons, C], objects of each class that are not, in the order of `REASONS`.
        dropped: Objects that were left out while reading, with ``--on-bad-data skip``: `Annotations.num_dropped`.
        boxes: Objects, crowds aside, whose box has a width and a height.
        normalised: Those of them whose boxes look like shares of the picture.
        has_points: Whether objects left out for their box have labelled keypoints.
    """

    name: str
    categories: tuple[tuple[int, str], ...]
    counts: np.ndarray
    left_out: np.ndarray
    dropped: int
    boxes: int
    normalised: int
    has_points: bool

    @property
    def num_objects(self) -> int:
        """Objects that are trained on."""
        return int(self.counts.sum())

    @property
    def reasons(self) -> dict[str, int]:
        """How many objects are left out for which reason; without those for which none is."""
        numbers = dict(zip(REASONS, self.left_out.sum(axis=1).tolist()))
        numbers["were dropped while reading (--on-bad-data skip)"] = self.dropped
        return {reason: number for reason, number in numbers.items() if number}

    def format_counts(self) -> str:
        """Return the counts in one line."""
        left_out = sum(self.reasons.values())
        text = f"{self.num_objects} to train on"
        return f"{text}, {left_out} left out: {self._why()}" if left_out else text

    def _why(self) -> str:
        return ", ".join(f"{number} {reason}" for reason, number in self.reasons.items())

    def check(self) -> None:
        """Warn where few objects are left, or a class has none.

        Raises:
            ValueError: None is left, or all boxes are shares of the picture; with the cause and what to do.
        """
        total = int(self.left_out.sum()) + self.num_objects
        if self.normalised and self.normalised == self.boxes:
            raise ValueError(f"{self.name}: {NORMALISED}; all {self.normalised} boxes do")
        if not self.num_objects:
            why = f": of {total + self.dropped}, {self._why()}" if total + self.dropped else ""
            raise ValueError(f"{self.name}: no object is left to train on{why}{self._advice()}")
        if self.normalised:
            logger.warning("%s: %d of %d %s", self.name, self.normalised, self.boxes, NORMALISED)
        left_out = sum(self.reasons.values())
        if left_out > MAX_LEFT_OUT * (left_out + self.num_objects):
            logger.warning("%s: most objects are left out, %s", self.name, self.format_counts())
        if self.num_objects < FEW:
            logger.warning("%s: only %d object(s) to train on; add pictures", self.name, self.num_objects)
        without = [name for (_, name), count in zip(self.categories, self.counts.tolist()) if not count]
        if without:
            shown = ", ".join(without[:MAX_NAMES])
            shown += f", and {len(without) - MAX_NAMES} more" if len(without) > MAX_NAMES else ""
            text = "%d of %d classes have no object to train on: %s%s; the model cannot learn them from %s: %s"
            lost = int(self.left_out[:, self.counts == 0].sum())
            why = f" ({lost} object(s) of theirs are left out)" if lost else ""
            advice = "add pictures, or remove the class"
            logger.warning(text, len(without), len(self.categories), shown, why, self.name, advice)

    def _advice(self) -> str:
        """Return what helps against the reason that takes most objects."""
        if not self.left_out.any():
            return "; mend what the warnings above name" if self.dropped else ""
        reason = REASONS[int(np.argmax(self.left_out.sum(axis=1)))]
        if reason == EMPTY and self.has_points:
            return (
                "; points are learned inside boxes: give each object a box around its points with a margin, for a "
                "single point a square about as large as what it marks"
            )
        advice = {
            CROWD: "iscrowd 1 marks a region to ignore: write iscrowd 0 for single objects (annotation tools set it "
            "for every brush mask)",
            EMPTY: "write boxes with a width and a height above 0, inside the picture",
            UNKNOWN: "train on classes that the model knows",
            VANISHES: "raise --min-size and --max-size, or cut the pictures into parts",
            UNUSABLE: "mend the pictures that the warnings above name",
            UNUSED: "--keep-negatives trains on all pictures",
        }
        return f"; {advice[reason]}"


def count_trainable(split: Split, label_map: LabelMap, spec: ModelSpec, images: np.ndarray) -> Trainable:
    """Count the objects of a split.

    Args:
        split: Holds the images and their objects.
        label_map: Classes of the model.
        spec: Says how far the model shrinks an image; objects under a pixel then are left out.
        images: Which images are trained on, int64.
    """
    annotations = split.annotations
    image_of = annotations.object_images()
    is_member = split.is_member()[image_of]
    is_empty = _is_empty(annotations)
    reason = _reasons(split, label_map, spec, images)
    num_classes = len(annotations.categories)
    cells = reason * num_classes + annotations.object_classes()
    table = np.bincount(cells[is_member], minlength=(len(REASONS) + 1) * num_classes).reshape(-1, num_classes)
    normalised = look_normalised(annotations.boxes_xywh, annotations.heights[image_of], annotations.widths[image_of])
    has_box = (annotations.boxes_xywh[:, 2:] > 0).all(axis=1) & ~annotations.is_crowd & is_member
    empty_ones = is_empty & ~annotations.is_crowd & is_member
    return Trainable(
        split.name,
        annotations.categories,
        table[-1],
        table[:-1],
        annotations.num_dropped,
        int(has_box.sum()),
        int((normalised & has_box).sum()),
        bool((annotations.keypoints[empty_ones, :, 2] > 0).any()),
    )


def is_trained_on(split: Split, label_map: LabelMap, spec: ModelSpec, images: np.ndarray) -> np.ndarray:
    """Return which objects are trained on, bool [N]; the arguments are those of `count_trainable`."""
    return _reasons(split, label_map, spec, images) == len(REASONS)


def _reasons(split: Split, label_map: LabelMap, spec: ModelSpec, images: np.ndarray) -> np.ndarray:
    """Return which of `REASONS` leaves each object out, int64 [N]; their number for one that is trained on."""
    annotations = split.annotations
    image_of = annotations.object_images()
    boxes = clipped_boxes(annotations, image_of, slice(None))
    is_usable, is_used = (np.isin(np.arange(len(annotations)), chosen) for chosen in (split.indices, images))
    largest = max(short_sides(spec))
    scales = np.stack(resize_scales(annotations.heights, annotations.widths, spec, short_side=largest), axis=1)
    is_known = np.isin(annotations.category_ids, label_map.category_ids)
    vanishes = ((boxes[:, 2:] - boxes[:, :2]) * scales[image_of] < 1).any(axis=1)
    is_empty = _is_empty(annotations)
    excluded = [annotations.is_crowd, is_empty, ~is_known, vanishes, ~is_usable[image_of], ~is_used[image_of]]
    return np.select(excluded, range(len(REASONS)), default=len(REASONS))


def _is_empty(annotations: Annotations) -> np.ndarray:
    """Return which objects have a box without an inside, bool [N]."""
    boxes = clipped_boxes(annotations, annotations.object_images(), slice(None))
    return (boxes[:, 2:] - boxes[:, :2] < MIN_BOX_SIDE).any(axis=1)


def vanishing_images(annotations: Annotations, spec: ModelSpec) -> np.ndarray:
    """Return the images of which the model's resize leaves no pixel in one direction, int64."""
    smallest = min(short_sides(spec))
    return np.flatnonzero(leaves_nothing(annotations.heights, annotations.widths, spec, short_side=smallest))


def check_against_model(data: Data, spec: ModelSpec, on_bad_data: str) -> Data:
    """Refuse images that the model's resize would shrink to nothing, or leave them out with a warning.

    Warns too where the validation split has no object to score or boxes that are shares of the picture.

    Raises:
        BadDataError: There are such images and ``on_bad_data`` is ``error``.
        ValueError: No image is left.
    """
    findings = Findings(on_bad_data)
    splits: list[Split | None] = []
    for split in (data.train, data.val):
        splits.append(None if split is None else _without_vanishing(split, spec, findings))
    findings.raise_errors()
    for warning in findings.warnings():
        logger.warning("%s", warning)
    train, val = splits
    assert val is not None
    for left, purpose in ((train, "train"), (val, "evaluate")):
        if left is not None and not len(left.indices):
            raise ValueError(f"{left.name}: no images to {purpose} on")
    of_val = count_trainable(val, data.label_map, spec, val.indices)
    if of_val.normalised:
        logger.warning("%s: %d of %d %s", val.name, of_val.normalised, of_val.boxes, NORMALISED)
    if not of_val.boxes:
        logger.warning("%s: no object to score; objects: %s", val.name, of_val.format_counts())
    return replace(data, train=train, val=val)


def _without_vanishing(split: Split, spec: ModelSpec, findings: Findings) -> Split:
    annotations = split.annotations
    gone = np.intersect1d(vanishing_images(annotations, spec), split.indices)
    for i in gone.tolist():
        problem = describe_vanishing(annotations.heights[i], annotations.widths[i])
        remedy = "cut it into parts, raise --max-size, or remove it"
        place = f"{split.name}: {annotations.file_name(i)}"
        findings.error("thin image", place, problem, remedy, image=i)
    return replace(split, indices=np.setdiff1d(split.indices, gone)) if len(gone) else split
