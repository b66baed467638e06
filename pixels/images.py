"""Image files to RGB pixels: decoding, EXIF rotation, colour modes, brightness, limits.

Pillow decodes: it is bit-identical to torchvision's decoder, reads every format, and guards against image
bombs; torchvision's own decoder is announced to be removed. Nothing here knows about annotations.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from files import describe_content
from pixels.image_files import PROGRAMS, unreadable_format
from pixels.value_range import ValueRange, to_levels

# EXIF orientations that swap height and width (5 to 8: transposed or turned by a quarter).
_QUARTER_TURNS = (5, 6, 7, 8)

# What brings a picture that is shown as its EXIF orientation says back to what is stored.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_SUBFILE = 256, 257, 254

# Formats whose pages or frames are pictures of their own; what others hold beside the first are previews and layers.
_WITH_FRAMES = ("GIF", "TIFF", "PNG", "WEBP", "AVIF")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
# Pillow keeps the higher byte of 16-bit colours, by a raw mode that says which of the two comes first. The raw mode of
# the other order gives it the lower byte. Grey with alpha has one order only; as four channels it gives all bytes.
_OTHER_ORDER = {
    "16B": "16L",
    "16L": "16B",
    "16N": "16B" if sys.byteorder == "little" else "16L",
}
_GREY_WITH_ALPHA = "LA;16B"


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
        is_deep: Whether a channel has more than 8 bits.
        has_more: Whether more pages or frames follow, which are not read.
    """

    height: int
    width: int
    orientation: int
    mode: str
    is_deep: bool = False
    has_more: bool = False

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) after EXIF rotation."""
        if self.orientation in _QUARTER_TURNS:
            return self.width, self.height
        return self.height, self.width


def _open(path: Path) -> Image.Image:
    """Open ``path`` lazily and refuse image bombs before a pixel is decoded."""
    image = Image.open(path)
    if image.format in PROGRAMS:
        raise ValueError(f"{image.format} is a program that draws a picture, and is not run; save it as JPEG or PNG")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{size} pixels are more than Pillow's limit of {limit}, which guards against image bombs")
    return image


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of the pixels in the file; Pillow gives a TIFF's as it is shown."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[_TIFF_HEIGHT], image.tag_v2[_TIFF_WIDTH]
    return image.height, image.width


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
            return ImageHeader(*_stored_size(image), _orientation(image), image.mode, _is_deep(image), _has_more(image))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... by format
        raise BadImageError(path, f"cannot read the image header: {_reason(error, path)}") from error


def read_image(
    path: Path, size: tuple[int, int] | None = None, apply_exif: bool = True, value_range: ValueRange | None = None
) -> np.ndarray:
    """Decode an image file to RGB.

    Grey, palette and CMYK images keep their brightness; alpha is dropped.

    Args:
        path: The file.
        size: (height, width) that the image's annotations were made on, for a check.
        apply_exif: Show the picture as its EXIF orientation says. If False, the stored picture is taken
            where its size is ``size`` and the rotated one otherwise, as COCO files need it.
        value_range: Which values are black and white, where a channel has more than 8 bits; None for 16 bits.

    Returns:
        uint8 [H, W, 3]; may be read-only memory.

    Raises:
        BadImageError: The file cannot be decoded, or has another size than its annotations say.
    """
    value_range = value_range or ValueRange()
    try:
        with _open(path) as image:
            turns = apply_exif or _stored_size(image) != size
            # The higher bytes alone are what 16 bits come to.
            is_known = image.mode in ("RGB", "RGBA") and value_range.of("whole") == (0, 65535)
            if _is_deep(image) and not (is_known and _maximum_of_ppm(image) is None):
                pixels = _as_colour(to_levels(_decode_values(image, path, turns), value_range))
            else:
                shown = _turned(image, turns)
                pixels = np.asarray(shown if shown.mode == "RGB" else shown.convert("RGB"))
    except Exception as error:
        raise BadImageError(path, f"cannot decode the image: {_reason(error, path)}") from error
    if size is not None and pixels.shape[:2] != size:
        raise BadImageError(
            path,
            f"the image is {pixels.shape[1]} x {pixels.shape[0]} (width x height), "
            f"its annotations say {size[1]} x {size[0]}",
        )
    return pixels


def pixels_of(picture: Image.Image | np.ndarray | Tensor, value_range: ValueRange | None = None) -> np.ndarray:
    """Return the pixels of a picture in memory, as `read_image` returns those of a file.

    Args:
        picture: A Pillow picture, turned here as its EXIF orientation says; an array uint8 [H, W, 3] (RGB) or [H, W];
            or a tensor [3, H, W] or [1, H, W], uint8 or floating-point in 0..1.
        value_range: Which values are black and white in a Pillow picture with more than 8 bits a channel.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(picture, Image.Image):
        shown = ImageOps.exif_transpose(picture)
        if shown.mode.startswith(("I", "F")):
            return _as_colour(to_levels(np.asarray(shown), value_range or ValueRange()))
        return np.asarray(shown.convert("RGB"))
    if isinstance(picture, Tensor):
        return _pixels_of_tensor(picture)
    if not isinstance(picture, np.ndarray):
        expected = "a file's path, a Pillow picture, an array or a tensor"
        raise ValueError(f"expected {expected}, got {type(picture).__name__}")
    is_colour = picture.ndim == 3 and picture.shape[2] == 3
    if picture.dtype != np.uint8 or not (is_colour or picture.ndim == 2) or not picture.size:
        got = f"{picture.dtype} {list(picture.shape)}"
        raise ValueError(f"expected an array uint8 [H, W, 3] (RGB) or [H, W] (grey), got {got}")
    return _as_colour(picture)


