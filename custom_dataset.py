"""A folder of images with one json each, brought into COCO's records and checked like any other dataset.

    custom/train/images, custom/train/annotations         image and json share a stem, and their sub-folders
    custom/test/images, custom/test/annotations
    custom/dataset.json                                   classes, keypoint names, ...: see `DatasetInfo`

A json holds ``{"bboxes": [[x1, y1, x2, y2], ...], "keypoints": [[[x, y, v], ...], ...]}`` and optionally, one entry
per box, ``labels``, ``segmentations``, ``area`` and ``iscrowd``.
"""

import contextlib
import difflib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotations.arrays import Annotations
from annotations.fields import FIELDS
from annotations.file_pairs import (
    Alone,
    SimilarStems,
    files_by_stem,
    folder_with_stems,
    missing_partner,
    missing_partners,
)
from annotations.findings import BadDataError, Findings
from annotations.foreign_files import COCO, describe_json
from annotations.forms import BOX, NAMES, NESTED_POINTS, POINTS, SIGMA, short
from annotations.label_numbers import number_labels
from annotations.record_checks import Rules
from annotations.record_reader import Notes, Record
from annotations.skeleton import Skeleton, flip_order, ignored_pairs
from coco_utils import annotations_from_records, read_json
from files import why_no_folder
from pixels.image_files import examples, folders_in, is_nearly_all, is_picture_name, list_folder
from pixels.images import BadImageError, is_text, read_header

logger = logging.getLogger(__name__)

_SPLITS = ("train", "test")

# What others call the list of boxes.
_NAMES_OF_BOXES = ("bbox", "box", "boxes", "bounding_boxes", "boundingboxes")

# So many jsons without image are looked into.
MAX_STRANGERS = 3

_AS_COCO = (
    "train on it with --dataset coco --train-annotations {json} --train-images {pictures} (--val-... for the other)"
)

