"""Do the image files of a dataset exist, have the right size, and decode, and which files does it not use?"""

import concurrent.futures
import hashlib
import json
import logging
import os
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from annotations.arrays import Annotations, default_cache_dir
from annotations.findings import Findings
from files import write_aside
from pixels.image_files import (
    examples,
    folder_with,
    folders_in,
    is_nearly_all,
    is_picture_name,
    list_folder,
    printable,
    spelling,
)
from pixels.images import BadImageError, read_header, read_image
from utils import sha256_of_file

logger = logging.getLogger(__name__)


# The headers of larger sets are not read at the start: on a network disk that takes longer than it is worth.
MAX_HEADERS = 20_000


_END_OF_JPEG, _END_OF_PNG = b"\xff\xd9", b"IEND"


@dataclass(frozen=True)
class FoundFiles:
    """What `check_files` saw on disk.

    Attributes:
        respelled: The name on disk of each image, by position, whose entry writes it differently.
        unused: Pictures below the folder that no entry names, relative to it, sorted.
    """

    respelled: dict[int, str]
    unused: tuple[str, ...]


def check_files(annotations: Annotations, root: Path, findings: Findings) -> FoundFiles:
    """Report images that are missing or no regular file, and say how many are links out of ``root``.

    Links inside the folder are followed: only its owner places them, and `unsafe_file_name` keeps names from leaving
    the folder in any other way. A name that is not there is looked for in its other spellings.
    """
    content = list_folder(root)
    on_disk, why_not = set(content.files), dict(content.left_out)
    if "." in why_not:
        findings.error("image folder", str(root), why_not["."], "let this user read it")
        return FoundFiles({}, ())
    lookup: _Lookup | None = None
    respelled: dict[int, str] = {}
    missing: dict[int, str] = {}  # why each one is
    used = set()
    for i in range(len(annotations)):
        name = annotations.file_name(i)
        if name in on_disk:
            used.add(name)
            continue
        plain = PurePosixPath(name).as_posix()  # without "./" and "//"
        if plain in on_disk or _is_regular_file(root / name):  # hidden, or in a folder that is not searched
            used.add(plain)
            continue
        lookup = lookup or _Lookup(content.files)
        same = lookup.of_spelling.get(spelling(plain), [])
        if len(same) == 1:
            respelled[i] = same[0]
            used.add(same[0])
        elif same:
            problem = f"no such file, but {len(same)} that are spelled alike: {examples(same)}"
            findings.error("missing image", str(root / name), problem, "rename all but one of them", image=i)
        else:
            path = PurePosixPath(plain)
            reasons = [why_not[str(part)] for part in (path, *path.parents) if str(part) in why_not]
            missing[i] = reasons[0] if reasons else f"no such file{lookup.similar(spelling(plain))}"
    _report_missing(annotations, root, missing, findings)
    _warn_of_links(root, used & content.links, findings)
    if respelled:
        first = min(respelled)
        problem = (
            f"{len(respelled)} of {len(annotations)} names are written differently on disk (accents, backslashes), "
            f"such as {ascii(annotations.file_name(first))} for {ascii(respelled[first])}"
        )
        findings.warn("spelling", str(root), problem, "the files are used")
    unused = tuple(name for name in content.files if name not in used and is_picture_name(name))
    return FoundFiles(respelled, unused)


def _report_missing(annotations: Annotations, root: Path, missing: dict[int, str], findings: Findings) -> None:
    """Report images that are missing: one line each, or one for all where hardly any image is there."""
    if not is_nearly_all(len(missing), len(annotations)):
        for i, problem in missing.items():
            place = str(root / annotations.file_name(i))
            findings.error("missing image", place, problem, "add it or correct its entry", image=i)
        return
    names = [annotations.file_name(i) for i in missing]
    problem = f"{len(missing)} of {len(annotations)} images are not there, such as {names[0]!r}: "
    problem += missing[min(missing)]
    folders = [*folders_in(root), root.parent, *folders_in(root.parent), *root.parent.parent.glob(f"*/{root.name}")]
    folder = folder_with(folders, names)
    remedy = "give the folder that has them (--train-images, --val-images), or correct their file_name"
    if folder is not None:
        remedy = f"{folder} has them: give that folder, or the annotations of this one"
    files = list_folder(root).files
    if files and not any(map(is_picture_name, files)):  # an archive, maybe; those elsewhere are others
        problem += f"; the folder holds no pictures at all, but {len(files)} other file(s), such as {examples(files)}"
        remedy = "put them there, or give the folder that has them (--train-images, --val-images)"
    # To leave out all would leave nothing; some have a part of COCO's pictures and all of its annotations.
    left_out = missing if len(missing) < len(annotations) else ()
    findings.error("missing image", str(root), problem, remedy, images=left_out)
    findings.dropped_images.update(missing)


