"""What may be wrong with COCO's records as a whole, each found by one line that names place and field.

`record_reader` checks every value by itself; here they are checked against each other and the picture. Files of all
formats are brought into COCO's records first. Each check returns its field as an array, so that a record is read once;
`coco_utils` puts the arrays together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from annotations.fields import FIELDS
from annotations.findings import Findings
from annotations.forms import short
from annotations.meant_ids import explain_class, explain_file, ids_by_class, ids_by_file
from annotations.normalised import NORMALISED, look_normalised
from annotations.record_reader import RecordReader
from annotations.segmentations import box_of_segmentation
from pixels.images import unsafe_file_name

# The overlaps of so many boxes with all anchors of an 800 x 1333 picture take 10 GB, whatever the model; real pictures
# of crowds, cells or shelves show a few thousand.
MAX_OBJECTS_PER_IMAGE = 10_000

# So many boxes over the edge, and so large a share of all, have one cause.
MIN_OUTSIDE, MANY_OUTSIDE = 5, 0.3


@dataclass(frozen=True)
class Rules:
    """What counts as an error.

    Attributes:
        file: The annotation file or folder, for messages.
        image_place: Tells where the image at a position of the list stands.
        object_place: Tells where the object at a position of the list stands.
        strict_boxes: Whether boxes are written as corners, and empty boxes and boxes over the image's edge are
            errors. COCO's own files have both: such boxes are not trained on, or cut to the image, and scored as the
            file says.
        box_format: How the file writes boxes, for messages.
        as_written: The numbers that the file writes for a box of x, y, width and height, for messages.
        usual_forms: (field, form) of values that are not in the form of COCO's files and are not remarked.
    """

    file: str
    image_place: Callable[[int], str]
    object_place: Callable[[int], str]
    strict_boxes: bool = False
    box_format: str = "[x, y, width, height]"
    as_written: Callable[[float, float, float, float], Sequence[float]] = lambda *box: box
    usual_forms: tuple[tuple[str, str], ...] = ()


def check_categories(reader: RecordReader, rules: Rules) -> dict[int, str]:
    """Return {id: name}."""
    findings, names = reader.findings, {}
    for k, (id_, name) in enumerate(zip(reader.ids("id"), reader.column("name"))):
        if id_ is None or name is None:  # reported
            continue
        if id_ in names:
            findings.error(
                "category", reader.place(k), f"category id {id_} occurs twice", "give every category its own id"
            )
        else:
            names[id_] = name
    double = {name for name in names.values() if list(names.values()).count(name) > 1}
    for id_, name in names.items():
        if name in double:  # figures go by the name
            names[id_] = f"{name} (id {id_})"
            findings.warn(
                "category", rules.file, f"another category is called {name!r} too", f"it is {names[id_]!r} here"
            )
    if not reader.rows:
        findings.error("category", rules.file, "no categories", "list the classes under 'categories'")
    return names


def check_images(reader: RecordReader) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return (ids int64, heights int32, widths int32, file names); bad entries hold zeros."""
    findings, place = reader.findings, reader.place
    ids, names = reader.ids("id"), list(reader.column("file_name"))
    heights, widths = (np.array(reader.column(name), dtype=np.int32) for name in ("height", "width"))
    first_with: dict[int, int] = {}
    for i, (id_, name) in enumerate(zip(ids, names)):
        if id_ is None or i in findings.dropped_images:
            continue
        if id_ in first_with:
            problem = f"image id {reader.rows[i]['id']} is also that of {place(first_with[id_])}"
            findings.error("image", place(i), problem, "give every image its own id", image=i)
            continue
        first_with[id_] = i
        reason = unsafe_file_name(name)
        if reason is not None:
            problem = f"file_name {name!r} is {reason}"
            findings.error("image", place(i), problem, FIELDS["image", "file_name"].remedy, image=i)
    if len(set(names)) < len(names):
        _remark_names_twice(reader, names)
    return np.array([id_ or 0 for id_ in ids], dtype=np.int64), heights, widths, [name or "" for name in names]


