"""What is remembered of each picture's look: how dark and bright it is, and whether it occurs twice.

Twice is byte for byte, or recompressed, resized or recoloured. A picture is remembered as a digest of its file and as a
grey thumbnail; the thumbnail's differences between neighbours, brighter or darker, are its perceptual hash (dHash,
https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html).
"""

import concurrent.futures
import functools
import hashlib
import io
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from annotations.arrays import Annotations, locked
from annotations.image_checks import FileMemory
from loading.samples import ImageFolder
from pixels.images import BadImageError, read_header, read_image
from pixels.value_range import OUTLIER, ValueRange

logger = logging.getLogger(__name__)

# Thumbnails are this high, and one wider: 256 differences between neighbours.
HASH_SIDE = 16

# Two pictures look the same when so few of the 256 differences are of another sign and their thumbnails correlate so
# well. Measured on 80 photographs: JPEG quality 20, a third of the size, 15 % more or 30 % less light, and edges cut by
# 1 % change 32 at the most and leave a correlation of 0.98; the most alike of 11,000 pairs of different photographs,
# the same table shot after shot, correlate by 0.92.
MAX_DIFFERENT_BITS = 32
MIN_CORRELATION = 0.96

# Colour modes, in Pillow's names, that have 8 bits a channel and no marker of their own.
_PLAIN_MODES = ("L", "RGB", "P", "RGBA", "CMYK")

# A thumbnail with less contrast than this (standard deviation in grey levels) shows nothing to compare.
MIN_CONTRAST = 1.0

# Rows of the table of all pairs that are held in memory at once.
BLOCK = 512

# After so many seconds of work a line says what is done.
QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Fingerprints:
    """What is remembered of some pictures.

    Attributes:
        indices: int64 [P], which images of the split.
        digests: P digests of the files' bytes, hexadecimal.
        thumbnails: uint8 [P, HASH_SIDE, HASH_SIDE + 1], grey, as shown after EXIF rotation.
        orientations: int64 [P], EXIF orientations, 1 where there is none.
        modes: P colour modes, in Pillow's names.
        levels: uint8 [P, 2], the grey levels that all but one in `pixels.value_range.OUTLIER` pixels lie between.
    """

    indices: np.ndarray
    digests: list[str]
    thumbnails: np.ndarray
    orientations: np.ndarray
    modes: list[str]
    levels: np.ndarray

    def bits(self) -> np.ndarray:
        """Return the perceptual hashes, bool [P, HASH_SIDE ** 2]: is a pixel brighter than its left neighbour?"""
        return (self.thumbnails[:, :, 1:] > self.thumbnails[:, :, :-1]).reshape(len(self.thumbnails), -1)


