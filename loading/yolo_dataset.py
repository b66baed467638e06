"""Pictures with one text file of labels each, as YOLO users have them, brought into COCO's records.

    data.yaml                 train, val, names, ...: see `loading.yolo_yaml`
    images/train/a.jpg        the picture
    labels/train/a.txt        its objects, one a row; the path is the picture's with /labels/ for the last /images/

A row is ``class cx cy width height`` (a box), ``class x1 y1 x2 y2 x3 y3 ...`` (an outline, whose box is taken), or with
``kpt_shape`` ``class cx cy width height`` and K keypoints. Numbers are shares of the picture's width and height.
"""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from annotations.arrays import Annotations, cached_annotations
from annotations.file_pairs import Alone, files_by_stem, missing_partners
from annotations.findings import Findings
from annotations.forms import short
from annotations.record_checks import Rules
from annotations.record_reader import Notes, Record
from coco_utils import annotations_from_records
from files import describe_content, read_text
from loading.samples import ImageFolder
from loading.split import NoSplitError, Split, checked_split
from loading.yolo_yaml import YoloInfo, find_yaml, read_yolo_info
from pixels.image_files import examples, is_picture_name, printable, spelling
from pixels.images import BadImageError, read_header

# How far a label may reach over the picture's edge and is cut to it, in shares of the picture's side.
MAX_OVERHANG = 0.1

# Tools write six decimals: what is no farther out is exact.
ROUNDING = 2e-6

_SHARES = "numbers are shares of the picture's width and height, 0 to 1"


def load_yolo_split(
    path: Path, role: str, *, on_bad_data: str = "error", uses: Sequence[str] = (), cache_dir: Path | None = None
) -> Split:
    """Read the split ``train`` or ``val`` that a ``data.yaml`` names, through the annotation cache.

    Args:
        path: The file, or its folder.
        role: ``train`` or ``val``.
        on_bad_data: ``error`` or ``skip``.
        uses: What is learnt beside boxes, see `annotations_from_records`.
        cache_dir: For caches.

    Raises:
        FileNotFoundError: There is no such file.
        BadDataError: What is wrong with the data, all findings at once.
    """
    path = find_yaml(path)
    info, findings = read_yolo_info(path, uses), Findings(on_bad_data)
    found = find_pictures(info, role, findings)

    def read() -> Annotations:
        return read_labels(info, found, findings, uses=uses)

    if any(finding.is_error for finding in findings.found):
        read()  # raises them, and what is wrong with labels
    seen = Findings(on_bad_data, list(findings.found))
    findings.found.clear()
    paths = [*found.pictures, *(label for label in found.labels if label is not None)]
    options = f"yolo {role} {on_bad_data} {' '.join(uses)}"
    annotations = cached_annotations(path, read, cache_dir, options, paths)
    images = ImageFolder(found.root, apply_exif=True)
    split = checked_split(f"{path} ({role})", annotations, images, info.skeleton, seen, cache_dir=cache_dir)
    # Pictures beside those that a text file lists; the rest of the tree belongs to others.
    folders = {name.rpartition("/")[0] for name in found.names}
    return replace(split, unused=tuple(name for name in split.unused if name.rpartition("/")[0] in folders))


def yolo_pictures(path: Path, role: str) -> list[Path]:
    """Return the pictures of a split, sorted, without reading labels; raises as `load_yolo_split` does."""
    return [
        Path(picture) for picture in find_pictures(read_yolo_info(find_yaml(path)), role, Findings("skip")).pictures
    ]


