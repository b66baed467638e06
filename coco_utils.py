"""COCO json to `Annotations`, checked on the way, and back to COCO's dicts.

Records are checked by `annotations.record_checks`; folders are brought into COCO's records first, by `custom_dataset`.
"""

import contextlib
import difflib
import gc
import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from annotations.arrays import Annotations, join_bytes
from annotations.findings import BadDataError, Finding, Findings
from annotations.foreign_files import describe_json, explain_json_error, explain_undecodable
from annotations.forms import flat_floats, short
from annotations.record_checks import (
    Rules,
    check_boxes,
    check_categories,
    check_flags,
    check_images,
    check_keypoint_names,
    check_keypoints,
    check_objects,
)
from annotations.record_reader import Notes, Record, RecordReader
from annotations.segmentations import Segmentations, check_segmentations
from files import read_text, write_aside
from pixels.masks import area_of_polygons

# A larger file would need some forty gigabytes of memory to parse.
MAX_JSON_BYTES = 4 << 30

# A text, or one of the words that Python writes for numbers that json does not know.
_TEXT_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')


def read_json(path: Path) -> Any:
    """Parse a json file strictly: UTF-8 with or without a byte order mark, no NaN or Infinity, no key twice.

    Raises:
        BadDataError: One line that names file and position.
    """

    def fail(problem: str, remedy: str = "correct the file") -> BadDataError:
        return BadDataError([Finding("json", str(path), problem, remedy)])

    def refuse_constant(name: str) -> None:
        raise _ConstantError

    def refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {double!r} occurs twice in one object, {short(record)}")
        return record

    if path.is_dir():
        remedy = "check_dataset.py --write-coco FOLDER writes one from other formats"
        raise fail("a folder, but expected one file in COCO's format", remedy)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise fail(f"{size} bytes are more than the limit of {MAX_JSON_BYTES}", "split the file")
    try:
        with _collector_off():
            text = read_text(path)
            return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_double_keys)
    except _ConstantError:
        raise fail(*_locate_constants(text)) from None
    except json.JSONDecodeError as error:
        raise fail(*explain_json_error(path, text, error)) from None
    except UnicodeDecodeError as error:
        raise fail(*explain_undecodable(path, error.start)) from None
    except RecursionError:
        raise fail("nested too deeply") from None
    except ValueError as error:
        raise fail(str(error)) from None


class _ConstantError(Exception):
    """The file holds NaN or Infinity."""


def _locate_constants(text: str) -> tuple[str, str]:
    """Return (what is wrong with NaN and Infinity in a json, and where, what to do)."""
    found = [match for match in _TEXT_OR_CONSTANT.finditer(text) if match[0][0] != '"']
    first = found[0]
    line, column = text.count("\n", 0, first.start()) + 1, first.start() - text.rfind("\n", 0, first.start())
    start = text.rfind("{", 0, first.start())
    record = " ".join(text[max(start, 0) : first.end()].split())
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    problem = (
        f"the number {first[0]} at line {line} column {column}{more} is not allowed in annotations: "
        f"{record if len(record) <= 120 else '...' + record[-117:]}"
    )
    return (
        problem,
        "write a number, or null where none is needed (in pandas: df.astype(object).where(df.notna(), None))",
    )


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Do without the garbage collector: of millions of parsed objects none is garbage, and each round visits all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_coco(path: Path, *, on_bad_data: str = "error", uses: Collection[str] = ()) -> Annotations:
    """Read a COCO annotation file (``images``, ``annotations``, ``categories``).

    Args:
        path: The file.
        on_bad_data: ``error`` or ``skip``, see `Findings`.
        uses: See `annotations_from_records`.

    Raises:
        FileNotFoundError: There is no such file.
        BadDataError: What is wrong with it, all findings at once.
    """
    with _collector_off():
        content = read_json(path)
        findings = Findings(on_bad_data)
        images, objects, categories = _sections(path, content)
        rules = Rules(
            str(path),
            image_place=lambda i: f"{path}: images[{i}]",
            object_place=lambda n: f"{path}: annotations[{n}] (id {objects[n].get('id')})",
        )
        return annotations_from_records(images, objects, categories, rules, findings, uses=uses)


def read_image_ids(path: Path) -> dict[str, int | str]:
    """Return {file name: id} of a COCO file's images, the ids as the file has them; nothing else in it is read.

    Raises:
        FileNotFoundError: There is no such file.
        BadDataError: What is wrong with its images, all findings at once.
    """
    content = read_json(path)
    findings, notes = Findings(), Notes()
    images, _, _ = _sections(
        path, {"images": content.get("images"), "categories": []} if isinstance(content, dict) else 0
    )
    reader = RecordReader("image", images, lambda i: f"{path}: images[{i}]", findings, notes)
    ids, _, _, names = check_images(reader)
    findings.raise_errors()
    return {name: notes.id_texts.get(id_, id_) for name, id_ in zip(names, ids.tolist())}