def _is_regular_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


class _Lookup:
    """Finds which files may be meant by names that are not there."""

    def __init__(self, files: Sequence[str]) -> None:
        self.of_spelling: dict[str, list[str]] = {}
        self.of_reason: dict[str, dict[str, list[str]]] = {reason: {} for reason in _SIMILAR}
        for file in files:
            name = spelling(file)
            self.of_spelling.setdefault(name, []).append(file)
            for reason, (key, _) in _SIMILAR.items():
                self.of_reason[reason].setdefault(key(name), []).append(file)

    def similar(self, name: str) -> str:
        """Say which one file may be meant by ``name``, or nothing."""
        for reason, (_, key) in _SIMILAR.items():
            found = self.of_reason[reason].get(key(name), [])
            if len(found) == 1:
                return f"; {printable(found[0])} {reason}"
        return ""


def _as_it_is(name: str) -> str:
    return name


def _without_blanks(name: str) -> str:
    return "".join(name.split())


def _without_folder(name: str) -> str:
    return name.rpartition("/")[2]


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0]


# Names that are alike in these ways are not taken for each other, but named: what is equal of the file and of the name
# that is not there.
_SIMILAR: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "differs in upper and lower case": (str.casefold, str.casefold),
    "differs in blanks": (_without_blanks, _without_blanks),
    "is what its %-codes say": (urllib.parse.unquote, urllib.parse.unquote),
    "has a suffix, file_name has none": (_without_suffix, _as_it_is),
    "has this name in another folder": (_without_folder, _without_folder),
    "has another suffix": (_without_suffix, _without_suffix),
}


def _warn_of_links(root: Path, links: set[str], findings: Findings) -> None:
    """Say how many of the images that are links lead out of ``root``, with an example."""
    real_root = root.resolve()
    first, count = "", 0
    for name in sorted(links):
        if not (root / name).resolve().is_relative_to(real_root):
            first, count = first or name, count + 1
    if count:
        problem = f"{count} image(s) are links to files outside it, such as {first} -> {(root / first).resolve()}"
        findings.warn("image link", str(root), problem, "they are used")


def check_headers(
    annotations: Annotations,
    root: Path,
    findings: Findings,
    *,
    cache_dir: Path | None = None,
    indices: np.ndarray | None = None,
) -> None:
    """Report images that are cut off, no images, or of another size than their annotations, without decoding them.

    Looks at sets of up to `MAX_HEADERS` images; of larger ones a bad file is named when it is read. Files found good
    are remembered as in `check_decoding`.
    """
    chosen = np.arange(len(annotations)) if indices is None else indices
    if len(chosen) > MAX_HEADERS:
        return
    memory = FileMemory("headers", root, cache_dir)
    sizes = {i: [int(annotations.heights[i]), int(annotations.widths[i])] for i in chosen.tolist()}
    todo = [i for i, size in sizes.items() if memory.get(root / annotations.file_name(i)) != size]
    for i in todo:
        path = root / annotations.file_name(i)
        problem = _header_problem(path, (sizes[i][0], sizes[i][1]))
        if problem is None:
            memory.put(path, sizes[i])
        else:
            findings.error("broken image", str(path), problem, "replace the file or correct its entry", image=i)
    if todo:
        memory.save()


def _header_problem(path: Path, size: tuple[int, int]) -> str | None:
    """Say what is wrong with an image file of the expected (height, width), or return None."""
    try:
        header = read_header(path)
        if size not in ((header.height, header.width), header.shown_size):
            found = f"{header.width} x {header.height} (width x height)"
            return f"the image is {found}, its annotations say {size[1]} x {size[0]}"
        with path.open("rb") as file:
            file.seek(-min(12, path.stat().st_size), os.SEEK_END)
            tail = file.read()
        if not tail.endswith(_END_OF_JPEG) and _END_OF_PNG not in tail:  # cut off, or one of the rarer formats
            read_image(path, size, apply_exif=False)
    except BadImageError as error:
        return error.problem
    return None


