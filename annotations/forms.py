"""Forms of single values in a json: what is plain, what is taken although it is in another form, what is neither.

`fields` says which entry of which record has which form.
"""

import array
import hashlib
import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# No picture has so many pixels on a side, and nothing in a picture lies farther out. Rasterising an edge takes memory
# in proportion to its length.
MAX_SIDE = (1 << 20) - 1
MAX_COORDINATE = float(1 << 20)

# Longer texts are no names: they would fill tables and messages. No file system takes longer paths.
MAX_NAME, MAX_PATH = 200, 1000

# Where detections may lie: anywhere, as long as an area does not overflow.
MAX_DETECTED = 1e12

_INT64 = 1 << 63
_DIGITS = re.compile(r"-?[1-9][0-9]{0,18}|0")
_NUMBER = re.compile(r"\s*-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?\s*")

DIGITS_AS_TEXT = "digits as text"
WHOLE_FLOAT = "a whole number with a decimal point"
TRUE_FALSE = "true or false"
NUMBER_AS_NAME = "a number as a name"
NESTED_POINTS = "points in brackets of their own"
FLAT_POLYGON = "a polygon without the outer brackets"

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 8, 4, 60, 60, 40


def short(value: Any) -> str:
    """Return a value as text of at most 80 characters, whatever it holds."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_encodable(text: str) -> bool:
    """Tell whether a text can be written as UTF-8; json also holds halves of surrogate pairs, which cannot."""
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def flat_floats(rows: Iterable[list[float]]) -> np.ndarray:
    """Return the numbers of all lists as one float64 array; an array takes a list in far less time than numpy does."""
    numbers = array.array("d")
    for row in rows:
        numbers.fromlist(row)
    return np.frombuffer(numbers, dtype=np.float64)


def _flat_numbers(rows: Sequence[Any], limit: float) -> np.ndarray | None:
    """Return the numbers of lists that hold nothing but numbers from -``limit`` to ``limit``, else None."""
    if not set(map(type, rows)) <= {list} or not set(map(type, itertools.chain.from_iterable(rows))) <= {int, float}:
        return None
    try:
        flat = flat_floats(rows)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return flat if not len(flat) or bool(-limit <= flat.min() and flat.max() <= limit) else None


def number_of_id(text: str) -> int:
    """Return the number that stands for an id of text: the same in every file, and like no id that counts.

    The first 48 bits of the text's SHA-256, with bit 48 set. Results files carry the text.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:6], "big") | 1 << 48


@dataclass(frozen=True)
class Form:
    """What a value has to be.

    Attributes:
        expected: The form and range in words.
        read: Returns (the value in this form, the other form that it was in or "").
            Raises ValueError for a value that is not taken.
        fast: Returns a whole column as it is used where all its values are in this form, else None.
        also: Other forms that are taken.
    """

    expected: str
    read: Callable[[Any], tuple[Any, str]]
    fast: Callable[[list[Any]], list[Any] | np.ndarray | None] = lambda values: None
    also: tuple[str, ...] = ()


def whole_number(low: int, high: int, expected: str) -> Form:
    """Return the form of an int from ``low`` to ``high``."""

    def read(value: Any) -> tuple[int, str]:
        """Return (the number, the form that it was in)."""
        how = ""
        if isinstance(value, float) and value.is_integer():
            value, how = int(value), WHOLE_FLOAT
        elif isinstance(value, str) and _DIGITS.fullmatch(value):
            value, how = int(value), DIGITS_AS_TEXT
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(expected)
        return value, how

    def fast(values: list[Any]) -> list[Any] | None:
        is_plain = set(map(type, values)) == {int} and low <= min(values) and max(values) <= high
        return values if is_plain else None

    return Form(expected, read, fast, (DIGITS_AS_TEXT, WHOLE_FLOAT))


def _id() -> Form:
    """Return the form of an id: a whole number, or text, which is returned as it is."""
    number = whole_number(-_INT64, _INT64 - 1, "a whole number or text")

    def read(value: Any) -> tuple[int | str, str]:
        """Return (the number or text, the form that it was in)."""
        if (
            isinstance(value, str)
            and value
            and not _DIGITS.fullmatch(value)
            and len(value) <= MAX_PATH
            and is_encodable(value)
        ):
            return value, ""
        return number.read(value)

    return Form(number.expected, read, number.fast, number.also)


