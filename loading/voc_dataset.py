"""Pascal VOC's layout, one xml for each picture, brought into COCO's records: boxes only.

    VOC2012/JPEGImages/a.jpg
    VOC2012/Annotations/a.xml
    VOC2012/ImageSets/Main/train.txt, val.txt       the stems of each split; else trainval.txt and test.txt

Or, as annotation tools write it, pictures and xmls beside each other, or in ``images`` and ``annotations``; those of
each split below ``train`` and ``valid``, ``val`` or ``test``, and without such folders all of them to be trained on.

Boxes are xmin, ymin, xmax, ymax in pixels that count from 1, both ends inside: the box of the first pixel alone is
1, 1, 1, 1. An object with ``difficult`` 1 becomes a region to ignore, as COCO's ``iscrowd`` says.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from annotations.arrays import Annotations, cached_annotations
from annotations.file_pairs import Alone, SimilarStems, files_by_stem, missing_partners
from annotations.findings import BadDataError, Finding, Findings
from annotations.forms import FLAG, NAME, SIDE, short
from annotations.normalised import NORMALISED
from annotations.record_checks import Rules
from annotations.record_reader import Notes, Record
from annotations.skeleton import Skeleton
from coco_utils import annotations_from_records
from files import naming, read_text, why_no_folder
from loading.samples import ImageFolder
from loading.split import NoSplitError, Split, checked_split
from pixels.image_files import is_picture_name, spelling
from pixels.images import BadImageError, read_header

# The lists of train and val, in the order in which they are looked for: both of one row, or none.
_LISTS = (("train", "val"), ("trainval", "test"), ("train", "test"))

# An annotation of ten thousand objects takes a tenth of this.
MAX_XML_BYTES = 32 << 20

_CORNERS = ("xmin", "ymin", "xmax", "ymax")

# Folders of pictures and of their xmls below that of a dataset or split: VOC's own, and those of annotation tools.
_FOLDERS = (("JPEGImages", "Annotations"), ("images", "annotations"), (".", "."))

# Folders of the splits, where no lists say which pictures are theirs.
_SPLITS = {"train": ("train",), "val": ("valid", "val", "test")}


@dataclass(frozen=True)
class VocFiles:
    """Where a split lies.

    Attributes:
        pictures: Folder of the pictures.
        xmls: Folder of the xmls; may be the same.
        listing: The file with the stems of the split; None where the folders have no others.
    """

    pictures: Path
    xmls: Path
    listing: Path | None = None

    @property
    def place(self) -> Path:
        """What says which pictures belong to the split."""
        return self.listing or self.xmls


def load_voc_split(
    root: Path,
    role: str,
    *,
    on_bad_data: str = "error",
    uses: Sequence[str] = (),
    cache_dir: Path | None = None,
    classes: Sequence[str] = (),
) -> Split:
    """Read the split ``train`` or ``val`` of a folder such as ``VOCdevkit/VOC2012``, through the annotation cache.

    Args:
        root: Holds ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``, or what `find_files` looks for.
        role: ``train`` or ``val``.
        on_bad_data: ``error`` or ``skip``.
        uses: What is learnt beside boxes: nothing.
        cache_dir: For caches.
        classes: Names of the labels 1, 2, ...: those of the training split or checkpoint. Others come after them.

    Raises:
        FileNotFoundError: A folder or list is missing.
        BadDataError: What is wrong with the data, all findings at once.
    """
    files, findings = find_files(root, role), Findings(on_bad_data)
    pairs = _find_pairs(files, findings)
    found = list(findings.found)

    def read() -> Annotations:
        return read_voc(files, pairs, findings, uses=uses, classes=classes)

    if any(finding.is_error for finding in found):
        read()  # raises them, and what is wrong with xmls
    findings.found.clear()
    paths = [str(path) for _, picture, xml in pairs for path in (picture, xml)]
    options = f"voc {role} {on_bad_data} {' '.join(uses)} {list(classes)}"
    annotations = cached_annotations(files.place, read, cache_dir, options, paths)
    images = ImageFolder(files.pictures)
    return checked_split(
        str(files.place), annotations, images, Skeleton(), Findings(on_bad_data, found), cache_dir=cache_dir
    )


def voc_pictures(root: Path, role: str) -> list[Path]:
    """Return the pictures of a split, sorted, without reading xmls; raises as `load_voc_split` does."""
    return [picture for _, picture, _ in _find_pairs(find_files(root, role), Findings("skip"))]


def find_files(root: Path, role: str) -> VocFiles:
    """Return where the pictures and xmls of ``train`` or ``val`` are: as lists say, in folders, or all of them.

    Raises:
        FileNotFoundError: ``root`` is no such dataset.
        NoSplitError: It has nothing for the role.
    """
    lists = root / "ImageSets" / "Main"
    if not lists.is_dir():
        below = {name: _paired_folders(root / name) for names in _SPLITS.values() for name in names}
        for name in _SPLITS[role]:
            if (folders := below[name]) is not None:
                return VocFiles(*folders)
        whole = _paired_folders(root)
        if role == "train" and whole is not None and not any(below.values()):
            return VocFiles(*whole)
        if whole is not None or any(below.values()):
            names = ", ".join(map(str, (root / name for name in _SPLITS[role])))
            raise NoSplitError(f"no {role} pictures: neither {lists} nor a folder with xmls exists ({names})")
    return VocFiles(root / "JPEGImages", root / "Annotations", find_list(root, role))


def _paired_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of pictures and xmls of a dataset or split, None where there are no xmls."""
    for pictures, xmls in _FOLDERS:
        where = folder / pictures, folder / xmls
        if all(path.is_dir() for path in where) and any(_is_xml(path.name) for path in where[1].iterdir()):
            return where
    return None


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")


