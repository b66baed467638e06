"""Picture files that no dataset describes: found in folders and by patterns, rejected or put into batches."""

import glob
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.video import is_video_name
from models.architectures import ModelSpec
from models.resize import describe_vanishing, leaves_nothing
from pixels.image_files import examples, is_picture_name, list_folder, result_folder
from pixels.images import BadImageError, is_text, read_header

# Pixels of a batch: large pictures come in smaller batches, down to one alone.
MAX_BATCH_PIXELS = 24_000_000


@dataclass(frozen=True)
class ImageFiles:
    """What `search_images` found.

    Attributes:
        paths: Pictures by their names, and files named outright, each once.
        left_out: {path: why} of everything else in the folders that were searched.
    """

    paths: list[Path]
    left_out: dict[Path, str]


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the paths of `search_images`."""
    return search_images(paths).paths


def search_images(paths: Sequence[str]) -> ImageFiles:
    """Return the image files behind files, folders and glob patterns, in the order given.

    Folders are searched as `list_folder` does, sorted by name; a file named outright is taken whatever its suffix.
    A pattern does not reach into folders of results unless it names them.

    Raises:
        FileNotFoundError: A path or pattern matches nothing.
    """
    found: dict[Path, Path] = {}
    left_out: dict[Path, str] = {}
    for text in paths:
        path = Path(text)
        matches, others = ([path], {}) if path.exists() else _expand(text)
        files = [match for match in matches if match.is_file()]
        for folder in (match for match in matches if match.is_dir()):
            content = list_folder(folder)
            files += sorted(folder / name for name in content.files if is_picture_name(name))
            others |= {folder / name: _why_not(folder / name) for name in content.files if not is_picture_name(name)}
            others |= {folder / name: reason for name, reason in content.left_out}
        if not files:
            what = (
                "no images in it"
                if matches or others
                else "no such file or folder, and no file matches it as a pattern"
            )
            raise FileNotFoundError("; ".join(filter(None, [f"{text}: {what}", format_left_out(others)])))
        for file in files:
            found.setdefault(file.resolve(), file)
        left_out |= others
    return ImageFiles(
        list(found.values()), {path: why for path, why in left_out.items() if path.resolve() not in found}
    )


def _why_not(path: Path) -> str:
    """Say why a file in a folder is not taken."""
    return "a video: name it to have it predicted" if is_video_name(path) else "no picture by its name"


def _expand(pattern: str) -> tuple[list[Path], dict[Path, str]]:
    """Return (what matches a glob pattern, {folder of results that the pattern does not name: why it is left out})."""
    named = list(itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    matches, results = [], {}
    origin_of: dict[Path, str | None] = {}
    for match in sorted(Path(m) for m in glob.glob(pattern, recursive=True)):  # noqa: PTH207 - takes absolute patterns
        for folder in (*reversed(match.parents), match):
            if len(folder.parts) <= len(named):
                continue
            if folder not in origin_of:
                origin_of[folder] = result_folder(os.listdir(folder)) if folder.is_dir() else None  # noqa: PTH208
            if origin_of[folder] is not None:
                results[folder] = f"results of {origin_of[folder]}"
                break
        else:
            matches.append(match)
    return matches, results


def format_left_out(left_out: Mapping[Path, str]) -> str:
    """Return how many files and folders were left out for which reason, with examples, as one line."""
    of_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        of_reason.setdefault(reason, []).append(str(path))
    return "; ".join(f"{reason} ({len(names)}): {examples(names)}" for reason, names in of_reason.items())


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        index: Its position in the list of files.
        reason: Why, without the file's name.
    """

    index: int
    reason: str


def reject_or_batch(paths: Sequence[Path], batch_size: int, spec: ModelSpec) -> tuple[list[list[int]], list[BadFile]]:
    """Reject files that the model cannot use and batch the others: (positions of each batch, rejected files).

    Rejected are what is no readable picture, and pictures of which the model's resize leaves nothing. A batch has
    ``batch_size`` pictures, or fewer where they have more than `MAX_BATCH_PIXELS` together.
    """
    batches: list[list[int]] = []
    bad: list[BadFile] = []
    pixels = 0
    for index, path in enumerate(paths):
        if not is_text(str(path)):
            bad.append(BadFile(index, "the file's name is not UTF-8"))
            continue
        try:
            height, width = read_header(path).shown_size
        except BadImageError as error:
            bad.append(BadFile(index, error.problem))
            continue
        if leaves_nothing(np.array(height), np.array(width), spec):
            bad.append(BadFile(index, describe_vanishing(height, width)))
            continue
        size = height * width
        if not batches or len(batches[-1]) == batch_size or pixels + size > MAX_BATCH_PIXELS:
            batches.append([])
            pixels = 0
        batches[-1].append(index)
        pixels += size
    return batches, bad
