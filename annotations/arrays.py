"""All annotations of one dataset in flat arrays, and their cache on disk.

Every dataset of this suite (COCO json, custom folder, YOLO, Pascal VOC, drawn shapes) is turned into one
`Annotations`; training targets, grouping, checks and ground truth for scoring are all read from it. It holds no
image, no label mapping and no dropped object. Python lists of dicts would cost every DataLoader worker a copy of
its own (COCO: 1.7 GB each); these arrays are memory-mapped from one file and shared by all processes of the machine.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from annotations.findings import Finding
from files import write_aside, write_torch_file
from process.waiting import WaitError, wait_until
from utils import sha256_of_file

logger = logging.getLogger(__name__)

# Raised by one whenever the arrays or their meaning change: older cache files are then ignored.
CACHE_FORMAT = 4

# How long another process may take to write a cache before this one reads the annotations itself.
LOCK_SECONDS = 600.0


@dataclass(frozen=True, eq=False)
class Annotations:
    """Images and objects as arrays; ``I`` images, ``N`` objects, ``K`` keypoints per object.

    Objects are sorted by image and keep the order of their file within one image.

    Attributes:
        image_ids: int64 [I], unique.
        heights: int32 [I], of the image as it is shown, after EXIF rotation where that applies.
        widths: int32 [I].
        name_bytes: uint8, the UTF-8 file names one after another.
        name_starts: int64 [I + 1], where each name begins in ``name_bytes``.
        object_starts: int64 [I + 1]; image i owns the objects ``object_starts[i]`` to ``object_starts[i + 1]``.
        boxes_xywh: float64 [N, 4], pixels from the top left corner, unclipped, as the file says.
        category_ids: int64 [N].
        areas: float64 [N], square pixels.
        is_crowd: bool [N], regions to ignore rather than objects.
        keypoints: float64 [N, K, 3], (x, y, v) with v 0 not labelled, 1 labelled but hidden, 2 visible.
        polygon_points: float64, the polygons' x, y, x, y, ... one after another.
        polygon_starts: int64 [Q + 1], where each polygon begins in ``polygon_points``.
        object_polygons: int64 [N + 1]; object n owns the polygons ``object_polygons[n]`` to ``[n + 1]``.
        rle_bytes: uint8, COCO's compressed run lengths (column-major over the whole image) one after another.
        rle_starts: int64 [N + 1]; an object without run lengths has an empty range.
        categories: (id, name) of every category, sorted by id.
        keypoint_names: K names, or empty where the file gives none.
        skeleton: Pairs of keypoint indices (from 0) that are joined in pictures.
        has_segmentations: Whether the file says anything of masks.
        id_texts: (number, text) of every image id and category id that is text in the file; results carry the text.
        warnings: What was repaired or dropped while reading, shortened as in `findings.shorten`.
        dropped_image_ids: Ids of images that were left out while reading (``--on-bad-data skip``).
        num_dropped: Objects that were left out while reading, those of such images included; of an image whose
            objects could not be read, one.
        cache_file: The file these arrays are mapped from, if any.
    """

    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    name_bytes: np.ndarray
    name_starts: np.ndarray
    object_starts: np.ndarray
    boxes_xywh: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    keypoints: np.ndarray
    polygon_points: np.ndarray
    polygon_starts: np.ndarray
    object_polygons: np.ndarray
    rle_bytes: np.ndarray
    rle_starts: np.ndarray
    categories: tuple[tuple[int, str], ...]
    keypoint_names: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    has_segmentations: bool = False
    id_texts: tuple[tuple[int, str], ...] = ()
    warnings: tuple[Finding, ...] = ()
    dropped_image_ids: tuple[int, ...] = ()
    num_dropped: int = 0
    cache_file: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    def __reduce__(self) -> Any:
        """Pickle as the cache file's path where there is one: a spawned worker maps it instead of copying."""
        if self.cache_file is not None:
            return load_annotations, (self.cache_file,)
        return Annotations, tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    @property
    def num_objects(self) -> int:
        """Number of objects, crowds included."""
        return len(self.category_ids)

    @property
    def num_keypoints(self) -> int:
        """Number of keypoints per object, 0 where the dataset has none."""
        return int(self.keypoints.shape[1])

    def file_name(self, index: int) -> str:
        """Return the file name of image ``index``, relative to its root."""
        start, end = self.name_starts[index : index + 2]
        return self.name_bytes[start:end].tobytes().decode()

    def own_id(self, number: int) -> int | str:
        """Return the id that the file has for an image or category: its text, where it is text."""
        return self._own_ids.get(number, number)

    @cached_property
    def _own_ids(self) -> dict[int, str]:
        return dict(self.id_texts)

    def with_file_names(self, names: Mapping[int, str]) -> "Annotations":
        """Return the same annotations with other file names for some images; they come from no cache file."""
        if not names:
            return self
        joined = [names.get(i, self.file_name(i)).encode() for i in range(len(self))]
        name_bytes, name_starts = join_bytes(joined)
        return dataclasses.replace(self, name_bytes=name_bytes, name_starts=name_starts, cache_file=None)

    def objects(self, index: int) -> slice:
        """Return where the objects of image ``index`` lie in the per-object arrays."""
        start, end = self.object_starts[index : index + 2]
        return slice(int(start), int(end))

    def object_images(self) -> np.ndarray:
        """Return the image index of every object, int64 [N]."""
        return np.repeat(np.arange(len(self)), np.diff(self.object_starts))

    def object_classes(self) -> np.ndarray:
        """Return the position in ``categories`` of every object's category, int64 [N]."""
        ids = np.array([id_ for id_, _ in self.categories], dtype=np.int64)  # sorted
        return np.searchsorted(ids, self.category_ids)

    @cached_property
    def position_of(self) -> dict[int, int]:
        """The position of every image by its id."""
        return {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}

    def polygons(self, n: int) -> list[np.ndarray]:
        """Return the polygons of object ``n``, each float64 [2 P] as x, y, x, y, ..."""
        first, last = self.object_polygons[n : n + 2]
        starts = self.polygon_starts[first : last + 1]
        return [self.polygon_points[a:b] for a, b in zip(starts[:-1], starts[1:])]

    def rle(self, n: int) -> bytes:
        """Return COCO's compressed run lengths of object ``n``, empty where it has polygons or nothing."""
        start, end = self.rle_starts[n : n + 2]
        return self.rle_bytes[start:end].tobytes()

    def num_labelled_keypoints(self) -> np.ndarray:
        """Return the number of labelled keypoints (v > 0) of every object, int64 [N]."""
        return np.count_nonzero(self.keypoints[:, :, 2] > 0, axis=1)