@dataclass
class FoundPictures:
    """The pictures of a split, sorted by path, and their labels.

    Attributes:
        root: The folder that names are relative to.
        pictures: Absolute paths.
        labels: The label file of each, None where there is none.
    """

    root: Path = Path()
    pictures: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the pictures, relative to the root."""
        start = len(str(self.root).rstrip("/")) + 1
        return [picture[start:] for picture in self.pictures]


def find_pictures(info: YoloInfo, role: str, findings: Findings) -> FoundPictures:
    """Look for the pictures of a role and their label files; every other file beside them is named.

    Raises:
        NoSplitError: The yaml has no entry for the role.
        BadDataError: There are no pictures.
    """
    if role not in info.pictures:
        raise NoSplitError(f"{info.path}: no entry {role!r}; name the folder of its pictures")
    pictures: dict[str, None] = {}
    are_all = True
    for entry in info.pictures[role]:
        place = f"{info.path}: {role}"
        entry = entry.replace("\\", "/")  # from Windows
        where = Path(os.path.normpath(info.root / entry))
        if not where.exists() and entry.startswith("../"):  # as Roboflow writes folders that lie beside the yaml
            where = Path(os.path.normpath(info.root / entry.removeprefix("../")))
        if where.is_dir():
            stems = files_by_stem(where, is_picture_name, "not an image by its name", findings, _is_label_name)
            pictures |= dict.fromkeys(f"{where}/{name}" for name in stems.values())
        elif where.suffix == ".txt" and where.is_file():
            pictures |= dict.fromkeys(_listed_pictures(where, info.root, findings))
            are_all = False
        else:
            problem = f"{printable(str(info.root / entry))} is neither a folder nor a text file"
            findings.error("data.yaml", place, problem, f"it is looked for from {info.root}; correct it")
    found = FoundPictures(pictures=sorted(pictures))
    if not found.pictures:
        if not any(finding.is_error for finding in findings.found):
            findings.error("data.yaml", f"{info.path}: {role}", "no pictures there", "correct the path or add pictures")
        findings.raise_errors()
    found.root = Path(os.path.commonpath({picture.rpartition("/")[0] for picture in found.pictures}))
    _find_labels(found, f"{info.path}: {role}", findings, are_all=are_all)
    return found


def _listed_pictures(listing: Path, root: Path, findings: Findings) -> list[str]:
    """Return the pictures that a text file lists, relative to its folder or to ``root``."""
    try:
        lines = read_text(listing).splitlines()
    except UnicodeDecodeError as error:
        findings.error("list", str(listing), f"not UTF-8 text (byte {error.start})", "save the file as UTF-8")
        return []
    pictures = []
    alone: list[Alone] = []
    for n, line in enumerate(lines):
        if not (name := line.strip().replace("\\", "/")):
            continue
        tried = [os.path.normpath(folder / name) for folder in (listing.parent, root)]
        there = [path for path in tried if Path(path).is_file()]
        if there:
            pictures.append(there[0])
        else:
            problem = f"no picture {printable(name)}"
            alone.append((f"{listing}: line {n + 1}", problem, f"add it or correct the line ({tried[0]})"))
    missing_partners(findings, listing, alone, len(alone) + len(pictures))
    return pictures


def label_path(picture: str) -> str:
    """Return where the labels of a picture are: in ``labels`` for the last ``images`` of its path, else beside it."""
    before, images, after = picture.rpartition("/images/")
    path = f"{before}/labels/{after}" if images else picture
    return f"{path.rpartition('.')[0]}.txt"


def _is_label_name(name: str) -> bool:
    return name.lower().endswith(".txt")


def _labels_elsewhere(picture: str, wanted: str) -> str:
    """Say where the labels of a picture are that has none where they belong; "" where they are not found."""
    folder, _, name = wanted.rpartition("/")
    above, _, last = folder.rpartition("/")
    others = [f"{picture.rpartition('.')[0]}.txt", f"{above}/{name}", f"{folder}/labels/{name}"]
    for part in ("Labels", "label", "annotations", "Annotations", "txt"):
        others += [wanted.replace("/labels/", f"/{part}/"), f"{above}/{part}/{last}/{name}", f"{above}/{part}/{name}"]
    return next((other for other in others if other != wanted and Path(other).is_file()), "")


def _find_labels(found: FoundPictures, place: str, findings: Findings, *, are_all: bool) -> None:
    """Look for the label file of every picture; where ``are_all`` the pictures, text files of no picture are named."""
    wanted = [label_path(picture) for picture in found.pictures]
    on_disk: dict[str, str] = {}
    for folder in sorted({path.rpartition("/")[0] for path in wanted}):
        if Path(folder).is_dir():
            names = sorted(entry.name for entry in Path(folder).iterdir() if _is_label_name(entry.name))
            on_disk |= {f"{folder}/{spelling(name[:-4])}.txt": f"{folder}/{name}" for name in names}
    keys = [f"{folder}/{spelling(name)}" for folder, _, name in (path.rpartition("/") for path in wanted)]
    found.labels = [on_disk.get(key) for key in keys]
    without = [picture for picture, label in zip(found.pictures, found.labels) if label is None]
    if len(without) == len(wanted):
        problem = f"none of {len(wanted)} pictures has a label file; that of {without[0]} would be {wanted[0]}"
        elsewhere = _labels_elsewhere(without[0], wanted[0])
        remedy = f"put the label files there{f'; one is {elsewhere}' if elsewhere else ''}"
        findings.error("labels", place, problem, remedy)
    elif without:
        problem = f"{len(without)} of {len(wanted)} pictures have no label file: {examples(without)}"
        findings.warn("labels", place, problem, "they count as pictures without objects")
    others = sorted(set(on_disk.values()) - set(filter(None, found.labels)))
    if others and are_all:
        problem = f"{len(others)} text file(s) of no picture: {examples(others)}"
        findings.warn("stray file", place, problem, "they are not used")


def read_labels(info: YoloInfo, found: FoundPictures, findings: Findings, *, uses: Collection[str] = ()) -> Annotations:
    """Read the label files and the sizes of the pictures, as viewers show them (EXIF).

    Image ids count from 1 in the order of the pictures' paths; category ids are class numbers plus 1.

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    images: list[Record] = []
    rows = _Rows(info, findings, "keypoints" in uses)
    for position, (name, picture, label) in enumerate(zip(found.names, found.pictures, found.labels)):
        images.append({"id": position + 1, "file_name": name, "height": 1, "width": 1})
        try:
            images[-1]["height"], images[-1]["width"] = read_header(Path(picture)).shown_size
        except BadImageError as error:
            findings.error("image", str(error.path), error.problem, "replace the file", image=position)
            continue
        if label is not None:
            rows.read_file(label, images[-1])
    categories: list[Record] = [{"id": k + 1, "name": name} for k, name in enumerate(info.classes)]
    if info.skeleton.names:
        for category in categories:
            category["keypoints"] = list(info.skeleton.names)
    rules = Rules(
        str(info.path),
        image_place=lambda i: found.pictures[i],
        object_place=lambda n: rows.places[n],
        box_format="class, centre x, centre y, width, height",
    )
    return annotations_from_records(images, rows.objects, categories, rules, findings, uses=uses, notes=rows.notes)


