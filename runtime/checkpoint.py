"""Checkpoints that survive: written whole or not at all, hashed, one writer per folder.

A checkpoint is one dict of tensors and plain values, loaded with ``weights_only=True``. `save_checkpoint` writes a
temporary file, flushes it to the disk and renames it; its SHA-256 stands beside it, so that a flipped bit, which
``torch.load`` does not notice, is found.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from files import read_torch_file, sync_to_disk, write_aside, write_torch_file
from utils import all_reduce_max, check_same_everywhere, meet, sha256_of_file

logger = logging.getLogger(__name__)

# Raised by one whenever the content changes in a way that older code cannot read.
CHECKPOINT_FORMAT = 1

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
BEST = "best.pth"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the file and the reason."""


class _HashingFile:
    """A binary file that hashes what is written. ``torch.save`` reports a full disk only through a Python file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees all of it or the one before."""
    with write_aside(path, durable=True) as temporary:
        temporary.write_bytes(data)


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash at any instant leaves either the old or the new file, each with its hash.

    Args:
        content: Tensors and plain values.
        path: Where to; replaced by rename.

    Raises:
        OSError: The disk is full or not writable; the old file is untouched.
    """
    with write_aside(path, durable=True) as temporary:
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            write_torch_file({"format": CHECKPOINT_FORMAT, **content}, cast("IO[bytes]", hashing))
        digest = hashing.digest.hexdigest()
        _announce_hash(path, digest)
    _write_hash(path, digest)
    sync_to_disk(path.parent)


def _announce_hash(path: Path, digest: str) -> None:
    """Let the hash file name both the old and the new content of ``path``, as a rename is about to happen."""
    old = _hash_file(path).read_text() if _hash_file(path).exists() else ""
    write_atomically(_hash_file(path), f"{old}{digest}  {path.name}\n".encode())


def _write_hash(path: Path, digest: str) -> None:
    """Let the hash file name the content of ``path`` alone."""
    write_atomically(_hash_file(path), f"{digest}  {path.name}\n".encode())


def _known_digests(path: Path) -> list[str]:
    """Return the hashes that ``path`` may have: one, or several after a kill in the middle of a rename."""
    if not _hash_file(path).exists():
        return []
    return [line.split()[0] for line in _hash_file(path).read_text().splitlines() if line.strip()]


def link_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name without writing it again; a copy where links are not possible."""
    digests = _known_digests(source)
    digest = digests[0] if len(digests) == 1 else sha256_of_file(source)
    with write_aside(target, durable=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        _announce_hash(target, digest)
    _write_hash(target, digest)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after comparing its hash.

    Raises:
        CheckpointError: It is missing, damaged, foreign, of a later format, or holds pickled objects.
    """
    if not path.is_file():
        what = "a folder, expected a checkpoint" if path.is_dir() else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}{_near_miss(path)}")
    known = _known_digests(path)
    if known and sha256_of_file(path) not in known:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {_hash_file(path).name}")
    try:
        content = read_torch_file(path, (argparse.Namespace,))  # what torchvision's scripts put into theirs
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict) or "model_spec" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this suite; {_what_it_is(content, path)}")
    if content.get("format", 0) > CHECKPOINT_FORMAT:
        text = f"its format is {content['format']}, this version reads up to {CHECKPOINT_FORMAT}"
        raise CheckpointError(f"{path}: {text}; update the suite")
    return content


def open_checkpoint(resume: str, output_dir: Path | None) -> tuple[dict[str, Any] | None, Path | None]:
    """Return the checkpoint to continue from and its file, the same on all processes; None and None to start anew.

    After a restart by torchrun the newest one in ``output_dir`` is taken, whatever ``resume`` says.
    """
    meet("look for their checkpoint")
    # After a restart of several machines the one that was brought back counts none: all go by the highest count.
    restarts = all_reduce_max(torch.tensor([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))]))
    restarted = bool(restarts)
    if "://" in resume:
        raise ValueError(f"--resume {resume}: URLs are not fetched; download the file and give its path")
    if resume == "auto" and output_dir is None:
        raise ValueError("--resume auto needs an --output-dir to look in")
    newest = None
    if output_dir is not None and (resume == "auto" or restarted):
        newest = find_newest(output_dir / "weights")
        if newest is None:
            logger.info("no checkpoint in %s: starting anew", output_dir / "weights")
    if newest is None and resume not in ("", "auto"):
        path = file_to_resume(resume)
        newest = path, load_checkpoint(path)
    check_same_everywhere("checkpoint", json.dumps(newest[1]["progress"] if newest else None))
    if newest is None:
        return None, None
    logger.info("continuing from %s", newest[0])
    return newest[1], newest[0]


def file_to_resume(resume: str) -> Path:
    """Return the file that ``--resume`` names: itself, or the newest checkpoint of a run's folder."""
    return Path(resume) / "weights" / NEWEST if Path(resume).is_dir() else Path(resume)


def _near_miss(path: Path) -> str:
    """Return a hint where the file lies one folder further down."""
    candidates = [path.parent / "weights" / path.name]
    if path.is_dir():
        candidates = [folder / name for folder in (path, path / "weights") for name in (BEST, NEWEST)]
    return next((f"; did you mean {below}?" for below in candidates if below.is_file()), "")


def _what_it_is(content: Any, path: Path) -> str:
    """Say what a file of another program is, and which flag takes it."""
    if not isinstance(content, dict):
        return f"it holds {type(content).__name__}, no weights"
    keys = ", ".join(map(str, list(content)[:6])) or "nothing"
    remedy = f"start from its weights with --weights {path} instead (train.py --model NAME, and --test-only to score)"
    if isinstance(content.get("model"), dict):
        whose = "torchvision's scripts" if "args" in content or "lr_scheduler" in content else "another program"
        return f"{remedy}: it is one of {whose}, with {keys}"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"{remedy}: it is a bare state dict of {len(content)} entries"
    for key, value in content.items():
        if isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
            return f"its weights are under {key!r}; save those alone with torch.save, for --weights"
    return f"it holds {keys}, no weights"


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint in ``folder`` that can be read, and its content; None if there is none.

    A damaged one is reported and the newest of the others taken.
    """
    groups = [[folder / NEWEST], [folder / PREVIOUS, *(path for _, path in _epoch_files(folder))]]
    for group in groups:
        readable = []
        for path in group:
            if not path.exists():
                continue
            try:
                readable.append((path, load_checkpoint(path)))
            except CheckpointError as error:
                logger.warning("%s; looking for an older one", error)
        if readable:
            return max(readable, key=lambda found: _position(found[1]))
    return None


def _position(content: dict[str, Any]) -> tuple[int, int]:
    progress = content["progress"]
    return progress["epoch"], progress["batches"]


def _epoch_files(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("model_*.pth"):
        if match := re.fullmatch(r"model_(\d+)\.pth", path.name):
            yield int(match[1]), path


class CheckpointFolder:
    """The folder a run writes its checkpoints to.

    Args:
        folder: Created when missing.
        keep: How many ``model_N.pth`` stay; 0 keeps all.
        resumed_from: The run's checkpoint that it goes on from; by default the newest one.
    """

    def __init__(self, folder: Path, keep: int = 0, *, resumed_from: Path | None = None) -> None:
        self.folder, self.keep = folder, keep
        self.last_save_failed = False
        folder.mkdir(parents=True, exist_ok=True)
        # What the next save keeps as the one before: never a damaged newest one that an earlier run left, nor one that
        # is given up as the run has gone back to an older one.
        newest = folder / NEWEST
        is_whole = newest.exists() and sha256_of_file(newest) in _known_digests(newest)
        self._before = resumed_from or (newest if is_whole else None)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def save(self, content: dict[str, Any], *, epoch_done: int | None = None, is_best: bool = False) -> bool:
        """Write ``checkpoint.pth``, and after an epoch ``model_N.pth`` and perhaps ``best.pth``.

        Later epochs, which a run that has gone back gives up, are removed: they would pass for newer ones. A full disk
        keeps what is there and is reported; training can go on.

        Returns:
            Whether everything was written.
        """
        newest = self.folder / NEWEST
        try:
            previous = self.folder / PREVIOUS
            if self._before is not None and self._before != previous and self._before.exists():
                link_checkpoint(self._before, previous)
            # The best first: after a kill in between, the newest still has the evaluation to do, and finds the same.
            # The other way round it would name a best that is not there.
            save_checkpoint(content, self.folder / BEST if is_best else newest)
            if is_best:
                link_checkpoint(self.folder / BEST, newest)
            self._before = newest
            self._remove_later(content["progress"]["epoch"])
            if epoch_done is not None:
                link_checkpoint(newest, self.folder / f"model_{epoch_done}.pth")
                self._remove_old()
            self.last_save_failed = False
        except OSError as error:
            self.last_save_failed = True
            free = shutil.disk_usage(self.folder).free
            logger.error(
                "cannot write checkpoint %s: %s (needs %d MB, %d MB free); the one before stays, training goes on",
                *(newest, error.strerror or error, _size_of(content) >> 20, free >> 20),
            )
        return not self.last_save_failed

    def best_epoch(self) -> int | None:
        """Return the epoch that ``best.pth`` is of, as it says itself; None where there is none, or a damaged one."""
        path = self.folder / BEST
        if not path.exists():
            return None
        try:
            return load_checkpoint(path)["progress"]["epoch"] - 1
        except CheckpointError as error:
            logger.warning("%s", error)
            return None

    def _remove_later(self, epoch: int) -> None:
        """Remove the checkpoints of this epoch's end and of later ones: the run stands before them."""
        later = sorted((number, path) for number, path in _epoch_files(self.folder) if number >= epoch)
        if later:
            names = ", ".join(path.name for _, path in later)
            logger.warning("the run has gone back: removed %s, of epochs that it gave up", names)
        for _, path in later:
            _remove(path)

    def _remove_old(self) -> None:
        if self.keep <= 0:
            return
        for _, path in sorted(_epoch_files(self.folder))[: -self.keep]:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint with its hash."""
    path.unlink(missing_ok=True)
    _hash_file(path).unlink(missing_ok=True)


def _size_of(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size_of(v) for v in value.values())
    return sum(_size_of(v) for v in value) if isinstance(value, (list, tuple)) else 0


def lock_folder(folder: Path) -> IO[str]:
    """Take the only writer's place in ``folder``; it is given up when the returned file is closed or the process ends.

    A POSIX record lock: forked DataLoader workers do not inherit it.

    Raises:
        ValueError: Another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s: this disk has no locks (%s); let only one run write there", folder, error.strerror)
            return file
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"{folder}: another run (process {owner}) writes there; choose another --output-dir") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