# Entries of a json with one value per box, and what COCO calls them.
_PER_BOX = {"labels": "", **{f.own_name: f.name for f in FIELDS.values() if f.own_name and f.name != "bbox"}}


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` says.

    Attributes:
        classes: Class names of the labels 1, 2, ...; empty where the annotations decide.
        skeleton: Keypoint names, links, flip pairs and sigmas.
        path: The file, or where it would be.
    """

    classes: tuple[str, ...] = ()
    skeleton: Skeleton = field(default_factory=Skeleton)
    path: Path = Path("dataset.json")


def read_dataset_info(
    root: Path, findings: Findings | None = None, *, uses: Collection[str] = ("keypoints",)
) -> DatasetInfo:
    """Read ``dataset.json`` in ``root``, if there is one.

    Args:
        root: Folder of the dataset.
        findings: Collects what is wrong with single entries, which are then left out; None raises it.
        uses: What is learnt beside boxes: what is wrong with keypoints is a warning where they are not used.

    Raises:
        BadDataError: What is wrong with the file, all findings at once.
    """
    path = root / "dataset.json"
    collected, findings = findings, findings or Findings()
    content = _read_info_json(path, findings)

    def wrong(key: str, problem: str, remedy: str) -> None:
        is_needed = key == "classes" or (key != "skeleton" and "keypoints" in uses)
        if is_needed:
            findings.error("dataset.json", f"{path}: {key}", problem, remedy)
        else:
            findings.warn("dataset.json", f"{path}: {key}", problem, f"{remedy}; it is left out, nothing here needs it")

    def names_of(key: str) -> tuple[str, ...]:
        """Return different names; none where there are none or they are wrong."""
        try:
            taken, how = NAMES.read(content[key]) if content.get(key) is not None else ([], "")
        except ValueError:
            wrong(key, f"expected different names, got {short(content[key])}", "fix it")
            return ()
        if how:
            findings.warn("form", f"{path}: {key}", f"{short(content[key])}, {how}", "taken as what it says")
        return tuple(taken)

    names = names_of("keypoint_names")
    has_bad_names = bool(content.get("keypoint_names")) and not names

    def pairs(key: str) -> tuple[tuple[int, int], ...] | None:
        """Return pairs of indices; None where there is no such entry or it is no such list."""
        value = content.get(key)
        if value is None:
            return None
        try:
            return _point_pairs(value, names)
        except ValueError as error:
            if not has_bad_names:  # else a consequence, maybe: names are looked up again once they are right
                wrong(key, f"expected a list of pairs, {error}", "give pairs of keypoint names or of indices from 0")
            return None

    sigmas = content.get("oks_sigmas")
    if sigmas is not None:
        try:
            sigmas = tuple(SIGMA.read(sigma)[0] for sigma in (sigmas if isinstance(sigmas, list) else [None]))
        except ValueError:
            wrong("oks_sigmas", f"got {short(sigmas)}", "give one positive number per keypoint")
            sigmas = None
    classes = names_of("classes")
    skeleton = Skeleton(names, pairs("skeleton") or (), pairs("flip_pairs"), sigmas)
    if "keypoints" in uses:
        _check_names_against_pairs(skeleton, path, findings)
    if collected is None:
        findings.raise_errors()
    return DatasetInfo(classes, skeleton, path)


def _read_info_json(path: Path, findings: Findings) -> dict[str, Any]:
    """Return the entries of ``dataset.json``, none without such a file; reports files and entries of other names.

    Raises:
        BadDataError: The file is no json, or no object.
    """
    if not path.is_file():
        others = (
            [p for p in sorted(path.parent.glob("*")) if p.name.casefold() == path.name] if path.parent.is_dir() else []
        )
        for other in others:
            findings.error("dataset.json", str(other), f"expected the name {path.name}", "rename the file")
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        findings.error("dataset.json", str(path), f"expected an object, got {short(content)}", "see docs/own_data.md")
        findings.raise_errors()
    known = {"classes", "keypoint_names", "flip_pairs", "skeleton", "oks_sigmas"}
    for key in sorted(set(content) - known):
        findings.error("dataset.json", str(path), f"unknown entry {key!r}", f"expected {', '.join(sorted(known))}")
    return content


def _check_names_against_pairs(skeleton: Skeleton, path: Path, findings: Findings) -> None:
    """Report flip pairs that leave out what names imply: mirrored pictures would teach the wrong side."""
    missing = ignored_pairs(skeleton.names, skeleton.flip_pairs) if skeleton.flip_pairs is not None else []
    if missing:
        implied = ", ".join(f"[{skeleton.names[a]!r}, {skeleton.names[b]!r}]" for a, b in missing)
        given = ", ".join(f"[{a}, {b}]" for a, b in skeleton.flip_pairs or ()) or "no pairs"
        problem = f"expected {implied} among them, as keypoint_names say, got {given}"
        remedy = "leave flip_pairs out (the names say which points swap), or rename points that have no side"
        findings.error("dataset.json", f"{path}: flip_pairs", problem, remedy)


def check_point_counts(info: DatasetInfo, num_keypoints: int, findings: Findings) -> None:
    """Report entries of ``dataset.json`` that do not fit the number of keypoints that objects have."""
    skeleton, objects = info.skeleton, f"objects with {num_keypoints} keypoints"
    if len(skeleton.names) not in (0, num_keypoints):
        problem = f"{len(skeleton.names)} keypoint names for {objects}"
        findings.error("dataset.json", f"{info.path}: keypoint_names", problem, "name every keypoint once")
    for a, b in skeleton.links:
        if not (0 <= a < num_keypoints and 0 <= b < num_keypoints):
            problem = f"links points {a} and {b} (from 0), but objects have {num_keypoints} keypoints"
            findings.warn("dataset.json", f"{info.path}: skeleton", problem, "the link is not drawn")
    try:
        flip_order(skeleton.flip_pairs or (), num_keypoints)
    except ValueError as error:
        remedy = "give every keypoint at most one partner"
        findings.error("dataset.json", f"{info.path}: flip_pairs", str(error), remedy)
    if skeleton.sigmas is not None and len(skeleton.sigmas) != num_keypoints:
        problem = f"{len(skeleton.sigmas)} OKS sigmas for {objects}"
        findings.error("dataset.json", f"{info.path}: oks_sigmas", problem, "give one positive number per keypoint")


def _point_pairs(value: Any, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return pairs of keypoints as indices; raises ValueError with what is there instead."""
    if not isinstance(value, list):
        raise ValueError(f"got {short(value)}")
    for n, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"got {short(pair)} at position {n}")
    return tuple((_point_index(a, names), _point_index(b, names)) for a, b in value)


def _point_index(value: Any, names: Sequence[str]) -> int:
    """Return the index of a keypoint given by name or by index from 0."""
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"but {short(value)} is not among keypoint_names")
        return list(names).index(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"but {short(value)} is no keypoint")
    return value


@dataclass
class _Folder:
    """The records of one split while they are collected."""

    images: list[Record] = field(default_factory=list)
    objects: list[Record] = field(default_factory=list)
    object_places: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def why_no_split(split: Path, folder: Path) -> str:
    """Say why ``folder``, one of the two that ``split`` needs, is not there, and which other one may be meant."""
    others = [p.name for p in folders_in(split.parent) if (p / "images").is_dir() and p.name not in _SPLITS]
    hint = f"; is {split.parent / others[0]} meant?" if others and not split.exists() else ""
    expected = f"expected {split}/images and {split}/annotations with one json per image{hint}"
    return f"{folder}: {why_no_folder(folder)}; {expected}"


def read_folder(
    split: Path,
    info: DatasetInfo,
    *,
    on_bad_data: str = "error",
    uses: Collection[str] = (),
    findings: Findings | None = None,
) -> Annotations:
    """Read ``images`` and ``annotations`` below ``split``.

    Both are read to any depth; a stem is the path below them without its suffix. Image ids count from 1 in the order
    of the stems. Sizes come from the image headers, after EXIF rotation.

    Args:
        split: ``custom/train`` or ``custom/test``.
        info: What ``dataset.json`` says; without classes, those of the annotations are used.
        on_bad_data: ``error`` or ``skip``.
        uses: What is learnt beside boxes, see `annotations_from_records`.
        findings: What is known to be wrong already, with ``on_bad_data``; raised with the rest.

    Raises:
        FileNotFoundError: A folder is missing.
        BadDataError: What is wrong, all findings at once.
    """
    for folder in (split / "images", split / "annotations"):
        if not folder.is_dir():
            raise FileNotFoundError(why_no_split(split, folder))
    findings = Findings(on_bad_data) if findings is None else findings
    content = _Folder()
    for stem, image, annotation in _pair_files(split, findings):
        _read_pair(split, stem, image, annotation, content, findings)
    labels, places = content.labels, content.object_places
    categories, numbers = number_labels(labels, places, info.classes, content.notes, findings)
    for record, number in zip(content.objects, numbers):
        record["category_id"] = number
    num_keypoints = _count_keypoints(content.objects)
    if num_keypoints and "keypoints" in uses:
        check_point_counts(info, num_keypoints, findings)
    if num_keypoints and len(info.skeleton.names) == num_keypoints:
        links = [(a, b) for a, b in info.skeleton.links if min(a, b) >= 0 and max(a, b) < num_keypoints]
        for category in categories:
            category["keypoints"] = list(info.skeleton.names)
            category["skeleton"] = [[a + 1, b + 1] for a, b in links]
    rules = Rules(
        str(split),
        image_place=lambda i: str(split / content.images[i]["file_name"]),
        object_place=lambda n: content.object_places[n],
        strict_boxes=True,
        box_format="[x1, y1, x2, y2]",
        as_written=lambda x, y, width, height: (x, y, x + width, y + height),
        usual_forms=(("keypoints", NESTED_POINTS),),
    )
    return annotations_from_records(
        content.images, content.objects, categories, rules, findings, uses=uses, notes=content.notes
    )


def _count_keypoints(objects: Sequence[Record]) -> int:
    """Return how many keypoints the first object with any has; 0 where none has, or nothing that can be read."""
    for record in objects:
        with contextlib.suppress(ValueError):
            if points := POINTS.read(record["keypoints"])[0] if record["keypoints"] is not None else []:
                return len(points) // 3
    return 0


def _pair_files(split: Path, findings: Findings) -> list[tuple[str, Path, Path]]:
    """Return (stem, image, json) of every pair, in the order of the stems; stems hold the folders below ``images``."""
    pictures, jsons = split / "images", split / "annotations"
    image_of = files_by_stem(pictures, is_picture_name, "not an image by its name", findings)
    json_of = files_by_stem(jsons, lambda name: name.lower().endswith(".json"), "not a json by its name", findings)
    if image_of and not json_of:
        others = [name for name in list_folder(jsons).files if is_text(name)]
        found = f"{len(others)} other file(s), such as {examples(others)}" if others else "nothing"
        problem = f"no json for any of {len(image_of)} pictures; the folder holds {found}"
        remedy = "expected one json per image, see the README for the format"
        for suffix, dataset in ((".txt", "yolo"), (".xml", "voc")):
            if others and all(name.lower().endswith(suffix) for name in others):
                remedy = f"--dataset {dataset} reads such files, see docs/own_data.md"
        if any(name.lower().endswith(".json") for name in list_folder(pictures).files):
            remedy = f"the jsons in {pictures} belong there"
        findings.error("pairs", str(jsons), problem, remedy)
        return []
    if not image_of:
        among = [name for name in list_folder(jsons).files if is_picture_name(name)]
        remedy = f"{jsons} has {len(among)} of them: move them there" if among else "add the pictures"
        findings.error("pairs", str(pictures), "no pictures there", remedy)
        return []
    alone, without = sorted(set(image_of) - set(json_of)), sorted(set(json_of) - set(image_of))
    few = without if len(without) <= MAX_STRANGERS else []
    strangers = [stem for stem in few if _report_stranger(split, jsons / json_of[stem], findings)]
    if strangers and is_nearly_all(len(alone), len(image_of)):  # one file has the objects of all pictures
        return []
    lines: list[Alone] = []
    similar = SimilarStems(alone, image_of, pictures)
    for stem in sorted(set(without) - set(strangers)):
        problem = f"no image {pictures / stem}.*{similar.of(stem)}"
        lines.append((str(jsons / json_of[stem]), problem, "add the image or remove the json"))
    missing_partners(findings, jsons, lines, len(json_of), _of_other_split(split, "images", without, similar))
    lines = []
    similar = SimilarStems(without, json_of, jsons)
    for stem in alone:
        problem = f"no annotation {jsons / stem}.json{similar.of(stem)}"
        remedy = 'add it ({"bboxes": []} for an image without objects) or remove the image'
        lines.append((str(pictures / image_of[stem]), problem, remedy))
    missing_partners(findings, pictures, lines, len(image_of), _of_other_split(split, "annotations", alone, similar))
    return [(stem, pictures / image_of[stem], jsons / json_of[stem]) for stem in sorted(set(image_of) & set(json_of))]


def _report_stranger(split: Path, path: Path, findings: Findings) -> bool:
    """Report a json without image that holds more than one picture's objects, such as a COCO file's."""
    try:
        content = read_json(path)
    except BadDataError:
        return False
    known = describe_json(content)
    if known is None or "bboxes" in content:
        return False
    what, remedy = known
    if what == COCO:
        remedy = _AS_COCO.format(json=path, pictures=split / "images")
    missing_partner(findings, str(path), f"expected the json of one picture, got {what}", remedy)
    return True


def _of_other_split(split: Path, folder: str, stems: Sequence[str], similar: SimilarStems) -> str:
    """Say in which other split's folder the partners of files are; "" where they are in none, or similar ones here."""
    if any(map(similar.of, stems)):
        return ""
    others = [path for path in split.parent.glob(f"*/{folder}") if path.parent != split]
    found = folder_with_stems(others, stems) if stems else None
    return f"{found} has them: are files of two splits mixed up?" if found else ""


def _read_pair(split: Path, stem: str, image: Path, annotation: Path, content: _Folder, findings: Findings) -> None:
    """Add one image and its objects to ``content``."""
    position = len(content.images)
    record: Record = {"id": position + 1, "file_name": image.relative_to(split).as_posix(), "height": 1, "width": 1}
    content.images.append(record)
    try:
        header = read_header(image)
        record["height"], record["width"] = header.shown_size
    except BadImageError as error:
        findings.error("image", str(error.path), error.problem, "replace the file", image=position)
        return
    try:
        entry = read_json(annotation)
    except BadDataError as error:
        problem = error.findings[0].problem
        findings.error("json", str(annotation), problem, error.findings[0].remedy, image=position)
        return
    if isinstance(entry, dict) and "bboxes" not in entry and isinstance(entry.get("segmentations"), list):
        entry = {"bboxes": [None] * len(entry["segmentations"]) or None, **entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("bboxes"), list):
        keys = f"one with {', '.join(map(short, entry))}" if isinstance(entry, dict) and entry else short(entry)
        meant = [key for key in entry if key.lower().strip("_") in _NAMES_OF_BOXES] if isinstance(entry, dict) else []
        remedy = (
            f"call {short(meant[0])} 'bboxes', with [x1, y1, x2, y2] each" if meant else "see the README for the format"
        )
        what, remedy = describe_json(entry) or (keys, remedy)
        if what == COCO:
            remedy = _AS_COCO.format(json=annotation, pictures=split / "images")
        problem = f"expected an object with a list 'bboxes', got {what}"
        findings.error("json", str(annotation), problem, remedy, image=position)
        return
    boxes = entry["bboxes"]
    for name in _PER_BOX:
        values = entry.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != len(boxes)):
            problem = f"{name}: {len(values)} entries" if isinstance(values, list) else f"{name} is {short(values)}"
            problem += f" for {len(boxes)} boxes"
            findings.error("per box", str(annotation), problem, f"give {name} one entry per box", image=position)
            return
    for key in sorted(set(entry) - {"bboxes", *_PER_BOX}):
        similar = difflib.get_close_matches(key, _PER_BOX, 1, cutoff=0.8)
        is_per_box = isinstance(entry[key], list) and len(entry[key]) == len(boxes) > 0
        if similar or is_per_box:
            remedy = f"is {similar[0]!r} meant?" if similar else f"read are {', '.join(['bboxes', *_PER_BOX])}"
            problem = f"unknown entry {short(key)}{' with a value for every box' if is_per_box else ''}"
            content.notes.add(("key", key), "unknown entry", str(annotation), problem, f"it is not read; {remedy}")
    per_box = {name: entry.get(name) or [None] * len(boxes) for name in _PER_BOX}
    for k, box in enumerate(boxes):
        content.object_places.append(f"{annotation}: bboxes[{k}]")
        content.labels.append(per_box["labels"][k])
        values = {ours: per_box[name][k] for name, ours in _PER_BOX.items() if ours}
        content.objects.append({"image_id": record["id"], "bbox": box, **values})
    _look_for_unrotated_boxes(header.orientation, record, boxes, image, findings)


def _look_for_unrotated_boxes(
    orientation: int, image: Record, boxes: list[Any], path: Path, findings: Findings
) -> None:
    """Report an EXIF-rotated picture whose boxes fit only the picture as it is stored."""
    corners = [box for box in boxes if BOX.fast([box]) is not None]
    if orientation < 5 or not corners:
        return
    height, width = image["height"], image["width"]
    right, bottom = max(b[2] for b in corners), max(b[3] for b in corners)
    if (right > width + 1 or bottom > height + 1) and right <= height + 1 and bottom <= width + 1:
        problem = f"EXIF turns the picture to {width} x {height}, but its boxes fit only {height} x {width}"
        remedy = "annotate the picture as viewers show it, or remove its EXIF orientation"
        findings.error("exif", str(path), problem, remedy, image=image["id"] - 1)