def find_list(root: Path, role: str) -> Path:
    """Return the file that lists the pictures of ``train`` or ``val``.

    Raises:
        FileNotFoundError: ``root`` is no such dataset.
        NoSplitError: It has no list for the role.
    """
    folder = root / "ImageSets" / "Main"
    for needed in (root / "Annotations", root / "JPEGImages"):
        if not needed.is_dir():
            below = sorted(path.parent.name for path in root.glob("*/JPEGImages"))
            hint = f"; did you mean {root / below[0]}?" if below else ""
            raise FileNotFoundError(
                f"{needed}: {why_no_folder(needed)}; --data-path is the one that holds Annotations, JPEGImages and "
                f"ImageSets/Main, such as VOCdevkit/VOC2012{hint}"
            )
    column = ("train", "val").index(role)
    lists = [tuple(folder / f"{name}.txt" for name in names) for names in _LISTS]
    whole = [names for names in lists if all(name.is_file() for name in names)]
    for names in [*whole, *lists]:
        if names[column].is_file():
            return names[column]
    tried = " nor ".join(dict.fromkeys(str(names[column]) for names in lists))
    raise NoSplitError(f"no list of {role} pictures: neither {tried} exists; write one, a picture's stem a line")


def _find_pairs(files: VocFiles, findings: Findings) -> list[tuple[str, Path, Path]]:
    """Return (stem, picture, xml) of every picture of a split, sorted by stem."""
    pictures, xmls = files.pictures, files.xmls
    is_together = pictures == xmls
    picture_of = files_by_stem(
        pictures, is_picture_name, "not an image by its name", findings, lambda name: is_together and _is_xml(name)
    )
    xml_of = files_by_stem(xmls, _is_xml, "not an xml by its name", findings, lambda name: is_together)
    if files.listing is None:
        wanted = [(stem, "") for stem in sorted({*picture_of, *xml_of})]
    else:
        wanted = _listed_stems(files.listing, findings)
    pairs: dict[str, tuple[str, Path, Path]] = {}
    alone: list[Alone] = []
    similar_picture, similar_xml = SimilarStems(picture_of, picture_of, pictures), SimilarStems(xml_of, xml_of, xmls)
    of_line = " or remove the line" if files.listing is not None else ""
    for stem, place in wanted:
        if stem not in picture_of:
            problem = f"no picture {pictures / stem}.*{similar_picture.of(stem)}"
            remedy = f"add it{of_line} (a line is a picture's stem)" if of_line else "add it or remove the xml"
            alone.append((place or str(xmls / xml_of[stem]), problem, remedy))
        elif stem not in xml_of:
            problem = f"no annotation {xmls / stem}.xml{similar_xml.of(stem)}"
            remedy = f"add it (without objects for a picture without any){of_line or ' or remove the picture'}"
            alone.append((place or str(pictures / picture_of[stem]), problem, remedy))
        else:
            pairs[stem] = stem, pictures / picture_of[stem], xmls / xml_of[stem]
    missing_partners(findings, files.place, alone, len(alone) + len(pairs))
    if not pairs:
        if not any(finding.is_error for finding in findings.found):
            findings.error("list", str(files.place), "no pictures are listed", "write one stem a line")
        findings.raise_errors()
    return [pairs[stem] for stem in sorted(pairs)]


