"""What picture files hold beside one picture of 8 bits a channel: deeper values, and pages after the first.

Which values of deep pictures (more than 8 bits a channel) are black and white follows from the files and their order
alone: it is the same at any number of processes, and at every start.
"""

import concurrent.futures
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from annotations.image_checks import MAX_HEADERS, FileMemory
from pixels.image_files import printable
from pixels.images import BadImageError, read_header, read_values
from pixels.value_range import DEFAULTS, Range, ValueBounds, ValueRange, bounds_of, common_range, describe_range

logger = logging.getLogger(__name__)

# Of more files than `MAX_HEADERS` so many headers are looked at: a dataset is mostly of one sort.
HEADERS_OF_LARGE_SETS = 500

# So many deep pictures are decoded for their values.
MAX_DECODED = 1000

# A picture whose values fill no more of the range than this is nearly black.
DARK = 1 / 16


# (file, bounds of its values) of deep pictures.
SeenValues = list[tuple[Path, ValueBounds]]


@dataclass
class SeenPictures:
    """What was seen of picture files.

    Attributes:
        count: How many were looked at.
        values: The bounds of deep pictures, as far as they were decoded.
        with_more: Those with more pages or frames than the one that is read.
    """

    count: int = 0
    values: SeenValues = field(default_factory=list)
    with_more: list[Path] = field(default_factory=list)

    def __add__(self, other: "SeenPictures") -> "SeenPictures":
        """Join what was seen of two lots of files."""
        return SeenPictures(self.count + other.count, self.values + other.values, self.with_more + other.with_more)


def look_at_values(
    count: int, path_of: Callable[[int], Path], *, memory: FileMemory | None = None, workers: int | None = None
) -> SeenPictures:
    """Read headers, and of deep pictures the values; others are not decoded.

    Of many files some are looked at, spread evenly. Files that cannot be read are passed over.

    Args:
        count: How many files there are.
        path_of: The file at a position.
        memory: What was seen at an earlier start.
        workers: Threads; as many as there are cores by default.
    """
    paths = [path_of(i) for i in _spread(count, count if count <= MAX_HEADERS else HEADERS_OF_LARGE_SETS)]
    # (has more pages; False for a picture of 8 bits, the bounds of a deep one, True for one that is not decoded yet).
    known: dict[Path, Any] = {path: None if memory is None else memory.get(path) for path in paths}
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:

        def learn(todo: list[Path], look: Callable[[Path], object], purpose: str | None) -> None:
            """Look at files and remember what is seen; with a purpose a terminal shows a progress bar."""
            seen = tqdm(pool.map(look, todo), purpose, len(todo), disable=None if purpose else True, leave=False)
            for path, value in zip(todo, seen):
                known[path] = value
                if memory is not None and value is not None:
                    memory.put(path, value)

        new = [path for path in paths if known[path] is None]
        learn(new, _look, None)
        deep = [path for path in paths if known[path] and known[path][1]]
        chosen = [deep[i] for i in _spread(len(deep), MAX_DECODED)]
        undecoded = [path for path in chosen if known[path][1] is True]
        learn(undecoded, lambda path: _with_bounds(path, known[path][0]), "looking at pictures of more than 8 bits")
    if memory is not None and new + undecoded:
        memory.save()
    values = [(path, ValueBounds(*known[path][1])) for path in chosen if known[path] is not None]
    return SeenPictures(len(paths), values, [path for path in paths if known[path] and known[path][0]])


def _spread(count: int, limit: int) -> list[int]:
    """Return up to ``limit`` positions below ``count``, spread evenly."""
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64).tolist() if count else []


def _look(path: Path) -> list[object] | None:
    try:
        header = read_header(path)
    except BadImageError:
        return None
    return [header.has_more, header.is_deep]


def _with_bounds(path: Path, has_more: bool) -> list[object] | None:
    try:
        values = read_values(path)
    except BadImageError:
        return None
    return None if values is None else [has_more, list(astuple(bounds_of(values)))]


def warn_of_pages(seen: SeenPictures, name: str) -> None:
    """Warn of files with more pages or frames than the one that is read; ``name`` says what they are."""
    if seen.with_more:
        logger.warning(
            "%s: %d of %d picture(s) have several pages or frames, such as %s: only the first of each is used; save "
            "the others as pictures of their own if they are wanted",
            *(name, len(seen.with_more), seen.count, printable(str(seen.with_more[0]))),
        )


def settle_value_range(seen: SeenValues, known: ValueRange, name: str) -> ValueRange:
    """Return which values are black and white: those that are known, else those that hold all values seen.

    Says in the log what was settled, and warns of what comes out black, white or cut.

    Args:
        seen: The deep pictures.
        known: That of a checkpoint; empty for a new run.
        name: What the pictures are, for messages.
    """
    settled = known
    for kind in DEFAULTS:
        of_kind = [(path, bounds) for path, bounds in seen if bounds.kind == kind]
        if not of_kind:
            continue
        own = common_range([bounds for _, bounds in of_kind])
        assert own is not None
        if getattr(known, kind) is None:
            settled = replace(settled, **{kind: own})
            _log_new(of_kind, kind, own, name)
        _warn_of_misfits(of_kind, settled.of(kind), kind, name)
    missing = [path for path, bounds in seen if bounds.missing]
    if missing:
        text = "%s: %d picture(s) have values that are no numbers (NaN or infinite), such as %s: NaN is shown black"
        logger.warning(text, name, len(missing), printable(str(missing[0])))
    return settled


def _log_new(of_kind: Sequence[tuple[Path, ValueBounds]], kind: str, own: Range, name: str) -> None:
    """Say what the values of one kind have settled; a warning where it is not all 16 bits, or 0 to 1."""
    path, bounds = max(of_kind, key=lambda pair: pair[1].high)
    logger.log(
        logging.INFO if own == DEFAULTS[kind] else logging.WARNING,
        "%s: deep pictures (more than 8 bits a channel): %d looked at, with values up to %g (%s), so %s is taken as "
        "black to white in all of them",
        *(name, len(of_kind), bounds.high, printable(path.name), describe_range(own, kind)),
    )


def _warn_of_misfits(of_kind: Sequence[tuple[Path, ValueBounds]], shown: Range, kind: str, name: str) -> None:
    """Warn of pictures with values beyond the range, and of those that fill next to nothing of it."""
    low, white = shown
    beyond, dark = [], []
    for path, bounds in of_kind:
        own = common_range([bounds])
        assert own is not None
        if own[1] > white or own[0] < low:
            beyond.append((path, bounds))
        elif bounds.high - low <= DARK * (white - low):
            dark.append((path, bounds))
    if beyond:
        path, bounds = max(beyond, key=lambda pair: pair[1].high)
        logger.warning(
            "%s: %d of %d picture(s) have values beyond %s, which the checkpoint takes as black to white, such as %s "
            "with %g to %g: they are cut off; train on such pictures, or scale the files",
            *(name, len(beyond), len(of_kind), describe_range(shown, kind), printable(str(path)), bounds.low),
            bounds.high,
        )
    if dark:
        path, bounds = dark[0]
        logger.warning(
            "%s: %d of %d picture(s) come out nearly black: of %s they have values up to %g (%s); scale the files to "
            "one range if they are not of one camera",
            *(name, len(dark), len(of_kind), describe_range(shown, kind), bounds.high, printable(str(path))),
        )
