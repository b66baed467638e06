"""Masks inside their boxes are pycocotools' masks."""

import numpy as np
import pytest
from pycocotools import mask as mask_util

from helpers.run_lengths import run_lengths
from pixels.masks import (
    MaskBlock,
    area_of_polygons,
    block_from_mask,
    block_from_polygons,
    block_from_rle,
    check_run_lengths,
    compress_rle,
    counts_of_block,
    mask_edges,
    paste_blocks,
    rle_from_polygons,
)


def random_polygons(rng, height, width):
    polygons = []
    for _ in range(rng.integers(1, 4)):
        centre = rng.uniform(-10, (width + 10, height + 10))
        points = centre + rng.uniform(-1, 1, (rng.integers(3, 20), 2)) * rng.uniform(0.5, 80)
        kind = rng.integers(4)
        if kind == 0:
            points = np.clip(points, 0, (width, height))
        elif kind == 1:
            points = np.round(points)
        elif kind == 2:
            points = np.round(points) + 0.5
        polygons.append(points.reshape(-1))
    return polygons


def test_polygon_blocks_equal_pycocotools_on_thousands_of_random_polygons():
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(4000):
        height, width = (int(v) for v in rng.integers(5, 200, 2))
        polygons = random_polygons(rng, height, width)
        rles = mask_util.frPyObjects([p.tolist() for p in polygons], height, width)
        expected = mask_util.decode(mask_util.merge(rles))
        assert rle_from_polygons(polygons, height, width) == mask_util.merge(rles)
        block = block_from_polygons(polygons, height, width)
        different += int((paste_blocks([block], height, width)[0] != expected).any())
    assert different == 0


def test_a_block_is_no_larger_than_its_polygon_needs():
    block = block_from_polygons([np.array([50.0, 60, 70, 60, 70, 90, 50, 90])], 480, 640)
    assert block[:2] == (50, 60) and block.pixels.shape == (30, 20) and block.pixels.all()


@pytest.mark.parametrize("polygons", [[], [np.array([-50.0, -50, -40, -50, -40, -40])]])
def test_nothing_inside_the_image_gives_an_empty_mask(polygons):
    block = block_from_polygons(polygons, 20, 30)
    assert paste_blocks([block], 20, 30).sum() == 0
    rle = rle_from_polygons(polygons, 20, 30)
    assert rle["size"] == [20, 30] and not mask_util.decode(rle).any()


def test_rle_blocks_equal_pycocotools():
    rng = np.random.default_rng(1)
    for density, rows, columns in (
        (0.0, 30, 40), (0.01, 30, 40), (0.5, 30, 40), (1.0, 30, 40), (0.5, 1, 40), (0.5, 30, 1), (1.0, 1, 1)
    ):  # fmt: skip
        mask = np.zeros((37, 51), dtype=np.uint8, order="F")
        mask[3 : 3 + rows, 5 : 5 + columns] = rng.random((rows, columns)) < density
        counts = mask_util.encode(mask)["counts"]
        block = block_from_rle(counts, 37, 51)
        assert (paste_blocks([block], 37, 51)[0] == mask).all()
        assert (paste_blocks([block_from_mask(mask)], 37, 51)[0] == mask).all()
        assert sum(run_lengths(counts)) == 37 * 51
        box = mask_util.toBbox(mask_util.encode(mask)).tolist()
        for found in (block, block_from_mask(mask)):
            assert [found.left, found.top, *found.pixels.shape[::-1]] == box


def random_block(rng, height, width):
    """A block anywhere in its picture: empty, thin, dense or full."""
    top, left = int(rng.integers(height)), int(rng.integers(width))
    shape = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
    return MaskBlock(left, top, (rng.random(shape) < rng.choice([0, 0.3, 0.8, 1])).astype(np.uint8))


