"""The range of a dataset's values follows from their bits; levels follow from the range."""

import numpy as np
import pytest

from pixels.value_range import DEFAULTS, ValueBounds, ValueRange, bounds_of, common_range, to_levels


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4080, (0, 4095)),
        (0, 4095, (0, 4095)),
        (0, 4100, (0, 4095)),  # a hundredth above is cut
        (0, 4400, (0, 8191)),
        (900, 1000, (0, 1023)),
        (0, 255, (0, 255)),
        (0, 1, (0, 1)),
        (0, 0, (0, 1)),
        (0.1, 0.9, (0, 1)),
        (-0.002, 1.003, (0, 1)),  # what a sharp resize leaves
        (-1.0, 1.0, (-1, 1)),
        (-1000, 3000, (-1024, 4095)),
        (-32768, 32767, (-32768, 32767)),
        (-90, -20, (-128, 1)),
        (0, 2**31 - 1, (0, 2**31 - 1)),
        (0.0, 3e38, (0, 2**128 - 1)),
    ],
)
def test_a_range_ends_at_whole_bits(low, high, expected):
    assert common_range([ValueBounds("any", low, high)]) == expected


def test_the_widest_picture_settles_the_range():
    assert common_range([]) is None
    assert common_range([ValueBounds("whole", 0, 200), ValueBounds("whole", -3, 4000)]) == (0, 4095)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_few_values_do_not_settle_a_range(dtype):
    values = np.linspace(0, 4095, 100 * 100).astype(dtype).reshape(100, 100)
    dead = values.copy()
    dead[0, :10] = 65535  # one in a thousand
    assert 4080 < bounds_of(values).high <= bounds_of(dead).high <= 4095
    dead[1, 0] = 65535
    assert bounds_of(dead).high == 65535


def test_missing_values_are_counted_and_black():
    values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    values[0, :3] = np.nan, np.inf, -np.inf
    bounds = bounds_of(values)
    assert bounds.kind == "real" and bounds.missing == 3 and 0 < bounds.low < bounds.high == 1
    levels = to_levels(values, ValueRange(real=(0, 1)))
    assert levels[0, :3].tolist() == [0, 255, 0] and levels[-1, -1] == 255
    assert bounds_of(np.full((4, 4), np.nan, dtype=np.float32)) == ValueBounds("real", 0, 0, 16)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_whole_numbers_keep_their_highest_eight_bits(bits):
    values = np.arange(2**bits)
    shown = ValueRange(whole=(0, 2**bits - 1))
    for dtype in (np.uint16, np.int32):
        assert (to_levels(values.astype(dtype), shown) == values >> (bits - 8)).all()


def test_few_bits_reach_white_and_what_is_beyond_is_cut():
    assert to_levels(np.array([0, 1]), ValueRange(whole=(0, 1))).tolist() == [0, 255]
    assert to_levels(np.array([-5, 0, 4095, 9000]), ValueRange(whole=(0, 4095))).tolist() == [0, 0, 255, 255]
    assert to_levels(np.array([9000], np.uint16), ValueRange(whole=(0, 4095))).tolist() == [255]
    assert to_levels(np.array([-1024, 1536, 4095]), ValueRange(whole=(-1024, 4095))).tolist() == [0, 128, 255]
    assert to_levels(np.array([-1.0, 0.0, 1.0]), ValueRange(real=(-1, 1))).tolist() == [0, 128, 255]


def test_floats_made_of_8_bits_come_back():
    levels = np.arange(256)
    assert (to_levels((levels / 255).astype(np.float32), ValueRange()) == levels).all()
    assert (to_levels(levels.astype(np.float32), ValueRange(real=(0, 255))) == levels).all()


def test_plain_values_come_back_and_older_checkpoints_mean_16_bits():
    shown = ValueRange(whole=(0, 4095))
    assert shown.to_plain() == {"whole": [0, 4095], "real": None}
    assert ValueRange.from_plain(shown.to_plain()) == shown
    assert ValueRange.from_plain(ValueRange().to_plain()) == ValueRange()
    assert ValueRange.from_plain(None) == ValueRange(whole=DEFAULTS["whole"])