def find_shared_files(first: Sequence[Path], second: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Return pairs of files, one of each list, that are the same byte for byte.

    Only files of equal size are read. Lists of more than `MAX_HEADERS` files together are not looked at.
    """
    if len(first) + len(second) > MAX_HEADERS:
        return []
    of_size: dict[int, list[Path]] = {}
    for path in first:
        of_size.setdefault(path.stat().st_size, []).append(path)
    known: dict[Path, str] = {}

    def digest(path: Path) -> str:
        if path not in known:
            known[path] = sha256_of_file(path)
        return known[path]

    pairs = []
    for path in second:
        candidates = of_size.get(path.stat().st_size, ())
        same = next((other for other in candidates if digest(other) == digest(path)), None)
        if same is not None:
            pairs.append((same, path))
    return pairs


def check_decoding(
    annotations: Annotations,
    root: Path,
    findings: Findings,
    *,
    apply_exif: bool,
    cache_dir: Path | None = None,
    indices: np.ndarray | None = None,
    workers: int | None = None,
) -> None:
    """Decode every image once and report those that cannot be, or have another size than their annotations.

    Files found good are remembered with size and time in a cache file, so the next start looks at new ones only.
    A terminal shows a progress bar.

    Args:
        annotations: Names the files, and says how large their images are.
        root: Folder of the image files.
        findings: Collects what is wrong.
        apply_exif: See `read_image`.
        cache_dir: Folder of the cache file; None for `default_cache_dir`.
        indices: Images to look at, int64; all by default.
        workers: Threads; as many as there are cores by default.
    """
    memory = FileMemory("decoded", root, cache_dir)
    chosen = np.arange(len(annotations)) if indices is None else indices
    todo = [i for i in chosen.tolist() if memory.get(root / annotations.file_name(i)) is None]
    if not todo:
        return

    def problem_of(i: int) -> str | None:
        try:
            read_image(
                root / annotations.file_name(i), (int(annotations.heights[i]), int(annotations.widths[i])), apply_exif
            )
        except BadImageError as error:
            return error.problem
        return None

    if len(todo) > 1000:
        logger.info("decoding %d images once to find broken files", len(todo))
    workers = workers or os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding the GIL
        problems = tqdm(pool.map(problem_of, todo), "decoding images", len(todo), disable=None, leave=False)
        for i, problem in zip(todo, problems):
            path = root / annotations.file_name(i)
            if problem is None:
                memory.put(path, True)
            else:
                findings.error("broken image", str(path), problem, "replace the file", image=i)
    memory.save()


class FileMemory:
    """Remembers one plain value per file as long as the file's size and time stay the same.

    Those count that a file has when it is first asked for, before it is read: one that changes meanwhile is looked at
    again by the next start.

    Args:
        kind: What the values say; part of the cache file's name.
        root: The folder of the files.
        cache_dir: Folder of the cache file; None for `default_cache_dir`.
    """

    def __init__(self, kind: str, root: Path, cache_dir: Path | None = None) -> None:
        key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        self.path = (cache_dir or default_cache_dir()) / f"{kind}-{key}.json"
        self.values: dict[str, Any] = {}
        self.stamps: dict[Path, str] = {}
        try:
            content = json.loads(self.path.read_text())
            self.values = content if isinstance(content, dict) else dict.fromkeys(content, True)
        except (OSError, ValueError, TypeError):
            pass

    def _stamp(self, path: Path) -> str:
        if path not in self.stamps:
            try:
                status = path.stat()
            except OSError:
                return ""
            self.stamps[path] = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        return self.stamps[path]

    def get(self, path: Path) -> Any:
        """Return what is known of a file, None where nothing is."""
        return self.values.get(self._stamp(path))

    def put(self, path: Path, value: Any) -> None:
        """Note ``value`` for a file."""
        self.values[self._stamp(path)] = value

    def save(self) -> None:
        """Write the cache file, whole or not at all; a folder that cannot be written is a warning."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with write_aside(self.path) as temporary:
                temporary.write_text(json.dumps(self.values))
        except OSError as error:
            logger.warning("cannot remember looked-at files in %s: %s", self.path, error)
