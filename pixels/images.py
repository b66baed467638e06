"""Image files to RGB pixels: decoding, EXIF rotation, colour modes, limits.

Pillow decodes: it is bit-identical to torchvision's decoder, reads every format, and guards against image
bombs; torchvision's own decoder is announced to be removed. Nothing here knows about annotations.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pixels.image_files import unreadable_format

# EXIF orientations that swap height and width (5 to 8: transposed or turned by a quarter).
_QUARTER_TURNS = (5, 6, 7, 8)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def unsafe_file_name(name: str) -> str | None:
    """Say why a file name may not be used below an image folder, or return None."""
    if _PLAIN_NAME.fullmatch(name):  # nearly all: the paths below take longer than reading the name's record
        return None
    if "\0" in name or not name:
        return "an empty name or a NUL byte"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        return "an absolute path"
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        return "a path that leaves its folder"
    if "://" in name:
        return "a URL, which is never fetched"
    return None


def is_text(name: str) -> bool:
    """Return whether a file's name is UTF-8, as results in json and csv need it."""
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps other bytes as lone surrogates
        return False
    return True


class BadImageError(ValueError):
    """An image file that cannot be decoded, or is not what its annotation says.

    Attributes:
        path: The file.
        problem: What is wrong with it, without its name.
    """

    def __init__(self, path: Path | str, problem: str = "") -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        """Return both in one line; torch makes the error of a loading process anew from one text, its traceback."""
        return f"{self.path}: {self.problem}" if self.problem else str(self.path)


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file says, without decoding it.

    Attributes:
        height: Rows of pixels in the file, before EXIF rotation.
        width: Columns of pixels in the file, before EXIF rotation.
        orientation: EXIF orientation, 1 where there is none.
        mode: Pillow's colour mode.
    """

    height: int
    width: int
    orientation: int
    mode: str

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) after EXIF rotation."""
        if self.orientation in _QUARTER_TURNS:
            return self.width, self.height
        return self.height, self.width


def _open(path: Path) -> Image.Image:
    """Open ``path`` lazily and refuse image bombs before a pixel is decoded."""
    image = Image.open(path)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{size} pixels are more than Pillow's limit of {limit}, which guards against image bombs")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; of a PNG only from before its pixels: a later one shows after decoding only."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def read_header(path: Path) -> ImageHeader:
    """Read size, EXIF orientation and colour mode of an image file.

    Raises:
        BadImageError: The file is missing, empty, no image, or larger than Pillow's pixel limit.
    """
    try:
        with _open(path) as image:
            return ImageHeader(image.height, image.width, _orientation(image), image.mode)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... by format
        raise BadImageError(path, f"cannot read the image header: {_reason(error, path)}") from error


def read_image(path: Path, size: tuple[int, int] | None = None, apply_exif: bool = True) -> np.ndarray:
    """Decode an image file to RGB.

    Grey, palette, CMYK and 16-bit images keep their brightness; alpha is dropped.

    Args:
        path: The file.
        size: (height, width) that the image's annotations were made on, for a check.
        apply_exif: Show the picture as its EXIF orientation says. If False, the stored picture is taken
            where its size is ``size`` and the rotated one otherwise, as COCO files need it.

    Returns:
        uint8 [H, W, 3]; may be read-only memory.

    Raises:
        BadImageError: The file cannot be decoded, or has another size than its annotations say.
    """
    try:
        with _open(path) as image:
            if (apply_exif or (image.height, image.width) != size) and _orientation(image) != 1:
                pixels = _to_rgb(ImageOps.exif_transpose(image))
            else:
                pixels = _to_rgb(image)
    except Exception as error:
        raise BadImageError(path, f"cannot decode the image: {_reason(error, path)}") from error
    if size is not None and pixels.shape[:2] != size:
        raise BadImageError(
            path,
            f"the image is {pixels.shape[1]} x {pixels.shape[0]} (width x height), "
            f"its annotations say {size[1]} x {size[0]}",
        )
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return uint8 [H, W, 3]; Pillow's own conversion of 16-bit modes saturates to white, hence not used."""
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError(f"mode {image.mode} with values {grey.min()} to {grey.max()}; expected 16 bits")
        return np.repeat((grey.astype(np.uint16) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined brightness; convert the file to 8 or 16 bits")
    return np.asarray(image.convert("RGB"))


def _reason(error: Exception, path: Path) -> str:
    """Return an error's text; of a file that is no picture say what it is instead, where that can be told."""
    if isinstance(error, UnidentifiedImageError):
        known = unreadable_format(str(path)) or _kind_of_text(path)
        if known is not None:
            return known
    return str(error) or type(error).__name__


def _kind_of_text(path: Path) -> str | None:
    """Recognise what often lies in a picture's place: a Git LFS pointer, a web page, a link saved as text."""
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture; run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page; the download went wrong"
    try:
        target = start.decode().strip()
        if len(start) < 1024 and target.isprintable() and target and (path.parent / target).is_file():
            return f"the text {target!r} of a link; check out or unpack again where links are allowed"
    except (ValueError, OSError):
        pass
    return None