def _listed_stems(listing: Path, findings: Findings) -> list[tuple[str, str]]:
    """Return (stem, file and line) of each picture of a list, once."""
    try:
        lines = read_text(listing).splitlines()
    except UnicodeDecodeError as error:
        findings.error("list", str(listing), f"not UTF-8 text (byte {error.start})", "save the file as UTF-8")
        findings.raise_errors()
    found: dict[str, str] = {}
    for n, line in enumerate(lines):
        stem, place = spelling(line.strip()), f"{listing}: line {n + 1}"
        if stem in found:
            findings.warn("list", place, f"{stem} is listed before", "it is used once")
        elif stem:
            found[stem] = place
    return list(found.items())


def read_voc(
    files: VocFiles,
    pairs: Sequence[tuple[str, Path, Path]],
    findings: Findings,
    *,
    uses: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Annotations:
    """Read the xmls of some pictures; image ids count from 1 in the order of the stems.

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    images: list[Record] = []
    objects: list[Record] = []
    places: list[str] = []
    names: list[str] = []
    notes = Notes()
    for position, (_, picture, xml) in enumerate(pairs):
        name = picture.relative_to(files.pictures).as_posix()
        images.append({"id": position + 1, "file_name": name, "height": 1, "width": 1})
        try:
            tree = read_xml(xml)
            images[-1]["height"], images[-1]["width"] = _size(tree, picture, xml, notes)
        except BadDataError as error:
            first = error.findings[0]
            findings.error(first.kind, first.place, first.problem, first.remedy, image=position)
            continue
        for tag in sorted({child.tag for child in tree} - {"object"}):
            if difflib.get_close_matches(tag.lower(), ["object"], cutoff=0.8):  # else its objects would vanish
                findings.error("object", str(xml), f"<{tag}>, expected <object>", "correct the tag", image=position)
        for k, element in enumerate(tree.findall("object")):
            place = f"{xml}: object[{k}]"
            record: Record = {"image_id": position + 1, "category_id": 1, "bbox": [0, 0, 0, 0]}
            try:
                names.append("")
                names[-1] = _field(element, "name", NAME)
                record["iscrowd"] = _field(element, "difficult", FLAG) if _text(element, "difficult") else 0
                record["bbox"] = _box(element, place, notes)
            except ValueError as error:
                findings.error("object", place, str(error), "correct or remove the object", obj=len(objects))
            objects.append(record)
            places.append(place)
    known = [*classes, *sorted(set(filter(None, names)) - set(classes))]
    number_of = {name: k + 1 for k, name in enumerate(known)}
    for record, name in zip(objects, names):
        record["category_id"] = number_of.get(name, 1)
    if not known:
        findings.error("object", str(files.place), "no objects in any of its xmls", "annotate some pictures")
        findings.raise_errors()
    rules = Rules(
        str(files.place),
        image_place=lambda i: str(pairs[i][1]),
        object_place=lambda n: places[n],
        box_format="xmin, ymin, xmax, ymax",
        as_written=lambda x, y, width, height: (x + 1, y + 1, x + width, y + height),
    )
    categories: list[Record] = [{"id": k, "name": name} for name, k in number_of.items()]
    return annotations_from_records(images, objects, categories, rules, findings, uses=uses, notes=notes)


def read_xml(path: Path) -> Element:
    """Parse an annotation; entities and references to other files are refused.

    Raises:
        BadDataError: One line that names file and position.
    """

    def fail(problem: str, remedy: str = "correct the file") -> BadDataError:
        return BadDataError([Finding("xml", str(path), problem, remedy)])

    if (size := path.stat().st_size) > MAX_XML_BYTES:
        raise fail(f"{size} bytes are more than the limit of {MAX_XML_BYTES}", "is this an annotation?")
    try:
        with naming(path):
            tree: Element = fromstring(path.read_bytes())
    except DefusedXmlException as error:
        raise fail(f"entities are not read ({type(error).__name__})", "remove its DOCTYPE") from None
    except ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        if "encoding" not in path.read_bytes()[:100].decode(errors="replace"):
            try:
                path.read_bytes().decode()
            except UnicodeDecodeError as wrong:
                raise fail(
                    f"not UTF-8 text (byte {wrong.start})", "save it as UTF-8, or declare its encoding"
                ) from None
        raise fail(f"not valid xml at line {line} column {column + 1}: {reason}") from None
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise fail(f"not valid xml: {error}") from None
    if tree.tag != "annotation":
        raise fail(f"expected <annotation>, got <{short(tree.tag)[1:-1]}>", "is this an annotation of Pascal VOC?")
    return tree


def _text(element: Element, name: str) -> str:
    """Return the text of a child, empty where there is none."""
    child = element.find(name)
    return (child.text or "").strip() if child is not None else ""


def _field(element: Element, name: str, form: Any) -> Any:
    """Return a child's text in its form; raises ValueError that says what was expected."""
    text = _text(element, name)
    try:
        return form.read(text)[0]
    except ValueError as error:
        raise ValueError(f"{name} is {short(text) if text else 'missing'}, expected {error}") from None


def _size(tree: Element, picture: Path, xml: Path, notes: Notes) -> tuple[int, int]:
    """Return (height, width) that the boxes are meant for; raises BadDataError where the picture has another size."""
    try:
        header = read_header(picture)
    except BadImageError as error:
        raise BadDataError([Finding("image", str(picture), error.problem, "replace the file")]) from None
    size = tree.find("size")
    texts = [_text(size, name) if size is not None else "" for name in ("height", "width")]
    if set(texts) <= {"", "0"}:
        notes.add(("size",), "size", str(xml), "no size of the picture", "the picture's own is taken")
        return header.shown_size
    try:
        height, width = (SIDE.read(text)[0] for text in texts)
    except ValueError as error:
        problem = f"size is {short(texts[1])} x {short(texts[0])}, expected {error}"
        raise BadDataError([Finding("size", str(xml), problem, "correct it, or leave size out")]) from None
    if (height, width) not in ((header.height, header.width), header.shown_size):
        problem = f"its size is {width} x {height}, but {picture} has {header.width} x {header.height} pixels"
        remedy = "correct it: boxes are for the picture's own size"
        raise BadDataError([Finding("size", str(xml), problem, remedy)])
    return height, width


def _box(element: Element, place: str, notes: Notes) -> list[float]:
    """Return x, y, width, height in pixels from the top left corner, of an object that counts pixels from 1."""
    box = element.find("bndbox")
    if box is None:
        raise ValueError("no bndbox with xmin, ymin, xmax, ymax")
    corners = []
    for name in _CORNERS:
        text = _text(box, name)
        try:
            corners.append(float(text))
        except ValueError:
            raise ValueError(f"{name} is {short(text) if text else 'missing'}, expected a number") from None
    if not all(abs(value) <= 1 << 20 for value in corners):  # NaN is not
        raise ValueError(f"a corner of {_shown(corners)} is no place in a picture")
    x1, y1, x2, y2 = corners
    if min(corners) >= 0 and max(corners) <= 1 and x1 < x2 and y1 < y2:
        raise ValueError(f"box {_shown(corners)}: {NORMALISED}")
    if x2 < x1 or y2 < y1:
        axis = "x" if x2 < x1 else "y"
        raise ValueError(f"box {_shown(corners)} has {axis}max < {axis}min")
    if min(x1, y1) == 0:
        problem, remedy = f"box {_shown(corners)} begins at 0", "pixels are taken to count from 1, as VOC's do"
        notes.add(("from 0",), "from 0", place, problem, remedy)
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]


def _shown(corners: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in corners) + "]"
