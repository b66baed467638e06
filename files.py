"""Files that are read and written with care: whole or not at all, and without running what is in them."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def write_aside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Let the block write a file under another name, which becomes ``path`` when the block is done.

    Whoever reads ``path`` finds all of the new file or all of the one before. When the block raises, the one before
    stays and nothing else is left; a killed process leaves the temporary file, whose name ends in ``.tmp``.

    Args:
        path: The file to write or replace; its folder exists.
        durable: Have the content on the disk before the rename, so that a power cut does not leave an empty file.

    Yields:
        Where to write; in the same folder, used by no other process or thread.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if durable:
            sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_torch_file(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Read a file that ``torch.save`` wrote onto the CPU: tensors and plain values only.

    Args:
        path: The file.
        allowed: Classes that are let through besides.

    Raises:
        ValueError: There is no such file, or it is damaged, or it holds other Python objects.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in str(error) or "Unsupported" in str(error):
            text = "it holds pickled Python objects, which are not loaded because they can run code"
        raise ValueError(f"{path}: not a readable checkpoint: {text}") from None
