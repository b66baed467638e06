"""Outlines give their masks back: to the pixel without a tolerance, nearly with one."""

import numpy as np
import pytest

from pixels.masks import EMPTY_BLOCK, MaskBlock
from pixels.outlines import outlines


def fill(lines, height, width):
    """Fill lines along the edges of pixels by the even-odd rule: each edge that goes down turns all to its right."""
    turned = np.zeros((height, width + 1), dtype=int)
    for line in lines:
        for (x, y), (next_x, next_y) in zip(line.tolist(), np.roll(line, -1, axis=0).tolist()):
            assert (x == next_x) != (y == next_y)
            turned[min(y, next_y) : max(y, next_y), x] += 1 if x == next_x else 0
    return np.cumsum(turned, axis=1)[:, :-1] % 2


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 1.0])
def test_without_a_tolerance_outlines_are_the_mask_to_the_pixel(share):
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (7, 1), (12, 17), (30, 30)):
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        lines = outlines(MaskBlock(3, 5, mask))
        expected = np.zeros((height + 8, width + 6), dtype=int)
        expected[5 : 5 + height, 3 : 3 + width] = mask
        assert (fill(lines, *expected.shape) == expected).all()


def test_pixels_that_meet_at_a_corner_are_kept():
    mask = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.uint8)
    assert (fill(outlines(MaskBlock(0, 0, mask)), 3, 3) == mask).all()


def test_nothing_has_no_outline():
    assert outlines(EMPTY_BLOCK) == [] and outlines(MaskBlock(2, 2, np.zeros((4, 4), np.uint8)), 1.0) == []


def area(line):
    x, y = line.T.astype(float)
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_with_a_tolerance_few_corners_keep_the_area():
    y, x = np.mgrid[:200, :300]
    disc = (((x - 150) / 140) ** 2 + ((y - 100) / 90) ** 2 < 1).astype(np.uint8)
    (exact,), (few,) = outlines(MaskBlock(0, 0, disc)), outlines(MaskBlock(0, 0, disc), 1.0)
    assert area(exact) == disc.sum() == pytest.approx(area(few), rel=0.01)
    assert len(few) < len(exact) / 5
    # Every corner that is left out lies within the tolerance of the line.
    ends = np.roll(few, -1, axis=0)
    along = ends - few
    for point in exact:
        share = (((point - few) * along).sum(axis=1) / np.square(along).sum(axis=1)).clip(0, 1)
        assert np.hypot(*(few + share[:, None] * along - point).T).min() <= 1 + 1e-9