def test_run_lengths_of_blocks_are_pycocotools_of_whole_masks():
    """Runs that end in their column, go on in the next or reach the picture's last pixel."""
    rng = np.random.default_rng(4)
    for _ in range(400):
        height, width = (int(v) for v in rng.integers(1, 9, 2))
        block = random_block(rng, height, width)
        mask = np.asfortranarray(paste_blocks([block], height, width)[0])
        assert counts_of_block(block, height, width) == mask_util.encode(mask)["counts"], (height, width, block)


def test_edges_of_masks_are_where_a_plain_reading_of_their_rows_sees_a_change():
    rng = np.random.default_rng(5)
    for num_blocks in (0, 1, 2, 3) * 50:
        height, width = (int(v) for v in rng.integers(1, 9, 2))
        blocks = [random_block(rng, height, width) for _ in range(num_blocks)]
        expected, counts = [], [0] * num_blocks
        for n, mask in enumerate(paste_blocks(blocks, height, width)):
            for y, row in enumerate(mask.tolist()):
                for x, (before, value) in enumerate(zip([0, *row], row)):
                    if value != before:
                        expected.append((n * height + y) * width + x)
                        counts[n] += 1
        edges, of_each = mask_edges(blocks, height, width)
        assert edges.tolist() == expected and of_each.tolist() == counts, blocks


def test_both_spellings_of_run_lengths_compress_to_the_same_bytes():
    mask = np.zeros((10, 12), dtype=np.uint8, order="F")
    mask[2:5, 3:9] = 1
    counts = mask_util.encode(mask)["counts"]
    uncompressed = {"size": [10, 12], "counts": run_lengths(counts)}
    assert compress_rle(uncompressed, 10, 12) == counts
    assert compress_rle({"size": [10, 12], "counts": counts.decode()}, 10, 12) == counts


def test_area_of_polygons_is_the_number_of_pixels():
    square = np.array([10.0, 10, 20, 10, 20, 20, 10, 20])
    assert area_of_polygons([square, square + 5], 50, 50) == 100 + 100 - 25


def test_run_lengths_are_checked_as_a_plain_reading_of_each_string_would():
    rng = np.random.default_rng(3)
    counts, pixels = [], []
    for height, width, density in ((37, 51, 0.01), (37, 51, 0.5), (1, 1, 1.0), (700, 900, 0.0), (64, 1000, 0.0005)):
        mask = np.asfortranarray((rng.random((height, width)) < density).astype(np.uint8))
        counts.append(mask_util.encode(mask)["counts"])
        pixels.append(height * width)
    assert check_run_lengths(counts, np.array(pixels)) == [""] * len(counts)
    assert check_run_lengths([], np.zeros(0, int)) == []
    for _ in range(300):  # one byte changed, left out or added
        text, k = bytearray(counts[int(rng.integers(2))]), int(rng.integers(20))
        change = rng.integers(3)
        if change == 0:
            text[k] = int(rng.integers(40, 120))
        elif change == 1:
            del text[k:]
        else:
            text.insert(k, int(rng.integers(48, 112)))
        together = check_run_lengths([counts[2], bytes(text), counts[3]], np.array([1, 37 * 51, 700 * 900]))
        assert together[0] == together[2] == ""
        assert bool(together[1]) == (not is_whole(bytes(text), 37 * 51)), bytes(text)


def is_whole(counts, num_pixels):
    """Whether a plain reading of COCO's compressed string ends with a number, and its run lengths fill the picture."""
    if not all(48 <= c < 112 for c in counts):
        return False
    try:
        lengths = run_lengths(counts)
    except IndexError:
        return False
    return min(lengths, default=-1) >= 0 and sum(lengths) == num_pixels


def test_what_is_wrong_with_run_lengths_is_said():
    problems = check_run_lengths([b"o", b"", b"\x01", b"5"], np.array([5, 5, 5, 6]))
    assert "end within a number" in problems[0] and "add up to the picture's 6" in problems[3]
    assert problems[1] == problems[2] and "not COCO's compressed string" in problems[1]
    assert check_run_lengths([b"", b""], np.array([5, 5])) == [problems[1]] * 2  # nothing to read at all