_ARRAYS = tuple(f.name for f in dataclasses.fields(Annotations) if f.type is np.ndarray)
_PLAIN = tuple(f.name for f in dataclasses.fields(Annotations) if f.name not in (*_ARRAYS, "cache_file"))


def join_bytes(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return (all bytes one after another as uint8, where each part starts as int64 [len + 1])."""
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return np.frombuffer(bytearray(b"".join(parts)), dtype=np.uint8), starts


def save_annotations(annotations: Annotations, path: Path) -> None:
    """Write ``annotations`` to ``path`` so that a reader sees the whole file or none of it."""
    content = {name: torch.from_numpy(np.ascontiguousarray(getattr(annotations, name))) for name in _ARRAYS}
    plain = {name: getattr(annotations, name) for name in _PLAIN}
    plain["warnings"] = [dataclasses.asdict(finding) for finding in annotations.warnings]
    with write_aside(path) as temporary, temporary.open("wb") as file:
        write_torch_file({"format": CACHE_FORMAT, "arrays": content, "plain": json.dumps(plain)}, file)


def load_annotations(path: str | Path) -> Annotations:
    """Map the annotations that `save_annotations` wrote; the arrays are read from disk as they are used."""
    content = torch.load(path, mmap=True, weights_only=True)
    if content["format"] != CACHE_FORMAT:
        raise ValueError(f"{path}: cache format {content['format']}, expected {CACHE_FORMAT}")
    plain = json.loads(content["plain"])
    return Annotations(
        **{name: content["arrays"][name].numpy() for name in _ARRAYS},
        categories=tuple((id_, name) for id_, name in plain["categories"]),
        keypoint_names=tuple(plain["keypoint_names"]),
        skeleton=tuple((a, b) for a, b in plain["skeleton"]),
        has_segmentations=plain["has_segmentations"],
        id_texts=tuple((number, text) for number, text in plain["id_texts"]),
        warnings=tuple(Finding(**fields) for fields in plain["warnings"]),
        dropped_image_ids=tuple(plain["dropped_image_ids"]),
        num_dropped=plain["num_dropped"],
        cache_file=str(path),
    )


def default_cache_dir() -> Path:
    """Return the folder for annotation caches: $XDG_CACHE_HOME or ~/.cache, in a folder of our own."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torchvision-detection-suite"


def cached_annotations(
    source: Path,
    build: Callable[[], Annotations],
    cache_dir: Path | None = None,
    options: str = "",
    files: Sequence[str] = (),
) -> Annotations:
    """Return ``build()``, memory-mapped from a cache file when ``source`` was read before and has not changed.

    A cache file is named after the source's path and ``options`` and remembers its size, modification time
    and SHA-256. Equal size and time count as unchanged; equal size and another time are settled by the hash.
    Of ``files`` names, sizes and times must be equal.
    The first process that needs a missing cache builds it under a file lock, others wait and map it. Where the folder
    cannot be written, or the lock is not given up, the annotations are built in memory, with a warning and nothing
    else lost.

    Args:
        source: The annotation file, or the folder of ``files``.
        build: Reads ``source``.
        cache_dir: Where cache files lie; by default `default_cache_dir`.
        options: Whatever else the result depends on.
        files: Paths of all other files that the result depends on.
    """
    cache_dir = cache_dir or default_cache_dir()
    key = hashlib.sha256(f"{source.resolve()}\n{options}\n{CACHE_FORMAT}".encode()).hexdigest()[:16]
    path = cache_dir / f"{source.stem}-{key}.annotations"
    stamp_path = path.with_suffix(".json")
    with locked(path.with_suffix(".lock"), f"another process, which reads {source} for the cache") as problem:
        if problem is None and _is_fresh(source, files, stamp_path) and path.exists():
            try:
                return load_annotations(path)
            except Exception as error:  # damaged by a crash or a full disk: build it anew
                logger.warning("annotation cache %s is unreadable (%s): building it anew", path, error)
        # As all are before they are read: one that changes meanwhile is read again by the next start.
        stamp = {**_stamp(source, with_hash=True), **_stamp_of_files(files)} if problem is None else {}
        annotations = build()
        try:
            if problem is not None:
                raise problem
            save_annotations(annotations, path)
            _write_stamp(stamp_path, stamp)
            return load_annotations(path)
        except (OSError, WaitError) as error:
            logger.warning("no annotation cache in %s (%s); every start reads %s anew", cache_dir, error, source)
            return annotations


@contextlib.contextmanager
def locked(path: Path, holder: str) -> Iterator[OSError | WaitError | None]:
    """Hold an exclusive lock on ``path``; yield the reason where its folder or the lock cannot be had.

    Args:
        path: The file to lock.
        holder: Who else may hold it, for the word on a wait.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        yield error
        return
    with file:
        advice = f"{path} is its lock; end a process that hangs (fuser -v {path}), or give another --cache-dir"
        try:
            wait_until(functools.partial(_try_lock, file), holder, limit=LOCK_SECONDS, advice=advice)
        except (OSError, WaitError) as error:
            yield error
            return
        yield None


def _try_lock(file: IO[str], seconds: float) -> bool:
    """Lock an open file; returns after at most so many seconds whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(seconds)
        return False
    return True


def _write_stamp(path: Path, stamp: dict[str, Any]) -> None:
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(stamp))


