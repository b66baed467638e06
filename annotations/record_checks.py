"""What may be wrong with COCO's records, each found by one line that names place and field.

The only place that checks annotations: files of all formats are brought into COCO's records first. Each check returns
its field as an array, so that a record is read once; `coco_utils` puts the arrays together.
"""

import array
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from annotations.findings import Findings
from annotations.normalised import NORMALISED, look_normalised
from pixels.images import unsafe_file_name
from pixels.masks import compress_rle, run_lengths

Record = dict[str, Any]

# The overlaps of so many boxes with all anchors of an 800 x 1333 picture take 10 GB, whatever the model; real pictures
# of crowds, cells or shelves show a few thousand.
MAX_OBJECTS_PER_IMAGE = 10_000


@dataclass(frozen=True)
class Rules:
    """What counts as an error.

    Attributes:
        file: The annotation file or folder, for messages.
        image_place: Tells where the image at a position of the list stands.
        object_place: Tells where the object at a position of the list stands.
        strict_boxes: Whether empty boxes and boxes over the image's edge are errors. COCO's own files have
            both: such boxes are not trained on, or cut to the image, and scored as the file says.
        box_format: How the file writes boxes, for messages.
    """

    file: str
    image_place: Callable[[int], str]
    object_place: Callable[[int], str]
    strict_boxes: bool = False
    box_format: str = "[x, y, width, height]"


def flat_floats(rows: Iterable[list[float]]) -> np.ndarray:
    """Return the numbers of all lists as one float64 array; an array takes a list in far less time than numpy does."""
    numbers = array.array("d")
    for row in rows:
        numbers.fromlist(row)
    return np.frombuffer(numbers, dtype=np.float64)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def check_categories(categories: Sequence[Record], rules: Rules, findings: Findings) -> dict[int, str]:
    """Return {id: name}."""
    names: dict[int, str] = {}
    for k, record in enumerate(categories):
        place = f"{rules.file}: categories[{k}]"
        id_, name = record.get("id"), record.get("name")
        if not _is_int(id_) or not isinstance(name, str):
            findings.error("category", place, f"expected an integer id and a name, got {id_!r} and {name!r}", "fix it")
        elif id_ in names:
            findings.error("category", place, f"category id {id_} occurs twice", "give every category its own id")
        else:
            names[id_] = name
    double = {name for name in names.values() if list(names.values()).count(name) > 1}
    for id_, name in names.items():
        if name in double:  # figures go by the name
            names[id_] = f"{name} (id {id_})"
            findings.warn(
                "category", rules.file, f"another category is called {name!r} too", f"it is {names[id_]!r} here"
            )
    if not categories:
        findings.error("category", rules.file, "no categories", "list the classes under 'categories'")
    return names