def _sections(path: Path, content: Any) -> tuple[list[Record], list[Record], list[Record]]:
    """Return the three lists of a COCO file; a test file without annotations has an empty second one."""
    findings = Findings()
    known = describe_json(content) if not isinstance(content, dict) or "images" not in content else None
    if known or not isinstance(content, dict):
        what, remedy = known or (short(content), "is this a COCO annotation file?")
        problem = f"expected an object with images, annotations and categories, got {what}"
        raise BadDataError([Finding("json", str(path), problem, remedy)])
    sections = []
    if "annotations" not in content and "categories" in content:
        for key in difflib.get_close_matches("annotations", content, 1, cutoff=0.7):
            problem = f"no entry 'annotations', but {short(key)}"
            findings.error("json", str(path), problem, "call it 'annotations' if it holds the objects")
    for name in ("images", "annotations", "categories"):
        section = content.get(name, [] if name == "annotations" else None)
        if not isinstance(section, list):
            problem = f"expected a list of objects under {name!r}, got {short(section)}"
            findings.error("json", str(path), problem, "is this a COCO annotation file?")
            section = []
        for n, record in enumerate(section):
            if not isinstance(record, dict):
                problem = f"expected an object {{...}}, got {short(record)}"
                findings.error("json", f"{path}: {name}[{n}]", problem, "fix or remove it")
        sections.append(section)
    findings.raise_errors()
    return sections[0], sections[1], sections[2]


def annotations_from_records(
    images: Sequence[Record],
    objects: Sequence[Record],
    categories: Sequence[Record],
    rules: Rules,
    findings: Findings,
    *,
    uses: Collection[str] = (),
    notes: Notes | None = None,
) -> Annotations:
    """Check COCO's records and put them into flat arrays.

    Missing ``area``, ``iscrowd`` and ``num_keypoints`` are filled in; annotation ids are not kept (pycocotools takes
    id 0 for "unmatched"), but must not occur twice.

    Args:
        images: With ``id``, ``file_name``, ``height``, ``width``.
        objects: With ``image_id``, ``category_id``, ``bbox`` and what else COCO knows.
        categories: With ``id``, ``name`` and for keypoints ``keypoints`` and ``skeleton`` (indices from 1).
        rules: What counts as an error.
        findings: Collects what is wrong.
        uses: What is learnt or scored beside boxes: "segm", "keypoints". What is broken elsewhere is left out with a
            warning; where masks are used, an object without one is an error.
        notes: What is remarked already, once a kind.

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    notes = notes or Notes()
    if len(objects) and not len(images):
        findings.error("image", rules.file, "objects, but no images", "list the pictures under 'images'")
        findings.raise_errors()
    category_reader = RecordReader(
        "category", categories, lambda k: f"{rules.file}: categories[{k}]", findings, notes, uses
    )
    image_reader = RecordReader("image", images, rules.image_place, findings, notes, uses)
    reader = RecordReader("object", objects, rules.object_place, findings, notes, uses, rules.usual_forms)
    for each in (category_reader, image_reader, reader):
        each.remark_misspelt()
    names = check_categories(category_reader, rules)
    checked_images = check_images(image_reader)
    image_ids, heights, widths, file_names = checked_images
    boxes, category_ids, image_of_object = check_objects(reader, checked_images, names, rules)
    check_boxes(boxes, image_of_object, heights, widths, rules, findings)
    keypoints = check_keypoints(reader, category_ids, names, image_of_object, heights, widths, rules)
    is_crowd, areas = check_flags(reader)
    segmentations = check_segmentations(reader, image_of_object, heights, widths)
    _fill_in_areas(areas, boxes, segmentations, image_of_object, heights, widths)
    names_of_points, skeleton = check_keypoint_names(category_reader, keypoints.shape[1])
    notes.flush(findings)
    findings.raise_errors()

    keep_image, order, counts = _kept_by_image(findings, image_of_object, len(images))
    without_objects = np.setdiff1d(np.flatnonzero(~keep_image), image_of_object)
    name_bytes, name_starts = join_bytes([file_names[i].encode() for i in np.flatnonzero(keep_image)])
    polygons = [segmentations.polygons[n] for n in order]
    rle_bytes, rle_starts = join_bytes([segmentations.rles[n] for n in order])
    return Annotations(
        image_ids=image_ids[keep_image],
        heights=heights[keep_image],
        widths=widths[keep_image],
        name_bytes=name_bytes,
        name_starts=name_starts,
        object_starts=_starts(counts),
        boxes_xywh=boxes[order],
        category_ids=category_ids[order],
        areas=areas[order],
        is_crowd=is_crowd[order],
        keypoints=keypoints[order],
        polygon_points=flat_floats(itertools.chain.from_iterable(polygons)),
        polygon_starts=_starts([len(points) for of_object in polygons for points in of_object]),
        object_polygons=_starts([len(of_object) for of_object in polygons]),
        rle_bytes=rle_bytes,
        rle_starts=rle_starts,
        categories=tuple(sorted(names.items())),
        keypoint_names=names_of_points,
        skeleton=skeleton,
        has_segmentations=any("segmentation" in record for record in objects),
        id_texts=tuple(notes.id_texts.items()),
        warnings=findings.warnings(),
        dropped_image_ids=tuple(np.setdiff1d(image_ids[~keep_image], image_ids[keep_image]).tolist()),
        num_dropped=len(objects) - len(order) + len(without_objects),
    )


def _kept_by_image(
    findings: Findings, image_of_object: np.ndarray, num_images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (images that stay, bool [I]; objects that stay, int64 in the order of images; how many each has)."""
    keep_image = np.ones(num_images, dtype=bool)
    keep_image[list(findings.dropped_images)] = False
    keep = keep_image[image_of_object] if len(image_of_object) else np.zeros(0, dtype=bool)
    keep[list(findings.dropped_objects)] = False
    order = np.flatnonzero(keep)
    order = order[np.argsort(image_of_object[order], kind="stable")]
    new_position = np.cumsum(keep_image) - 1
    counts = np.bincount(new_position[image_of_object[order]], minlength=int(keep_image.sum()))
    return keep_image, order, counts