def fingerprint_images(
    annotations: Annotations,
    images: ImageFolder,
    indices: np.ndarray,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Fingerprints:
    """Read every picture once; files that are known from an earlier call and unchanged are not opened.

    Of a machine's processes one reads, the others wait and take what it remembers. A terminal shows a progress bar.

    Args:
        annotations: Names the files of the split's pictures.
        images: Reads the pictures, from its folder and with its range of values.
        indices: int64, images that exist and decode.
        cache_dir: Where fingerprints are remembered; None for the default.
        workers: Threads; as many as there are cores by default.

    Raises:
        BadImageError: A file cannot be decoded.
    """
    root, value_range = images.root, images.value_range
    # A deep picture's look depends on the rule for its brightness.
    rule = "" if value_range == ValueRange() else "-" + hashlib.sha256(repr(value_range).encode()).hexdigest()[:8]
    paths = [root / annotations.file_name(i) for i in indices.tolist()]
    memory = FileMemory(f"looks{rule}", root, cache_dir)
    if any(memory.get(path) is None for path in paths):
        with locked(memory.path.with_suffix(".lock"), f"another process, which looks at the pictures of {root}"):
            memory = FileMemory(f"looks{rule}", root, cache_dir)
            unknown = [path for path in paths if memory.get(path) is None]
            _look_at_all(unknown, memory, value_range, workers)
    known = [memory.get(path) for path in paths]
    shape = (len(known), HASH_SIDE, HASH_SIDE + 1)
    return Fingerprints(
        indices,
        [digest for digest, *_ in known],
        np.frombuffer(b"".join(bytes.fromhex(thumbnail) for _, thumbnail, *_ in known), dtype=np.uint8).reshape(shape),
        np.array([orientation for _, _, orientation, *_ in known], dtype=np.int64),
        [mode for _, _, _, mode, _ in known],
        np.array([levels for *_, levels in known], dtype=np.uint8).reshape(-1, 2),
    )


def _look_at_all(paths: list[Path], memory: FileMemory, value_range: ValueRange, workers: int | None) -> None:
    """Note the look of every file, and write that down."""
    said, started = False, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        looks = pool.map(functools.partial(_look_at, value_range=value_range), paths)
        for path, look in zip(paths, tqdm(looks, "hashing images", len(paths), disable=None, leave=False)):
            memory.put(path, look)
            if not said and time.monotonic() - started > QUIET_SECONDS:
                said = True
                logger.info("looking at %d pictures once, to see which are the same", len(paths))
    if paths:
        memory.save()


def _look_at(path: Path, value_range: ValueRange) -> tuple[str, str, int, str, list[int]]:
    """Return (digest, thumbnail as hexadecimal, orientation, mode, lowest and highest level) of an image file."""
    content = path.read_bytes()
    header = read_header(path)
    try:
        grey = _grey(path, content, value_range, is_plain=header.mode in _PLAIN_MODES and not header.is_deep)
    except (OSError, SyntaxError) as error:  # Pillow's, which do not name the file
        raise BadImageError(path, f"cannot decode the image: {error}") from error
    small = grey.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cumulative = np.cumsum(grey.histogram())
    few = cumulative[-1] // OUTLIER
    low, high = np.searchsorted(cumulative, (few, cumulative[-1] - few - 1), side="right").tolist()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return digest, small.tobytes().hex(), header.orientation, header.mode, [low, high]


def _grey(path: Path, content: bytes, value_range: ValueRange, *, is_plain: bool) -> Image.Image:
    """Return a grey image of a file as it is shown; a plain JPEG is decoded at an eighth of its size where possible."""
    if not is_plain:
        return Image.fromarray(np.array(read_image(path, value_range=value_range))).convert("L")
    image: Image.Image = Image.open(io.BytesIO(content))
    image.draft("L", (8 * HASH_SIDE, 8 * HASH_SIDE))
    return ImageOps.exif_transpose(image).convert("L")


def find_equal_pairs(first: Fingerprints, second: Fingerprints | None = None) -> Iterator[tuple[int, int, bool]]:
    """Yield pictures that occur twice: inside one split, or in two.

    Each picture is paired with the best of its equals, inside one split with an earlier one.

    Args:
        first: The pictures to look up, one by one.
        second: Where they are looked for; None for ``first`` itself.

    Yields:
        (position in ``first``, position in ``second``, whether the files are the same byte for byte).
    """
    at = _first_of_each(first if second is None else second)
    for row, columns, correlation in _find_alike(first, second):
        same = at.get(first.digests[row])
        if same is not None and (second is not None or same < row):
            yield row, same, True
        elif len(columns):
            yield row, int(columns[int(correlation.argmax())]), False


def group_equal(prints: Fingerprints) -> np.ndarray:
    """Return which pictures are the same, byte for byte or by their looks, or are linked by others that are.

    Returns:
        int64 [P]: a number per picture, equal inside a group and different between groups.
    """
    at = _first_of_each(prints)
    above = np.array([at[digest] for digest in prints.digests], dtype=np.int64)  # a forest; its roots are the groups

    def root(a: int) -> int:
        while above[a] != a:
            above[a] = a = above[above[a]]
        return a

    for row, columns, _ in _find_alike(prints):
        for b in np.unique(above[columns.numpy()]).tolist():
            above[root(row)] = root(b)
    return np.array([root(a) for a in range(len(above))], dtype=np.int64)


def _first_of_each(prints: Fingerprints) -> dict[str, int]:
    """Return the position of the first picture with each digest."""
    at: dict[str, int] = {}
    for position, digest in enumerate(prints.digests):
        at.setdefault(digest, position)
    return at


def _find_alike(first: Fingerprints, second: Fingerprints | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each picture of ``first`` which of ``second``, or which earlier one of ``first``, look the same.

    Yields:
        (position in ``first``, positions of those, int64 [N], how well the thumbnails correlate, float32 [N]).
    """
    other = first if second is None else second
    if not len(first.indices) or not len(other.indices):
        return
    said, started = False, time.monotonic()
    signs, other_signs = (torch.from_numpy(f.bits()).float().mul_(2).sub_(1) for f in (first, other))
    shapes, other_shapes = (_normalized(f.thumbnails) for f in (first, other))
    for start in range(0, len(signs), BLOCK):
        end = min(start + BLOCK, len(signs))
        agreement = signs[start:end] @ other_signs[: end if second is None else None].T  # 256 - 2 x differing bits
        near = agreement >= HASH_SIDE**2 - 2 * MAX_DIFFERENT_BITS
        for row in range(start, end):
            columns = near[row - start, : row if second is None else None].nonzero().flatten()
            correlation = other_shapes[columns] @ shapes[row]
            alike = correlation >= MIN_CORRELATION
            yield row, columns[alike], correlation[alike]
        if not said and time.monotonic() - started > QUIET_SECONDS:
            said = True
            logger.info("comparing the looks of %d pictures with those of %d", len(signs), len(other_signs))


def _normalized(thumbnails: np.ndarray) -> torch.Tensor:
    """Return thumbnails as vectors of mean 0 and length 1, float32 [P, ...]; zeros where nothing is to be seen."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    enough = length >= MIN_CONTRAST * np.sqrt(flat.shape[1])
    return torch.from_numpy(np.where(enough, flat / np.maximum(length, 1e-9), 0))