def _remark_names_twice(reader: RecordReader, names: Sequence[str | None]) -> None:
    """Remark images that are one file: each is trained and scored on with its own share of the objects."""
    first_with: dict[str, int] = {}
    for i, name in enumerate(names):
        if name and first_with.setdefault(name, i) != i:
            problem = f"file_name {short(name)} is also that of {reader.place(first_with[name])}"
            remedy = (
                "the picture is used twice, each time with the objects of one entry; join them if they belong together"
            )
            reader.notes.add(("file_name", "twice"), "file twice", reader.place(i), problem, remedy)


def check_objects(
    reader: RecordReader,
    images: tuple[np.ndarray, np.ndarray, np.ndarray, list[str]],
    names: Mapping[int, str],
    rules: Rules,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (boxes xywh float64 [N, 4], category ids int64 [N], image position int64 [N]); bad entries hold zeros.

    Args:
        reader: Reads the objects.
        images: From `check_images`.
        names: {id: name} of the categories.
        rules: What counts as an error.
    """
    image_ids, heights, widths, file_names = images
    position_of = {int(id_): i for i, id_ in reversed(list(enumerate(image_ids)))}
    of_images, of_categories = reader.ids("image_id"), reader.ids("category_id")
    positions = np.array([-1 if id_ is None else position_of.get(id_, -1) for id_ in of_images], dtype=np.int64)
    if len(unknown := np.flatnonzero(positions < 0).tolist()):
        own_ids = [reader.notes.id_texts.get(id_, id_) for id_ in image_ids.tolist()]
        files = ids_by_file(zip(file_names, own_ids))
        _report_unknown(reader, "image_id", unknown, "images", lambda given: explain_file(given, files))
    is_unknown = [id_ not in names for id_ in of_categories]
    if len(unknown := np.flatnonzero(is_unknown).tolist()):
        classes = ids_by_class((name, reader.notes.id_texts.get(id_, id_)) for id_, name in names.items())
        _report_unknown(
            reader,
            "category_id",
            unknown,
            "categories",
            lambda given: explain_class(given, classes),
            min(names, default=0) == 1,
        )
    _check_own_ids(reader)
    _check_counts(reader, positions, rules)
    _fill_in_boxes(reader, positions, heights, widths, rules)
    boxes = np.array(reader.column("bbox"), dtype=np.float64).reshape(-1, 4)
    if rules.strict_boxes:
        boxes[:, 2:] -= boxes[:, :2]
    categories = np.array([0 if bad else id_ for id_, bad in zip(of_categories, is_unknown)], dtype=np.int64)
    return boxes, categories, positions.clip(min=0)


def _report_unknown(
    reader: RecordReader,
    name: str,
    unknown: Sequence[int],
    what: str,
    explain: Callable[[str], str],
    counts_from_one: bool = False,
) -> None:
    """Report objects whose ``image_id`` or ``category_id`` nothing has, and what may be meant by it."""
    for n in unknown:
        given = reader.rows[n].get(name)
        meant = explain(given) if isinstance(given, str) else ""
        problem = f"{name} {short(given)} is not among the {what}"
        remedy = f"{meant}; give the id" if meant else ""
        if name == "category_id" and given == 0 and counts_from_one:
            remedy = "the categories count from 1: if these ids count from 0, all of them are one too low"
        reader.wrong(FIELDS["object", name], n, problem, remedy=remedy)


def _fill_in_boxes(
    reader: RecordReader, positions: np.ndarray, heights: np.ndarray, widths: np.ndarray, rules: Rules
) -> None:
    """Give records without a box the one around their mask, as the file writes boxes; one remark for all."""
    for n in [
        n for n, row in enumerate(reader.rows) if row.get("bbox") is None and row.get("segmentation") is not None
    ]:
        row, i = reader.rows[n], int(positions[n])
        if i < 0:
            continue
        box = box_of_segmentation(row["segmentation"], int(heights[i]), int(widths[i]))
        if box is not None:
            x, y, width, height = box
            row["bbox"] = [x, y, x + width, y + height] if rules.strict_boxes else box
            remedy = "the box around the mask is taken"
            reader.notes.add(("bbox", "mask"), "form", reader.place(n), "an object with a mask and no box", remedy)


def _check_own_ids(reader: RecordReader) -> None:
    """Report ids of objects that occur twice; they are not kept."""
    ids = reader.ids("id")
    if len(set(ids)) == len(ids):
        return
    first_with: dict[int, int] = {}
    for n, id_ in enumerate(ids):
        if id_ is not None and first_with.setdefault(id_, n) != n:
            problem = f"annotation id {short(reader.rows[n]['id'])} is also that of {reader.place(first_with[id_])}"
            if n not in reader.dropped:
                remedy = "give every annotation its own id"
                reader.findings.error("object", reader.place(n), problem, remedy, obj=n)


def _check_counts(reader: RecordReader, positions: np.ndarray, rules: Rules) -> None:
    """Report images with more objects than can be trained on."""
    if len(positions) <= MAX_OBJECTS_PER_IMAGE:
        return
    counts = np.bincount(positions[positions >= 0])
    for i in np.flatnonzero(counts > MAX_OBJECTS_PER_IMAGE).tolist():
        problem = f"{counts[i]} objects in one image are more than the limit of {MAX_OBJECTS_PER_IMAGE}"
        reader.findings.error("image", rules.image_place(i), problem, "cut the picture into smaller ones", image=i)


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
    usable &= ~np.isin(image_of_object, list(findings.dropped_images))
    x1, y1 = boxes[:, 0], boxes[:, 1]
    x2, y2 = x1 + boxes[:, 2], y1 + boxes[:, 3]
    width, height = widths[image_of_object], heights[image_of_object]
    usable &= (width > 0) & (height > 0)

    def shown(n: int) -> str:
        return "[" + ", ".join(f"{v:g}" for v in rules.as_written(*boxes[n].tolist())) + "]"

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
    cause = ""
    if (outside | over).sum() >= max(MIN_OUTSIDE, MANY_OUTSIDE * usable.sum()):
        reach = max((x2 / np.maximum(width, 1))[usable].max(), (y2 / np.maximum(height, 1))[usable].max())
        cause = f"; boxes seem to be for pictures {reach:.2g} times as large: was the size changed after annotating?"
        far, size = boxes[usable, 2:], np.stack([width, height], axis=1)[usable]
        if rules.box_format == Rules.box_format and bool(((far > boxes[usable, :2]) & (far <= size + 1)).all()):
            cause = "; these look like [x1, y1, x2, y2]"
    for n in np.flatnonzero(outside | over).tolist():
        problem = f"box {shown(n)} lies {'outside' if outside[n] else 'partly outside'} the image of "
        problem += f"{width[n]} x {height[n]} pixels"
        if outside[n] or rules.strict_boxes:
            remedy = f"correct it; boxes are {rules.box_format} in pixels{cause}"
            findings.error("box outside", rules.object_place(n), problem, remedy, obj=n)
        else:
            remedy = f"it is cut to the image for training{cause}"
            findings.warn("box outside", rules.object_place(n), problem, remedy)


def check_keypoints(
    reader: RecordReader,
    category_ids: np.ndarray,
    names: dict[int, str],
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rules: Rules,
) -> np.ndarray:
    """Return float64 [N, K, 3]; K is that of the first object with keypoints, objects without have zeros."""
    field, findings = FIELDS["object", "keypoints"], reader.findings
    rows = [value or [] for value in reader.column("keypoints")]
    counts = np.array([len(row) // 3 for row in rows], dtype=np.int64)
    length = next((k for k in counts.tolist() if k), 0)
    if length == 0:
        return np.zeros((len(rows), 0, 3))
    keypoints = np.zeros((len(rows), length, 3))
    has_points = counts == length
    _check_point_counts(reader, counts, category_ids, names)
    keypoints[has_points] = np.array([row for row, k in zip(rows, counts) if k == length]).reshape(-1, length, 3)

    v = keypoints[:, :, 2]
    is_odd = ~np.isin(v, (0, 1, 2)).all(axis=1)
    for n in np.flatnonzero(is_odd).tolist():
        values = ", ".join(f"{x:g}" for x in v[n])
        reader.wrong(field, n, f"visibilities {values}, expected 0, 1 or 2")
    keypoints[is_odd] = 0
    width, height = widths[image_of_object][:, None], heights[image_of_object][:, None]
    x, y = keypoints[:, :, 0], keypoints[:, :, 1]
    outside = (v > 0) & ((x < -1) | (y < -1) | (x > width) | (y > height)) & (width > 0)
    for n in np.flatnonzero(outside.any(axis=1)).tolist():
        k = int(outside[n].argmax())
        size = f"{width[n, 0]} x {height[n, 0]} pixels"
        problem = f"labelled keypoint {k} at ({x[n, k]:g}, {y[n, k]:g}) lies outside the image of {size}"
        if rules.strict_boxes:
            reader.wrong(field, n, problem, remedy="correct it or set its v to 0")
        else:
            findings.warn("keypoints", rules.object_place(n), problem, "it counts as not labelled in training")
    _compare_num_keypoints(reader, (keypoints[:, :, 2] > 0).sum(axis=1))
    return keypoints


def _check_point_counts(
    reader: RecordReader, counts: np.ndarray, category_ids: np.ndarray, names: dict[int, str]
) -> None:
    """Report objects with other numbers of keypoints than the first: once a class where classes differ."""
    field, findings = FIELDS["object", "keypoints"], reader.findings
    first = int(np.flatnonzero(counts)[0])
    expected = int(counts[first])
    odd = np.flatnonzero((counts != 0) & (counts != expected))
    odd = odd[[n not in findings.dropped_objects for n in odd.tolist()]] if len(odd) else odd
    if not len(odd):
        return
    seen: dict[int, set[int]] = {}
    for category, count in zip(category_ids[counts > 0].tolist(), counts[counts > 0].tolist()):
        seen.setdefault(category, set()).add(count)
    if "keypoints" not in reader.uses or any(len(of_class) > 1 for of_class in seen.values()):
        for n in odd.tolist():
            problem = f"{counts[n]} keypoints, the objects before have {expected}"
            reader.wrong(field, n, problem, remedy="give every object the same number of keypoints")
        return
    for category in np.unique(category_ids[odd]).tolist():
        objects = odd[category_ids[odd] == category].tolist()
        expected_by = f"those of {names.get(int(category_ids[first]), '?')!r} {expected}"
        problem = (
            f"{len(objects)} object(s) of class {names.get(category, category)!r} have {counts[objects[0]]} "
            f"keypoints, {expected_by}; a model learns one number of them"
        )
        remedy = "keep the keypoints of one class only, or give both the same"
        findings.error("keypoints", reader.place(objects[0]), problem, remedy, objects=objects)


def _compare_num_keypoints(reader: RecordReader, labelled: np.ndarray) -> None:
    """Remark where num_keypoints is not the number of labelled points: pycocotools goes by it, this suite counts."""
    if "keypoints" not in reader.uses:
        return
    for n, (value, count) in enumerate(zip(reader.column("num_keypoints"), labelled.tolist())):
        if value is not None and value != count and n not in reader.dropped:
            problem = f"num_keypoints is {value}, but {count} points have v > 0"
            reader.notes.add(("num_keypoints",), "num_keypoints", reader.place(n), problem, "the points decide")


def check_flags(reader: RecordReader) -> tuple[np.ndarray, np.ndarray]:
    """Return (is_crowd bool [N], areas float64 [N], NaN where the file has none)."""
    return np.array(reader.column("iscrowd"), dtype=bool), np.array(reader.column("area"), dtype=np.float64)


def check_keypoint_names(
    reader: RecordReader, num_keypoints: int
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Return names and skeleton (indices from 0) of the first category that names its keypoints."""
    if not num_keypoints:
        return (), ()
    for k, (names, links) in enumerate(zip(reader.column("keypoints"), reader.column("skeleton"))):
        if not names:
            continue
        if len(names) != num_keypoints:
            problem = f"{len(names)} keypoint names for objects with {num_keypoints} keypoints"
            reader.wrong(FIELDS["category", "keypoints"], k, problem)
            continue
        links = links or []
        if any(max(pair) > num_keypoints for pair in links):
            problem = f"skeleton {short(links)} is not pairs of keypoint numbers 1 to {num_keypoints}"
            reader.wrong(FIELDS["category", "skeleton"], k, problem)
            links = []
        return tuple(names), tuple((a - 1, b - 1) for a, b in links)
    return (), ()