def _stamp(source: Path, with_hash: bool) -> dict[str, Any]:
    """Return what identifies the content of ``source``; of a folder nothing, its files are named one by one."""
    if source.is_dir():
        return {"size": 0, "mtime_ns": 0}
    status = source.stat()
    stamp: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if with_hash:
        stamp["sha256"] = sha256_of_file(source)
    return stamp


def _stamp_of_files(files: Sequence[str]) -> dict[str, Any]:
    """Return what identifies the names and, by sizes and times, the contents of files; nothing for no files."""
    if not files:
        return {}
    digest = hashlib.sha256()
    for name in files:
        try:
            status = os.stat(name)  # noqa: PTH116 - of a hundred thousand files
            digest.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"))
        except OSError:
            digest.update(os.fsencode(f"{name}\0missing\0"))
    return {"files": digest.hexdigest()}


def _is_fresh(source: Path, files: Sequence[str], stamp_path: Path) -> bool:
    """Tell whether the cache that ``stamp_path`` describes was made from ``source`` and ``files`` as they are now."""
    try:
        old = json.loads(stamp_path.read_text())
    except (OSError, ValueError):
        return False
    new, of_files = _stamp(source, with_hash=False), _stamp_of_files(files)
    if old.get("size") != new["size"] or old.get("files") != of_files.get("files"):
        return False
    if old.get("mtime_ns") == new["mtime_ns"]:
        return True
    new = _stamp(source, with_hash=True)
    if old.get("sha256") != new["sha256"]:
        return False
    _write_stamp(stamp_path, {**new, **of_files})
    return True
