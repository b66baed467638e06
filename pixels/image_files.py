"""Which files of a folder are pictures, to any depth: one rule for folders, COCO files, predict and the doctor.

Every file that is not used has a reason, so that a caller can name and count it. Nothing is opened here.
"""

import functools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image, ImageFile

# Names that say "a picture" wherever this Pillow cannot open them: without a plugin, or built without a library.
_PICTURES_ELSEWHERE = frozenset(
    [".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".webp", ".tif", ".tiff", ".svg", ".eps", ".exr", ".hdr"]
    + [".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw"]
)

# Read as pictures by their header alone, and never decoded.
_ONLY_HEADERS = ("MPEG",)

# Not pictures but programs that draw one: Pillow would have Ghostscript run them.
PROGRAMS = ("EPS",)

# What is true of so large a share of the files has one cause; so many of them are looked for in other folders.
NEARLY_ALL, SAMPLE = 0.9, 200

# So many names stand in one line.
_MAX_EXAMPLES = 3


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that the installed Pillow decodes."""
    Image.init()
    readers = {name: reader[0] for name, reader in Image.OPEN.items() if name not in (*_ONLY_HEADERS, *PROGRAMS)}
    stubs = {
        name
        for name, reader in readers.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }
    formats = set(readers) - stubs
    return frozenset(suffix.lower() for suffix, name in Image.registered_extensions().items() if name in formats)


def is_readable_name(name: str) -> bool:
    """Tell whether a file is, by its name, a picture that the installed Pillow opens."""
    return PurePosixPath(name).suffix.lower() in readable_suffixes()


def is_picture_name(name: str) -> bool:
    """Tell whether a file is a picture by its name, whether Pillow opens it or not."""
    return is_readable_name(name) or PurePosixPath(name).suffix.lower() in _PICTURES_ELSEWHERE


def unreadable_format(name: str) -> str | None:
    """Say why the installed Pillow does not open a picture of this name; None if it does or it is no picture's name."""
    if is_readable_name(name) or not is_picture_name(name):
        return None
    return f"the installed Pillow does not open {PurePosixPath(name).suffix} files; save it as JPEG or PNG"


@dataclass
class FolderContent:
    """What lies in a folder, to any depth, without hidden files and folders (a leading dot).

    Attributes:
        files: Names relative to the folder, with "/", sorted.
        links: Those of them that are links, or lie in a folder that is one.
        left_out: (name relative to the folder, why) of what was not looked into, sorted.
    """

    files: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def list_folder(root: Path) -> FolderContent:
    """List the files below ``root``; links to folders are followed, but never round in a circle.

    Left out, with the reason, are folders of results (`result_folder`), folders that cannot be read, links to
    nothing, and what is no regular file. ``root`` itself may be a folder of results; where it cannot be read, ``"."``
    is left out. Each folder is listed once, and no file is asked for anything.
    """
    content = FolderContent()

    def visit(folder: Path, prefix: str, above: tuple[str, ...], is_linked: bool) -> None:
        """List one folder and those below it, but none that it lies in itself."""
        try:
            with os.scandir(folder) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
            real = os.path.realpath(folder)
        except OSError as error:
            content.left_out.append((prefix.rstrip("/") or ".", f"cannot be listed ({error.strerror})"))
            return
        if real in above:
            content.left_out.append((prefix.rstrip("/"), "a link to a folder above it"))
            return
        origin = result_folder([entry.name for entry in entries]) if prefix else None
        if origin is not None:
            content.left_out.append((prefix.rstrip("/"), f"results of {origin}"))
            return
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                visit(folder / entry.name, name + "/", (*above, real), is_linked or entry.is_symlink())
            elif entry.is_file():
                content.files.append(name)
                if is_linked or entry.is_symlink():
                    content.links.add(name)
            else:
                is_dead = entry.is_symlink() and not Path(entry.path).exists()
                content.left_out.append((name, "a link to nothing" if is_dead else "no regular file"))

    visit(root, "", (), False)
    content.files.sort()
    content.left_out.sort()
    return content


def is_nearly_all(count: int, total: int) -> bool:
    """Tell whether something is true of so many of all files that it has one cause, which is said once."""
    return count > 1 and count >= NEARLY_ALL * total


def folder_with(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """Return the folder that has the most of some files, if it has most of them; looks for up to `SAMPLE` of them."""
    sample = names[:: -(-len(names) // SAMPLE) or 1]
    counts = {folder: sum(os.path.isfile(folder / name) for name in sample) for folder in folders}  # noqa: PTH113
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best is not None and 2 * counts[best] > len(sample) else None


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def pictures_below(folder: Path) -> list[Path]:
    """Return the pictures of a folder by their names, sorted; empty where there is no such folder."""
    return sorted(folder / name for name in list_folder(folder).files if is_picture_name(name))


def result_folder(names: Sequence[str]) -> str | None:
    """Return the command that fills a folder with these names with its results, None for any other folder.

    Results hold pictures, and pictures with boxes drawn in are nothing to train on or to predict.
    """
    known = set(names)
    if {"predictions.json", "predictions.json.tmp"} & known and {"overlays", "images.json"} & known:
        return "predict.py"
    if "metrics.jsonl" in known or {"args.json", "weights"} <= known or {"summary.json", "images.csv"} <= known:
        return "train.py"
    if "annotated.jpg" in known and any(name.startswith("augmented_") for name in names):
        return "check_dataset.py"
    return None


def spelling(name: str) -> str:
    """Return a name as all its spellings have it: "/" between folders, and accents in one piece (NFC).

    macOS splits an accent from its letter (NFD), Windows writes backslashes; the files are the same.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def printable(name: str) -> str:
    """Return a file's name as it can be printed: bytes that are no text, and line breaks, as escapes."""
    return name if name.isprintable() else ascii(name)


def examples(names: Sequence[str]) -> str:
    """Return the first names in one line and how many more there are."""
    shown = [printable(name) for name in names[:_MAX_EXAMPLES]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
