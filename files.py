"""Files that are read and written with care: whole or not at all, and without running what is in them."""

import codecs
import contextlib
import errno
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

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
        with naming(path, temporary):
            yield temporary
            if durable:
                sync_to_disk(temporary)
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an error of the system in the block name ``path`` where it names no file, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (temporary is not None and str(error.filename) == str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def why_no_folder(path: Path) -> str:
    """Say why there is no folder at ``path``: nothing is there, or a file is, or one in other letters' case."""
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if not there.is_file():
        wanted = path.relative_to(there).parts[:1]
        with contextlib.suppress(OSError):
            for name in os.listdir(there) if wanted else ():  # noqa: PTH208
                if name.casefold() == wanted[0].casefold():
                    return f"no such folder, but {there / name} differs in upper and lower case"
        return "no such folder"
    return "a file, expected a folder" if there == path else f"no such folder, as {there} is a file"


def read_text(path: Path) -> str:
    """Return a file's text, UTF-8 with or without a byte order mark; an error of the system names the file."""
    with naming(path):
        return path.read_text(encoding="utf-8-sig")


def write_torch_file(content: Any, file: IO[bytes]) -> None:
    """Write what ``torch.save`` can write to an open file.

    Raises:
        OSError: The disk is full; torch's own writer would hide it in a RuntimeError.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if "unexpected pos" in str(error) or "write" in str(error).lower():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


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
        text = describe_content(path) or (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in text or "Unsupported" in text or text.startswith("Weights only"):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            text = f"it holds pickled Python objects{f' ({named[1]})' if named else ''}, which are not loaded because "
            text += "they can run code; of a model of your own save the weights alone, model.state_dict()"
        raise ValueError(f"{path}: not a readable checkpoint: {text}") from None


# How files begin that are given for others by mistake.
_BEGINNINGS = {
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF87a": "a picture (GIF)",
    b"GIF89a": "a picture (GIF)",
    b"II*\0": "a picture (TIFF)",
    b"MM\0*": "a picture (TIFF)",
    b"\x89HDF": "an HDF5 file, as Keras writes; it holds no weights of torch",
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"PAR1": "a Parquet table",
    b"SQLite format 3": "an SQLite database",
    b"\x1f\x8b": "packed with gzip; unpack it first",
    b"BZh91AY&SY": "packed with bzip2; unpack it first",
    b"\xfd7zXZ": "packed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"%PDF": "a PDF document",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"{\0": "text in UTF-16; save it as UTF-8",
    b"[\0": "text in UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a git LFS pointer, not the file that it stands for; `git lfs pull` brings that",
}

# What stands after "ftyp" in files of phones and cameras.
_BRANDS = {
    b"heic": "a picture (HEIC)",
    b"heix": "a picture (HEIC)",
    b"mif1": "a picture (HEIC)",
    b"avif": "a picture (AVIF)",
}


def describe_content(path: Path) -> str | None:
    """Say what a file is by its content, and where it helps what to do; None where that is not clear.

    For messages about a file that is not what its flag, its entry or its name says. A zip archive that may be a
    checkpoint of torch is None.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return "a folder, expected a file" if isinstance(error, IsADirectoryError) else error.strerror
    if not head.strip():
        return f"the file {'holds nothing but blanks' if size else 'is empty'}; copy or load it again"
    if not head.strip(b"\0"):
        return "it begins with nothing but zeros; copy or load it again"
    for start, what in _BEGINNINGS.items():
        if head.startswith(start):
            return what
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a film, or another container of the MP4 kind")
    if head.startswith(b"RIFF"):
        return "a picture (WebP)" if head[8:12] == b"WEBP" else "a sound or film (RIFF)"
    if head.startswith(b"BM") and head[6:10] == head[15:18] + b"\0" == bytes(4):  # reserved; size of the next header
        return "a picture (BMP)"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page, not the file itself; open its address in a browser, and load the file that the page offers"
    if text.startswith(b"<?xml"):
        return "XML text"
    if text.startswith((b"{", b"[")):
        return "JSON text, as annotation files are"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file; load it with safetensors and write its weights with torch.save"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _foreign_archive(path)
    with contextlib.suppress(UnicodeDecodeError):
        decoder = codecs.getincrementaldecoder("utf-8-sig")()  # lets the last letter be cut
        if decoder.decode(head).isprintable() or b"\n" in head:
            return "a text file"
    return None


def _foreign_archive(path: Path) -> str | None:
    """Say what a zip archive holds where it is none of ``torch.save``; None where it may be one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "it is cut off or damaged; copy or load it again"
    if any("/code/" in f"/{name}" for name in names):
        return "a TorchScript model, as export.py writes; give the checkpoint that it was made from"
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return f"a zip archive of {len(names)} file(s), {', '.join(names[:2]) or 'none'}; unpack it first"
    return None