def _fill_in_areas(
    areas: np.ndarray,
    boxes_xywh: np.ndarray,
    segmentations: Segmentations,
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> None:
    """Put the pixels of the polygons, or the box's area, in the place of missing areas (NaN)."""
    for n in np.flatnonzero(np.isnan(areas)).tolist():
        i = image_of_object[n]
        polygons = [np.asarray(points, dtype=np.float64) for points in segmentations.polygons[n]]
        areas[n] = boxes_xywh[n, 2] * boxes_xywh[n, 3]
        if polygons:
            areas[n] = area_of_polygons(polygons, int(heights[i]), int(widths[i]))


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def to_coco(annotations: Annotations, indices: np.ndarray | None = None) -> dict[str, Any]:
    """Return the annotations of some images (all by default) as COCO's dicts, ready for json or pycocotools.

    Annotation ids count from 1. Nothing is rounded or clipped.
    """
    indices = np.arange(len(annotations)) if indices is None else indices
    visible = annotations.num_labelled_keypoints()
    objects: list[Record] = []
    for i in indices.tolist():
        size = [int(annotations.heights[i]), int(annotations.widths[i])]
        span = annotations.objects(i)
        for n in range(span.start, span.stop):
            record: Record = {
                "id": len(objects) + 1,
                "image_id": int(annotations.image_ids[i]),
                "category_id": int(annotations.category_ids[n]),
                "bbox": annotations.boxes_xywh[n].tolist(),
                "area": float(annotations.areas[n]),
                "iscrowd": int(annotations.is_crowd[n]),
            }
            if annotations.has_segmentations:
                counts = annotations.rle(n)
                polygons = [points.tolist() for points in annotations.polygons(n)]
                record["segmentation"] = {"size": size, "counts": counts.decode()} if counts else polygons
            if annotations.num_keypoints:
                record["keypoints"] = annotations.keypoints[n].reshape(-1).tolist()
                record["num_keypoints"] = int(visible[n])
            objects.append(record)
    categories: list[Record] = [{"id": id_, "name": name} for id_, name in annotations.categories]
    if annotations.keypoint_names:
        for category in categories:
            category["keypoints"] = list(annotations.keypoint_names)
            category["skeleton"] = [[a + 1, b + 1] for a, b in annotations.skeleton]
    images = [
        {
            "id": int(annotations.image_ids[i]),
            "file_name": annotations.file_name(i),
            "height": int(annotations.heights[i]),
            "width": int(annotations.widths[i]),
        }
        for i in indices.tolist()
    ]
    return {"info": {}, "images": images, "annotations": objects, "categories": categories}


def write_coco(annotations: Annotations, path: Path, indices: np.ndarray | None = None) -> None:
    """Write what `to_coco` returns as json, with the ids that the dataset's own files have; `read_coco` reads it.

    File names stay relative to the folder of the pictures.
    """
    content = to_coco(annotations, indices)
    own = annotations.own_id
    for image in content["images"]:
        image["id"] = own(image["id"])
    for category in content["categories"]:
        category["id"] = own(category["id"])
    for record in content["annotations"]:
        record["image_id"], record["category_id"] = own(record["image_id"]), own(record["category_id"])
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
