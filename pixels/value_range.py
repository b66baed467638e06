"""Which values of pictures with more than 8 bits a channel are black and white: one rule for all pictures of a dataset.

Nothing here opens a file: `images` reads values, `annotations.value_ranges` looks at those of a dataset.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

# A range is set by all but one in so many of a picture's values: a camera's dead pixels and markers for "no value" are
# few, and would leave everything else black.
OUTLIER = 1000

# A value beyond a power of two by so much of it is cut: sharpening and resizing leave such values.
OVERSHOOT = 0.01

Range = tuple[float, float]


@dataclass(frozen=True)
class ValueRange:
    """The values that are shown black and white, of pictures with more than 8 bits a channel.

    Attributes:
        whole: (black, white) of whole numbers; None where the dataset has no such pictures.
        real: (black, white) of floating-point numbers; None where the dataset has no such pictures.
    """

    whole: Range | None = None
    real: Range | None = None

    def of(self, kind: str) -> Range:
        """Return the range of a kind of numbers, ``whole`` or ``real``: 16 bits, or 0 to 1, where none is set."""
        return getattr(self, kind) or DEFAULTS[kind]

    def to_plain(self) -> dict[str, list[float] | None]:
        """Return the record as plain values."""
        pairs = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: None if pair is None else list(pair) for name, pair in pairs.items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any] | None) -> "ValueRange":
        """Rebuild a record from `to_plain`; a checkpoint without one was trained on 16 bits."""
        if values is None:
            return cls(whole=DEFAULTS["whole"])
        known = {f.name: values.get(f.name) for f in fields(cls)}
        return cls(**{name: None if pair is None else (pair[0], pair[1]) for name, pair in known.items()})


DEFAULTS: dict[str, Range] = {"whole": (0, 65535), "real": (0, 1)}


def to_levels(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Turn values into levels of brightness.

    Of whole numbers the highest eight bits of the range are taken, as Pillow does with 16 bits. Values beyond the range
    become black or white; NaN, which stands for "no value", becomes black.

    Args:
        values: Whole or floating-point numbers, [...].
        value_range: Which of them are black and white.

    Returns:
        uint8 [...].
    """
    if values.dtype == np.uint16:
        return _table(value_range)[values]
    is_real = values.dtype.kind == "f"
    low, high = value_range.of("real" if is_real else "whole")
    raised = values.astype(np.float64)
    if is_real:
        raised[np.isnan(raised)] = low
    np.clip(raised, low, high, out=raised)
    raised -= low
    if not is_real and high - low >= 255:
        raised *= 256 / (high - low + 1)
    else:
        raised *= 255 / (high - low)
        np.rint(raised, out=raised)
    return raised.astype(np.uint8)


@functools.cache
def _table(value_range: ValueRange) -> np.ndarray:
    """Return the level of every 16-bit value, uint8 [65536]."""
    return to_levels(np.arange(65536, dtype=np.int64), value_range)


@dataclass(frozen=True)
class ValueBounds:
    """What was seen of one picture with more than 8 bits a channel.

    Attributes:
        kind: ``whole`` or ``real``.
        low: All but one in `OUTLIER` of its values are at least so high.
        high: All but one in `OUTLIER` of its values are at most so high.
        missing: How many values are no finite numbers.
    """

    kind: str
    low: float
    high: float
    missing: int = 0


def bounds_of(values: np.ndarray) -> ValueBounds:
    """Return the bounds of a picture's values, whole or floating-point numbers [...]."""
    kind = "real" if values.dtype.kind == "f" else "whole"
    finite = values.reshape(-1) if kind == "whole" else values[np.isfinite(values)]
    if not finite.size:
        return ValueBounds(kind, 0, 0, values.size)
    few = finite.size // OUTLIER
    low, high = np.partition(finite, (few, finite.size - 1 - few))[[few, finite.size - 1 - few]].tolist()
    return ValueBounds(kind, low, high, values.size - finite.size)


def common_range(bounds: Iterable[ValueBounds]) -> Range | None:
    """Return the range that holds the values of all pictures of one kind; None without any.

    It ends at a number of bits: white is 2^k - 1, so 4095 for 12 bits and 1 for floating-point numbers up to 1. Black
    is 0, or where there are negative values the power of two below them.
    """
    pairs = [(b.low, b.high) for b in bounds]
    if not pairs:
        return None
    low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
    bits = max(1, math.ceil(max(high, 0) / (1 + OVERSHOOT)).bit_length())
    white = 2**bits - 1
    if low >= -OVERSHOOT * white:
        return 0, white
    return -(2 ** max(0, math.ceil(-low / (1 + OVERSHOOT)) - 1).bit_length()), white


def describe_range(pair: Range, kind: str) -> str:
    """Return a range in words, such as ``0 to 4095 (12 bits)``."""
    low, high = pair
    bits = f" ({int(high).bit_length()} bits)" if kind == "whole" and low == 0 else ""
    return f"{low:.16g} to {high:.16g}{bits}"