def _read_number(value: Any, low: float, high: float, expected: str) -> tuple[float, str]:
    how = ""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value, how = float(value), DIGITS_AS_TEXT
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is neither
        raise ValueError(expected)
    return value, how


def number(low: float, high: float, expected: str) -> Form:
    """Return the form of an int or float from ``low`` to ``high``; a column is fast with NaN for what is missing."""

    def fast(values: list[Any]) -> np.ndarray | None:
        if not set(map(type, values)) <= {int, float}:
            return None
        try:
            column = np.array(values, dtype=np.float64)
        except OverflowError:
            return None
        return column if bool((((column >= low) & (column <= high)) | np.isnan(column)).all()) else None

    return Form(expected, lambda value: _read_number(value, low, high, expected), fast, (DIGITS_AS_TEXT,))


def numbers(count: int, limit: float, expected: str) -> Form:
    """Return the form of a list of ``count`` numbers from -``limit`` to ``limit``."""

    def read(value: Any) -> tuple[list[float], str]:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(expected)
        taken = [_read_number(v, -limit, limit, expected) for v in value]
        return [v for v, _ in taken], next((how for _, how in taken if how), "")

    def fast(values: list[Any]) -> np.ndarray | None:
        if set(map(type, values)) != {list} or set(map(len, values)) != {count}:
            return None
        flat = _flat_numbers(values, limit)
        return None if flat is None else flat.reshape(-1, count)

    return Form(expected, read, fast, (DIGITS_AS_TEXT,))


def _text(expected: str, longest: int, *, takes_numbers: bool) -> Form:
    def read(value: Any) -> tuple[str, str]:
        how = ""
        if takes_numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            value, how = short(value), NUMBER_AS_NAME
        if not isinstance(value, str) or not value.strip() or len(value) > longest or not is_encodable(value):
            raise ValueError(expected)
        return value, how

    def fast(values: list[Any]) -> list[Any] | None:
        is_plain = set(map(type, values)) == {str} and all(map(str.isascii, values)) and all(values)
        return values if is_plain and max(map(len, values)) <= longest else None

    return Form(expected, read, fast, (NUMBER_AS_NAME,) if takes_numbers else ())


def _flag() -> Form:
    expected = "0 or 1"

    def read(value: Any) -> tuple[int, str]:
        if isinstance(value, bool):
            return int(value), TRUE_FALSE
        return whole.read(value)

    whole = whole_number(0, 1, expected)
    return Form(expected, read, whole.fast, (*whole.also, TRUE_FALSE))


def _read_points(value: Any) -> tuple[list[float], str]:
    """Return x, y, v, x, y, v, ... of a flat list, or of a list of points; a null point is not labelled."""
    expected = "a list of x, y, v for every point"
    if not isinstance(value, list):
        raise ValueError(f"a list of points: {expected.removeprefix('a list of ')}")
    if any(isinstance(point, list) or point is None for point in value):
        flat: list[Any] = []
        for k, point in enumerate(value):
            if point is not None and (not isinstance(point, list) or len(point) != 3):
                raise ValueError(f"[x, y, v] for every point; point {k} is {short(point)}")
            is_labelled = point is not None and not _is_zero(point[2])
            flat += point if is_labelled and point is not None else [0, 0, 0]
        taken = _read_points(flat)
        return taken[0], taken[1] or NESTED_POINTS
    if len(value) % 3:
        raise ValueError(f"{expected}; {len(value)} numbers are not three per point")
    limit = f"finite numbers, up to {MAX_COORDINATE:,.0f}"
    read = [_read_number(v, -MAX_COORDINATE, MAX_COORDINATE, limit) for v in value]
    return [v for v, _ in read], next((how for _, how in read if how), "")


def _fast_points(values: list[Any]) -> list[Any] | None:
    lists = [value for value in values if value is not None]
    is_plain = _flat_numbers(lists, MAX_COORDINATE) is not None and not any(len(value) % 3 for value in lists)
    return values if is_plain else None


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _read_names(value: Any) -> tuple[list[str], str]:
    expected = "a list of different names"
    if not isinstance(value, list):
        raise ValueError(expected)
    name = _text(expected, MAX_NAME, takes_numbers=True)
    read = [name.read(v) for v in value]
    names = [v for v, _ in read]
    if len(set(names)) < len(names):
        raise ValueError(expected)
    return names, next((how for _, how in read if how), "")