class _Rows:
    """The objects of all label files.

    Args:
        info: Classes and keypoints.
        findings: Collects what is wrong.
        uses_points: Whether keypoints are learnt: a wrong one is an error then.
    """

    def __init__(self, info: YoloInfo, findings: Findings, uses_points: bool) -> None:
        self.info, self.findings, self.uses_points = info, findings, uses_points
        self.notes = Notes()
        self.objects: list[Record] = []
        self.places: list[str] = []

    def read_file(self, label: str, image: Record) -> None:
        """Add the objects of one picture."""
        try:
            lines = read_text(Path(label)).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                known = describe_content(Path(label)) or ""
                problem = "text in UTF-16" if "UTF-16" in known else f"not UTF-8 text (byte {error.start})"
            else:
                problem = f"cannot be read ({error.strerror})"
            remedy = "save it as UTF-8, one object a row"
            self.findings.error("labels", label, problem, remedy, image=image["id"] - 1)
            return
        for n, line in enumerate(lines):
            if not line.strip():
                continue
            place = f"{label}: line {n + 1}"
            record: Record = {"image_id": image["id"], "category_id": 1, "bbox": [0, 0, 0, 0]}
            try:
                record |= self._read_row(line.split(), place, image["width"], image["height"])
            except _RowError as error:
                self.findings.error("row", place, error.problem, error.remedy, obj=len(self.objects))
            self.objects.append(record)
            self.places.append(place)

    def _read_row(self, texts: list[str], place: str, width: int, height: int) -> Record:
        """Return category, box and what else a row says, in pixels."""
        try:
            numbers = [float(text) for text in texts]
        except ValueError:
            wrong = next(text for text in texts if not _is_number(text))
            raise _RowError(f"expected numbers, got {short(wrong)}", self._remedy_for_text(texts, wrong)) from None
        if not all(map(math.isfinite, numbers)):
            raise _RowError("a number is not finite", "correct or remove the row")
        k, num_classes = numbers[0], len(self.info.classes)
        if not k.is_integer() or not 0 <= k < num_classes:
            problem = f"class {texts[0]}, expected 0 to {num_classes - 1}, as {self.info.path.name} names them"
            remedy = "; classes count from 0" if k == num_classes else ""
            raise _RowError(problem, f"correct it, or add the class to names{remedy}")
        record: Record = {"category_id": int(k) + 1}
        numbers = numbers[1:]
        pose = self.info.num_keypoints * self.info.point_size
        if len(numbers) == 4 or (pose and len(numbers) == 4 + pose):
            record["bbox"] = self._box(numbers[:4], place, width, height)
            if len(numbers) > 4:
                record["keypoints"] = self._points(numbers[4:], place, width, height)
        elif not pose and len(numbers) >= 6 and len(numbers) % 2 == 0:
            record |= self._outline(numbers, place, width, height)
        else:
            raise _RowError(f"{len(texts)} numbers, expected {self._expected()}", self._remedy(len(texts)))
        return record

    def _expected(self) -> str:
        if count := self.info.num_keypoints:
            size = self.info.point_size
            return f"5 (class and box) or {5 + count * size} ({count} keypoints of {size}, as kpt_shape says)"
        return "5 (class, centre x, centre y, width, height), or a class and an outline of 3 points or more"

    def _remedy_for_text(self, texts: list[str], wrong: str) -> str:
        """Return what to do about a row with a word where a number belongs."""
        if wrong == texts[0] and wrong in self.info.classes:
            return f"give the class by its number: {wrong!r} is {self.info.classes.index(wrong)}"
        if len(texts) == 1 and "," in wrong:
            return "put blanks between the numbers, not commas"
        if _is_number(wrong.replace(",", ".")):
            return "write a point in decimal numbers, not a comma"
        return "correct or remove the row"

    def _remedy(self, found: int) -> str:
        if self.info.num_keypoints:
            return "correct the row, or kpt_shape"
        if found == 6:
            return "a sixth number is the score of a prediction: remove it"
        return "correct the row; for keypoints give kpt_shape in the yaml"

    def _box(self, numbers: list[float], place: str, width: int, height: int) -> list[float]:
        """Return x, y, width, height in pixels."""
        x, y, w, h = numbers
        if w <= 0 or h <= 0:
            raise _RowError(f"a box {w:g} wide and {h:g} high has no inside", "correct or remove the row")
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        try:
            cut = self._cut(corners, "box", place)
        except _RowError as error:
            if min(numbers) >= 0 and max(numbers) <= 1 and x < w and y < h:
                error.remedy += "; as corners x1, y1, x2, y2 it would lie inside: write centre, width and height"
            raise
        if cut == corners:
            return [x * width - w * width / 2, y * height - h * height / 2, w * width, h * height]
        return _box_of(cut[::2], cut[1::2], width, height)

    def _outline(self, numbers: list[float], place: str, width: int, height: int) -> Record:
        """Return a polygon in pixels, and its box."""
        points = self._cut(numbers, "outline", place)
        box = _box_of(points[::2], points[1::2], width, height)
        scale = (width, height)
        return {"bbox": box, "segmentation": [[value * scale[k % 2] for k, value in enumerate(points)]]}

    def _points(self, numbers: list[float], place: str, width: int, height: int) -> list[float]:
        """Return x, y, v of every keypoint, in pixels; of two numbers, 0 0 and negative ones are not labelled."""
        size, points = self.info.point_size, []
        for k in range(0, len(numbers), size):
            x, y = numbers[k : k + 2]
            v = numbers[k + 2] if size == 3 else (0.0 if min(x, y) < 0 or x == y == 0 else 2.0)
            if v == 0:
                points += [0.0, 0.0, 0.0]
                continue
            try:
                x, y = self._cut([x, y], f"keypoint {k // size}", place)
            except _RowError as error:
                if self.uses_points:
                    raise
                remedy = "it is left out; nothing here needs it"
                self.notes.add(("unused point",), "unused keypoints", place, error.problem, remedy)
                x = y = v = 0.0
            points += [x * width, y * height, v]
        return points

    def _cut(self, values: list[float], what: str, place: str) -> list[float]:
        """Return x, y, x, y, ... cut to the picture: with a remark a little outside, an error far outside."""
        beyond = max(-min(values), max(values) - 1)
        if beyond <= 0:
            return values
        if beyond > MAX_OVERHANG:
            far = max(values, key=lambda value: max(-value, value - 1))
            remedy = f"{_SHARES}; these look like pixels" if far > 2 else _SHARES
            raise _RowError(f"the {what} reaches to {far:g}, far outside the picture", remedy)
        if beyond > ROUNDING:
            problem = f"the {what} reaches {beyond:.2g} of the picture's side over its edge"
            self.notes.add(("outside",), "box outside", place, problem, "it is cut to the picture")
        return [min(max(value, 0.0), 1.0) for value in values]


class _RowError(ValueError):
    """A row that cannot be read."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _box_of(xs: Sequence[float], ys: Sequence[float], width: int, height: int) -> list[float]:
    """Return x, y, width, height in pixels of the box around points."""
    x, y = min(xs) * width, min(ys) * height
    w, h = max(xs) * width - x, max(ys) * height - y
    if w <= 0 or h <= 0:
        raise _RowError("nothing of it lies inside the picture, or it has no inside", "correct or remove the row")
    return [x, y, w, h]