def _pixels_of_tensor(picture: Tensor) -> np.ndarray:
    """Return the pixels of a tensor [3, H, W] or [1, H, W], uint8 or floating-point in 0..1, as uint8 [H, W, 3]."""
    is_float = picture.is_floating_point()
    if picture.dim() != 3 or len(picture) not in (1, 3) or not picture.numel():
        raise ValueError(f"expected a tensor [3, H, W] or [1, H, W], got {list(picture.shape)}")
    if picture.dtype != torch.uint8 and not is_float:
        raise ValueError(f"expected a tensor of uint8 or of floating-point numbers in 0..1, got {picture.dtype}")
    picture = picture.detach().to("cpu")
    if is_float:
        low, high = float(picture.min()), float(picture.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected floating-point values in 0..1, got {low:g} to {high:g}; divide by 255")
        picture = (picture.float() * 255).round().to(torch.uint8)
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def read_values(path: Path) -> np.ndarray | None:
    """Decode the values of a picture with more than 8 bits a channel; None for any other, by its header alone.

    Returns:
        Whole or floating-point numbers, [H, W] or [H, W, 3].

    Raises:
        BadImageError: The file cannot be decoded.
    """
    try:
        with _open(path) as image:
            return _decode_values(image, path, turns=False) if _is_deep(image) else None
    except Exception as error:
        raise BadImageError(path, f"cannot decode the image: {_reason(error, path)}") from error


def _raw_mode(image: Image.Image) -> str:
    """Return how an image that is not decoded yet says that its channels are stored; "" where it does not."""
    for _, _, _, args in image.tile[:1] if isinstance(image, ImageFile.ImageFile) else ():
        first = args[0] if isinstance(args, tuple) and args else args
        return first if isinstance(first, str) else ""
    return ""


def _is_deep(image: Image.Image) -> bool:
    """Tell whether a channel of an image that is not decoded yet has more than 8 bits."""
    if image.mode.startswith(("I", "F")):
        return True
    return image.mode in ("RGB", "RGBA") and (";16" in _raw_mode(image) or _maximum_of_ppm(image) is not None)


def _has_more(image: Image.Image) -> bool:
    """Tell whether pages or frames follow the first; a smaller copy of a TIFF is none. Leaves the image elsewhere."""
    if image.format not in _WITH_FRAMES:
        return False
    try:
        if not getattr(image, "is_animated", False):
            return False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            image.seek(1)
            return not image.tag_v2.get(_TIFF_SUBFILE, 0) & 1
    except Exception:  # of what follows the first, which alone is read
        return False
    return True


def _maximum_of_ppm(image: Image.Image) -> int | None:
    """Return what a PPM that is not decoded yet says is white, where a colour has more than 8 bits; else None."""
    if image.format != "PPM" or image.mode != "RGB":
        return None
    assert isinstance(image, ImageFile.ImageFile)
    args = image.tile[0].args
    return args[1] if isinstance(args, tuple) and isinstance(args[1], int) and args[1] > 255 else None


def _turned(image: Image.Image, turns: bool) -> Image.Image:
    """Return an image that is not decoded yet as its EXIF orientation shows it, if ``turns``, else as it is stored."""
    orientation = _orientation(image)
    if orientation == 1:
        return image
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow turns these while it decodes
        image.filename = ""  # else it maps grey files into memory with height and width swapped
        image.load()
        return image if turns else image.transpose(_TURN_BACK[orientation])
    return ImageOps.exif_transpose(image) if turns else image


def _decode_values(image: Image.Image, path: Path, turns: bool) -> np.ndarray:
    """Return the values of the deep ``image`` of ``path``, [H, W] or [H, W, 3], turned as `_turned` does."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(_turned(image, turns))
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    assert isinstance(image, ImageFile.ImageFile)
    if (white := _maximum_of_ppm(image)) is not None:
        return _decode_deep_ppm(image, white)
    raw_mode, swapped = _raw_mode(image), [_in_other_order(tile) for tile in image.tile]
    with _open(path) as other:
        assert isinstance(other, ImageFile.ImageFile)
        if raw_mode == _GREY_WITH_ALPHA:
            other.tile = [tile._replace(args="RGBA") for tile in other.tile]
            high, low = np.split(np.asarray(_turned(other, turns))[:, :, :2], 2, axis=2)
            return _join_bytes(high[:, :, 0], low[:, :, 0])
        other.tile = swapped
        high, low = (np.asarray(_turned(one, turns))[:, :, :3] for one in (image, other))
    return _join_bytes(high, low)


def _decode_deep_ppm(image: ImageFile.ImageFile, white: int) -> np.ndarray:
    """Return the values of a PPM in colour, uint16 [H, W, 3], as Pillow gives those of a grey one: white is 65535.

    Pillow would decode it to 8 bits; as a grey picture of three times the width it keeps all bits.
    """
    width, height = image.size
    (tile,) = image.tile
    args: str | tuple[str, int] = ("I", white)
    codec = tile.codec_name
    if codec == "ppm" and white == 65535:  # which Pillow's fast decoder reads too
        codec, args = "raw", "I;16B"
    image._mode, image._size = "I", (3 * width, height)
    image.tile = [tile._replace(codec_name=codec, extents=(0, 0, 3 * width, height), args=args)]
    return np.asarray(image).astype(np.uint16).reshape(height, width, 3)


def _in_other_order(tile: Any) -> Any:
    """Return a tile of Pillow's whose 16-bit colours give their other byte."""
    raw_mode, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    channels, _, order = raw_mode.rpartition(";")
    swapped = f"{channels};{_OTHER_ORDER[order]}"
    return tile._replace(args=(swapped, *rest) if isinstance(tile.args, tuple) else swapped)


def _join_bytes(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return 16-bit values of their two bytes, uint16 [...]."""
    return high.astype(np.uint16) << 8 | low


def _as_colour(levels: np.ndarray) -> np.ndarray:
    """Return grey levels [H, W] as [H, W, 3], and colours as they are."""
    return levels if levels.ndim == 3 else np.repeat(levels[:, :, None], 3, axis=2)


def _reason(error: Exception, path: Path) -> str:
    """Return an error's text; of a file that is no picture say what it is instead, where that can be told."""
    if isinstance(error, UnidentifiedImageError):
        known = unreadable_format(str(path)) or _target_of_link(path) or describe_content(path)
        return known or "in no format that the installed Pillow reads"
    return str(error) or type(error).__name__


def _target_of_link(path: Path) -> str | None:
    """Recognise a link that was saved as text, in a picture's place."""
    with path.open("rb") as file:
        start = file.read(1024)
    try:
        target = start.decode().strip()
        if len(start) < 1024 and target.isprintable() and target and (path.parent / target).is_file():
            return f"the text {target!r} of a link; check out or unpack again where links are allowed"
    except (ValueError, OSError):
        pass
    return None