def check_images(
    images: Sequence[Record], rules: Rules, findings: Findings
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return (ids int64, heights int32, widths int32, file names); bad entries hold zeros."""
    ids = np.zeros(len(images), dtype=np.int64)
    heights, widths = np.zeros(len(images), dtype=np.int32), np.zeros(len(images), dtype=np.int32)
    names: list[str] = []
    first_with: dict[int, int] = {}
    for i, record in enumerate(images):
        id_, name = record.get("id"), record.get("file_name")
        height, width = record.get("height"), record.get("width")
        names.append(name if isinstance(name, str) else "")
        if not _is_int(id_):
            findings.error("image", rules.image_place(i), f"expected an integer id, got {id_!r}", "fix it", image=i)
            continue
        if id_ in first_with:
            problem = f"image id {id_} is also that of {rules.image_place(first_with[id_])}"
            findings.error("image", rules.image_place(i), problem, "give every image its own id", image=i)
            continue
        first_with[id_] = i
        ids[i] = id_
        reason = unsafe_file_name(name) if isinstance(name, str) else "no file name"
        if reason is not None:
            problem = f"file_name {name!r} is {reason}"
            findings.error("image", rules.image_place(i), problem, "name a file inside the image folder", image=i)
        if not (_is_int(height) and _is_int(width) and 0 < height < 1 << 20 and 0 < width < 1 << 20):
            problem = f"expected positive integer height and width, got {height!r} and {width!r}"
            findings.error("image", rules.image_place(i), problem, "write the image's size", image=i)
        else:
            heights[i], widths[i] = height, width
    return ids, heights, widths, names


def check_objects(
    objects: Sequence[Record], image_ids: np.ndarray, category_ids: set[int], rules: Rules, findings: Findings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (boxes float64 [N, 4], category ids int64 [N], image position int64 [N]); bad entries hold zeros."""
    position_of = {int(id_): i for i, id_ in reversed(list(enumerate(image_ids)))}
    positions, categories = np.zeros(len(objects), dtype=np.int64), np.zeros(len(objects), dtype=np.int64)
    first_with: dict[Any, int] = {}
    for n, record in enumerate(objects):
        image_id, category_id, id_ = record.get("image_id"), record.get("category_id"), record.get("id")
        if not _is_int(image_id) or image_id not in position_of:
            problem = f"image_id {image_id!r} is not among the images"
            findings.error("object", rules.object_place(n), problem, "fix the id or remove the entry", obj=n)
        else:
            positions[n] = position_of[image_id]
        if not _is_int(category_id) or category_id not in category_ids:
            problem = f"category_id {category_id!r} is not among the categories"
            findings.error("object", rules.object_place(n), problem, "fix the id or add the category", obj=n)
        else:
            categories[n] = category_id
        if id_ is None:
            continue
        if not isinstance(id_, (int, str)):
            problem = f"expected an integer id, got {_short(id_)}"
            findings.error("object", rules.object_place(n), problem, "fix it", obj=n)
            continue
        if id_ in first_with:
            problem = f"annotation id {id_} is also that of {rules.object_place(first_with[id_])}"
            findings.error("object", rules.object_place(n), problem, "give every annotation its own id", obj=n)
        first_with[id_] = n
    _check_counts(objects, positions, position_of, rules, findings)
    return _number_rows(objects, "bbox", 4, rules, findings), categories, positions


def _check_counts(
    objects: Sequence[Record], positions: np.ndarray, position_of: dict[int, int], rules: Rules, findings: Findings
) -> None:
    """Report images with more objects than can be trained on."""
    if len(objects) <= MAX_OBJECTS_PER_IMAGE:
        return
    ids = [record.get("image_id") for record in objects]
    counts = np.bincount(positions[[_is_int(id_) and id_ in position_of for id_ in ids]])
    for i in np.flatnonzero(counts > MAX_OBJECTS_PER_IMAGE).tolist():
        problem = f"{counts[i]} objects in one image are more than the limit of {MAX_OBJECTS_PER_IMAGE}"
        findings.error("image", rules.image_place(i), problem, "cut the picture into smaller ones", image=i)


def _number_rows(objects: Sequence[Record], name: str, length: int, rules: Rules, findings: Findings) -> np.ndarray:
    """Return field ``name`` of every object as float64 [N, length]; an entry that is no such list holds zeros."""
    try:
        rows = np.array([record[name] for record in objects], dtype=np.float64).reshape(len(objects), -1)
        are_numbers = set(map(type, itertools.chain.from_iterable(r[name] for r in objects))) <= {int, float}
        if are_numbers and rows.shape[1] == length and np.isfinite(rows).all():
            return rows
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    rows = np.zeros((len(objects), length))
    for n, record in enumerate(objects):
        value = record.get(name)
        numbers = value if isinstance(value, list) else []
        if len(numbers) != length or not all(map(_is_number, numbers)):
            problem = f"{name} is {_short(value)}, expected {length} numbers"
            findings.error("object", rules.object_place(n), problem, "fix or remove the object", obj=n)
        elif not all(map(_is_finite, numbers)):
            problem = f"{name} is {_short(value)}, expected finite numbers"
            findings.error("object", rules.object_place(n), problem, "fix or remove the object", obj=n)
        else:
            rows[n] = numbers
    return rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_boxes(
    boxes: np.ndarray,
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rules: Rules,
    findings: Findings,
) -> None:
    """Look for boxes without an inside and boxes over the image's edge."""
    if not len(boxes):
        return
    usable = np.ones(len(boxes), dtype=bool)
    usable[list(findings.dropped_objects)] = False
    x1, y1 = boxes[:, 0], boxes[:, 1]
    x2, y2 = x1 + boxes[:, 2], y1 + boxes[:, 3]
    width, height = widths[image_of_object], heights[image_of_object]
    usable &= (width > 0) & (height > 0)

    def shown(n: int) -> str:
        if rules.strict_boxes:
            return f"[{x1[n]:g}, {y1[n]:g}, {x2[n]:g}, {y2[n]:g}]"
        return f"[{x1[n]:g}, {y1[n]:g}, {boxes[n, 2]:g}, {boxes[n, 3]:g}]"

    empty = usable & ((boxes[:, 2] <= 0) | (boxes[:, 3] <= 0))
    # Boxes read as [x1, y1, x2, y2] that would all be fine as [x, y, width, height] are probably that.
    as_xywh = (x2 > 0) & (y2 > 0) & (x1 + x2 <= width + 1) & (y1 + y2 <= height + 1)
    normalised = look_normalised(np.stack([x1, y1, x2, y2], axis=1), height, width)
    looks_like_xywh = rules.strict_boxes and bool(empty.any()) and bool(as_xywh[usable].all())
    for n in np.flatnonzero(empty).tolist():
        negative = boxes[n, 2] < 0 or boxes[n, 3] < 0
        if not rules.strict_boxes and not negative:
            text = "the object is not trained on, and scored as the file says"
            findings.warn("empty box", rules.object_place(n), f"bbox {shown(n)} has no inside", text)
        elif rules.strict_boxes:
            axis = "x" if boxes[n, 2] <= 0 else "y"
            remedy = "write boxes as [x1, y1, x2, y2]" + (
                "; these look like [x, y, width, height]" if looks_like_xywh else " with x1 < x2 and y1 < y2"
            )
            remedy = NORMALISED if normalised[n] else remedy
            problem = f"box {shown(n)} has {axis}2 <= {axis}1"
            findings.error("empty box", rules.object_place(n), problem, remedy, obj=n)
        else:
            problem = f"bbox {shown(n)} has a negative width or height"
            findings.error("empty box", rules.object_place(n), problem, f"write {rules.box_format}", obj=n)
    usable &= ~empty

    outside = usable & ((x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0))
    over = usable & ~outside & ((x1 < -1) | (y1 < -1) | (x2 > width + 1) | (y2 > height + 1))
    for n in np.flatnonzero(outside | over).tolist():
        problem = f"box {shown(n)} lies {'outside' if outside[n] else 'partly outside'} the image of "
        problem += f"{width[n]} x {height[n]} pixels"
        if outside[n] or rules.strict_boxes:
            remedy = f"correct it; boxes are {rules.box_format} in pixels"
            findings.error("box outside", rules.object_place(n), problem, remedy, obj=n)
        else:
            findings.warn("box outside", rules.object_place(n), problem, "it is cut to the image for training")


def check_keypoints(
    objects: Sequence[Record],
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rules: Rules,
    findings: Findings,
) -> np.ndarray:
    """Return float64 [N, K, 3]; K is that of the first object with keypoints, objects without have zeros."""
    lengths = [len(v) if isinstance(v := record.get("keypoints"), list) else 0 for record in objects]
    length = next((k for k in lengths if k), 0)
    if length == 0:
        return np.zeros((len(objects), 0, 3))
    empty = [0] * length
    filled = [record if k else {"id": record.get("id"), "keypoints": empty} for record, k in zip(objects, lengths)]
    if length % 3:
        first = lengths.index(length)
        problem = f"{length} keypoint numbers, expected three per point (x, y, v)"
        findings.error("keypoints", rules.object_place(first), problem, "write x, y, v for every point")
        return np.zeros((len(objects), 0, 3))
    for n, k in enumerate(lengths):
        if k not in (0, length):
            problem = f"{k // 3} keypoints, the objects before have {length // 3}"
            remedy = "give every object the same number of keypoints"
            findings.error("keypoints", rules.object_place(n), problem, remedy, obj=n)
            filled[n] = {"keypoints": empty}
    rows = _number_rows(filled, "keypoints", length, rules, findings)
    keypoints = rows.reshape(len(objects), -1, 3)

    v = keypoints[:, :, 2]
    for n in np.flatnonzero(~np.isin(v, (0, 1, 2)).all(axis=1)).tolist():
        values = ", ".join(f"{x:g}" for x in v[n])
        remedy = "v is 0 (not labelled), 1 (hidden) or 2 (visible)"
        findings.error("keypoints", rules.object_place(n), f"visibilities {values}", remedy, obj=n)
    width, height = widths[image_of_object][:, None], heights[image_of_object][:, None]
    x, y = keypoints[:, :, 0], keypoints[:, :, 1]
    outside = (v > 0) & ((x < -1) | (y < -1) | (x > width) | (y > height)) & (width > 0)
    for n in np.flatnonzero(outside.any(axis=1)).tolist():
        k = int(outside[n].argmax())
        size = f"{width[n, 0]} x {height[n, 0]} pixels"
        problem = f"labelled keypoint {k} at ({x[n, k]:g}, {y[n, k]:g}) lies outside the image of {size}"
        if rules.strict_boxes:
            findings.error("keypoints", rules.object_place(n), problem, "correct it or set its v to 0", obj=n)
        else:
            findings.warn("keypoints", rules.object_place(n), problem, "it counts as not labelled in training")
    return keypoints


def check_flags(objects: Sequence[Record], rules: Rules, findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """Return (is_crowd bool [N], areas float64 [N], NaN where the file has none)."""
    is_crowd, areas = np.zeros(len(objects), dtype=bool), np.full(len(objects), np.nan)
    for n, record in enumerate(objects):
        crowd, area = record.get("iscrowd", 0), record.get("area")
        if crowd not in (0, 1):
            findings.error("object", rules.object_place(n), f"iscrowd is {crowd!r}", "it is 0 or 1", obj=n)
        else:
            is_crowd[n] = crowd
        if area is None:
            continue
        if not _is_number(area) or not _is_finite(area) or area < 0:
            problem = f"area is {_short(area)}, expected a number of square pixels"
            findings.error("object", rules.object_place(n), problem, "correct it or leave it out", obj=n)
        else:
            areas[n] = area
    return is_crowd, areas


@dataclass
class Segmentations:
    """Polygons and compressed run lengths of every object, one of the two empty."""

    polygons: list[list[list[float]]]
    rles: list[bytes]


def check_segmentations(
    objects: Sequence[Record],
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rules: Rules,
    findings: Findings,
    needs_masks: bool,
) -> Segmentations:
    """Sort segmentations into polygons and run lengths; polygons of less than three points are dropped."""
    shapes = Segmentations([[] for _ in objects], [b""] * len(objects))
    for n, record in enumerate(objects):
        segmentation = record.get("segmentation")
        if isinstance(segmentation, list):
            if not all(isinstance(p, list) for p in segmentation):
                problem = f"segmentation is {_short(segmentation)}, expected polygons [[x, y, ...], ...]"
                findings.error("segmentation", rules.object_place(n), problem, "fix it", obj=n)
            else:
                shapes.polygons[n] = segmentation
        elif isinstance(segmentation, dict):
            i = image_of_object[n]
            reason = _rle_problem(segmentation, int(heights[i]), int(widths[i]))
            if reason is None:
                shapes.rles[n] = compress_rle(segmentation, int(heights[i]), int(widths[i]))
            else:
                findings.error("segmentation", rules.object_place(n), reason, "fix or remove it", obj=n)
        elif segmentation is not None:
            problem = f"segmentation is {_short(segmentation)}, expected polygons or run lengths"
            findings.error("segmentation", rules.object_place(n), problem, "fix it", obj=n)
    for n in _objects_with_odd_polygons(shapes.polygons):
        shapes.polygons[n] = _usable_polygons(n, shapes.polygons[n], rules, findings)
    if needs_masks:
        for n in range(len(objects)):
            if not shapes.polygons[n] and not shapes.rles[n] and n not in findings.dropped_objects:
                problem, remedy = "no segmentation, but the model learns masks", "add polygons or train a box model"
                findings.error("segmentation", rules.object_place(n), problem, remedy, obj=n)
    return shapes


def _objects_with_odd_polygons(polygons: list[list[list[float]]]) -> list[int]:
    """Return the objects with a polygon that is not an even number of at least six finite numbers."""
    try:  # a sum is finite only if all its terms are
        all_finite = math.isfinite(sum(map(sum, itertools.chain.from_iterable(polygons))))
    except (TypeError, ValueError, OverflowError):
        all_finite = False
    if not all_finite:  # look at every polygon
        return [n for n, points in enumerate(polygons) if points]
    return [n for n, rows in enumerate(polygons) if any(len(row) < 6 or len(row) % 2 for row in rows)]


def _usable_polygons(n: int, polygons: list[list[Any]], rules: Rules, findings: Findings) -> list[list[float]]:
    """Return the polygons of object ``n`` that have an area; report the others."""
    usable = []
    for points in polygons:
        try:
            finite = bool(np.isfinite(np.array(points, dtype=np.float64)).all())
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite or len(points) % 2:
            problem = f"polygon {_short(points)} is not an even number of finite numbers"
            findings.error("segmentation", rules.object_place(n), problem, "fix it", obj=n)
        elif len(points) < 6:
            problem = f"a polygon of {len(points) // 2} point(s)"
            findings.warn("short polygon", rules.object_place(n), problem, "it is left out; an area needs three")
        else:
            usable.append(points)
    return usable


def _rle_problem(segmentation: Record, height: int, width: int) -> str | None:
    """Say what is wrong with run lengths, or return None."""
    if segmentation.get("size") != [height, width]:
        return f"the mask has size {_short(segmentation.get('size'))}, the image {[height, width]}"
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(_is_int(c) and c >= 0 for c in counts) or sum(counts) != height * width:
            return f"run lengths do not add up to {height} x {width} pixels"
        return None
    if not isinstance(counts, str) or not counts or not all(48 <= ord(c) < 112 for c in counts):
        return f"counts is {_short(counts)}, expected run lengths or COCO's compressed string"
    try:
        lengths = run_lengths(counts.encode())
    except ValueError as error:
        return str(error)
    if min(lengths) < 0 or sum(lengths) != height * width:
        return f"run lengths do not add up to {height} x {width} pixels"
    return None


def check_keypoint_names(
    categories: Sequence[Record], num_keypoints: int, rules: Rules, findings: Findings
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Return names and skeleton (indices from 0) of the first category that names its keypoints."""
    for k, record in enumerate(categories):
        names = record.get("keypoints")
        if not names or not num_keypoints:
            continue
        place = f"{rules.file}: categories[{k}]"
        if not isinstance(names, list) or len(names) != num_keypoints:
            problem = f"{len(names)} keypoint names for objects with {num_keypoints} keypoints"
            findings.error("category", place, problem, "name every keypoint once")
            continue
        skeleton = record.get("skeleton") or []
        pairs = [pair for pair in skeleton if isinstance(pair, list) and len(pair) == 2 and all(map(_is_int, pair))]
        if len(pairs) != len(skeleton) or not all(1 <= a <= num_keypoints for pair in pairs for a in pair):
            problem = f"skeleton {_short(skeleton)} is not pairs of keypoint numbers 1 to {num_keypoints}"
            findings.error("category", place, problem, "fix or remove it")
            pairs = []
        return tuple(map(str, names)), tuple((a - 1, b - 1) for a, b in pairs)
    return (), ()