def _read_links(value: Any) -> tuple[list[tuple[int, int]], str]:
    expected = "pairs of keypoint numbers from 1"
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError(expected)
    whole = whole_number(1, 1 << 31, expected)
    read = [(whole.read(a), whole.read(b)) for a, b in value]
    how = next((how for pair in read for _, how in pair if how), "")
    return [(a, b) for (a, _), (b, _) in read], how


def _read_segmentation(value: Any) -> tuple[Any, str]:
    """Return polygons as lists of numbers, run lengths as they are (their size and sum need the picture)."""
    if isinstance(value, dict):
        return value, ""
    if not isinstance(value, list):
        raise ValueError("polygons [[x, y, ...], ...] or run lengths {size, counts}")
    how = ""
    if value and not any(isinstance(part, list) for part in value):
        value, how = [value], FLAT_POLYGON
    elif len(value) >= 3 and all(_is_point(part) for part in value):
        value, how = [value], NESTED_POINTS
    polygons = []
    for points in value:
        if not isinstance(points, list):
            raise ValueError(f"polygons [[x, y, ...], ...]; one is {short(points)}")
        if points and all(_is_point(point) for point in points):
            points, how = [v for point in points for v in point], how or NESTED_POINTS
        expected = f"polygons of finite numbers, x and y in turn, up to {MAX_COORDINATE:,.0f}; one is {short(points)}"
        if len(points) % 2:
            raise ValueError(f"polygons of x and y in turn; {len(points)} is not an even number of finite numbers")
        read = [_read_number(v, -MAX_COORDINATE, MAX_COORDINATE, expected) for v in points]
        how = next((strange for _, strange in read if strange), how)
        polygons.append([float(v) for v, _ in read])
    return polygons, how


def _fast_segmentations(values: list[Any]) -> list[Any] | None:
    if not set(map(type, values)) <= {list, dict, type(None)}:
        return None
    polygons = list(itertools.chain.from_iterable(value for value in values if type(value) is list))
    # Three pairs of numbers may be one polygon of points: each is looked at.
    if _flat_numbers(polygons, MAX_COORDINATE) is None or any(len(p) % 2 or len(p) == 2 for p in polygons):
        return None
    return values


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(v, list) for v in value)


ID = _id()
LABEL = whole_number(1, _INT64 - 1, "a number from 1, or a name")
SIDE = whole_number(1, MAX_SIDE, f"a whole number of pixels, 1 to {MAX_SIDE:,}")
COUNT = whole_number(0, _INT64 - 1, "a whole number")
BOX = numbers(4, MAX_COORDINATE, f"4 finite numbers, up to {MAX_COORDINATE:,.0f}")
DETECTED_BOX = numbers(4, MAX_DETECTED, f"4 finite numbers, up to {MAX_DETECTED:g}")
AREA = number(0, MAX_COORDINATE**2, "a number of square pixels, 0 or more")
SCORE = number(-1e300, 1e300, "a finite number")
SIGMA = number(1e-6, 1e3, "a positive number")
FLAG = _flag()
NAME = _text(f"a name of up to {MAX_NAME} characters", MAX_NAME, takes_numbers=True)
FILE_NAME = _text(f"a file's name of up to {MAX_PATH} characters", MAX_PATH, takes_numbers=False)
POINTS = Form("x, y, v for every point, in one list", _read_points, _fast_points, (DIGITS_AS_TEXT, NESTED_POINTS))
NAMES = Form("a list of different names", _read_names, also=(NUMBER_AS_NAME,))
LINKS = Form("pairs of keypoint numbers from 1", _read_links, also=(DIGITS_AS_TEXT, WHOLE_FLOAT))
SEGMENTATION = Form(
    "polygons [[x, y, ...], ...], or run lengths {size, counts} as a list or as COCO's text",
    _read_segmentation,
    _fast_segmentations,
    (DIGITS_AS_TEXT, NESTED_POINTS, FLAT_POLYGON),
)
