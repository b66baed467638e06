"""Polygons and run lengths to masks, each decoded only inside its own box, bit-equal to pycocotools.

A mask travels as a `MaskBlock`: its pixels inside a window of the image. Full canvases are made once, where
the model needs them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_util


class MaskBlock(NamedTuple):
    """The part of a mask that can be non-zero.

    Attributes:
        left: Column of the block's first pixel in the image.
        top: Row of the block's first pixel in the image.
        pixels: uint8 [h, w] of 0 and 1.
    """

    left: int
    top: int
    pixels: np.ndarray


EMPTY_BLOCK = MaskBlock(0, 0, np.zeros((0, 0), dtype=np.uint8))


def block_from_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> MaskBlock:
    """Rasterise the union of polygons inside its own box.

    Equal to ``annToMask`` of pycocotools, which fills the whole image. Its rasteriser rounds on a grid that
    starts at the image's origin, so a shifted polygon gives other pixels. Instead the canvas is cut below
    and right of the polygons, and the columns left of them are taken out of the first run length: run
    lengths are column-major and the first is stored as it is (later ones as differences to the one two
    before, from the fourth on).

    Args:
        polygons: float64 [2 P] each, as x, y, x, y, ... in pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    if not polygons:
        return EMPTY_BLOCK
    x_min = min(float(points[0::2].min()) for points in polygons)
    x_max = max(float(points[0::2].max()) for points in polygons)
    y_min = min(float(points[1::2].min()) for points in polygons)
    y_max = max(float(points[1::2].max()) for points in polygons)
    canvas_height, canvas_width = min(height, max(math.ceil(y_max), 1)), min(width, max(math.ceil(x_max), 1))
    rles = mask_util.frPyObjects([points.tolist() for points in polygons], canvas_height, canvas_width)
    rle = mask_util.merge(rles) if len(rles) > 1 else rles[0]
    left, top = min(max(math.floor(x_min), 0), canvas_width), min(max(math.floor(y_min), 0), canvas_height)
    counts = _shorten_first_run(rle["counts"], left * canvas_height)
    if counts is None:  # no pixel at all
        return EMPTY_BLOCK
    block = mask_util.decode({"size": [canvas_height, canvas_width - left], "counts": counts})
    return MaskBlock(left, top, block[top:])


def rle_from_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> dict[str, Any]:
    """Return COCO's run lengths of the union of polygons."""
    if not polygons:
        return {"size": [height, width], "counts": mask_util.encode(np.zeros((height, width), np.uint8, "F"))["counts"]}
    rles = mask_util.frPyObjects([points.tolist() for points in polygons], height, width)
    return mask_util.merge(rles) if len(rles) > 1 else rles[0]


def _read_number(counts: bytes, position: int) -> tuple[int, int]:
    """Read one number of COCO's compressed run lengths; return (number, position after it).

    A number is written in groups of five bits, least significant first, 48 added to each; bit 5 says that
    another group follows, bit 4 of the last group is the sign (``rleToString`` in pycocotools' maskApi.c).
    """
    number, shift = 0, 0
    while True:
        group = counts[position] - 48
        number |= (group & 0x1F) << shift
        shift += 5
        position += 1
        if not group & 0x20:
            return number - (1 << shift) if group & 0x10 else number, position


def check_run_lengths(counts: Sequence[bytes], num_pixels: np.ndarray) -> list[str]:
    """Say what is wrong with each of COCO's compressed strings of run lengths, "" for a good one.

    All strings are read at once. pycocotools reads them unchecked, past their end if need be.

    Args:
        counts: The strings.
        num_pixels: int64 [N], pixels of each picture, which the run lengths have to add up to.
    """
    problems = [""] * len(counts)
    lengths = np.array([len(text) for text in counts], dtype=np.int64)
    groups = np.frombuffer(b"".join(counts), dtype=np.uint8).astype(np.int64) - 48
    text_of_group = np.repeat(np.arange(len(counts)), lengths)
    strange = np.bincount(text_of_group[(groups < 0) | (groups > 63)], minlength=len(counts)) > 0
    # A number ends at its first group without bit 5; the last number of a string has to end with the string.
    is_last = (groups & 0x20) == 0
    ends = np.cumsum(lengths)
    open_end = np.zeros(len(counts), dtype=bool)
    open_end[lengths > 0] = ~is_last[ends[lengths > 0] - 1]
    is_last[ends[lengths > 0] - 1] = True
    last = np.flatnonzero(is_last)
    first = np.r_[0, last[:-1] + 1] if len(last) else last
    sizes = last - first + 1
    place = np.arange(len(groups)) - np.repeat(first, sizes)
    too_long = np.bincount(text_of_group[last[sizes > 7]], minlength=len(counts)) > 0  # 2 ** 35 pixels
    parts = (groups & 0x1F) << (5 * np.minimum(place, 7))
    numbers = np.add.reduceat(parts, first) if len(first) else parts
    numbers -= np.where(groups[last] & 0x10, 1 << (5 * np.minimum(sizes, 7)), 0)
    # From the fourth on a number is the difference to the one two before: sum every second one, without the first.
    text_of_number = text_of_group[last]
    start = np.searchsorted(text_of_number, np.arange(len(counts)))
    position = np.arange(len(numbers)) - start[text_of_number]
    runs = numbers.copy()
    for parity in (1, 0):
        of_chain = (position % 2 == parity) & (position > 0)
        chain, text = numbers[of_chain], text_of_number[of_chain]
        total = np.cumsum(chain)
        first_of_text = np.searchsorted(text, text)
        runs[of_chain] = total - total[first_of_text] + chain[first_of_text]
    negative = np.bincount(text_of_number[runs < 0], minlength=len(counts)) > 0
    sums = np.zeros(len(counts), dtype=np.int64)
    np.add.at(sums, text_of_number, runs)
    for n in np.flatnonzero((lengths == 0) | strange | open_end | too_long | negative | (sums != num_pixels)).tolist():
        if lengths[n] == 0 or strange[n]:
            problems[n] = "the counts are not COCO's compressed string"
        elif open_end[n]:
            problems[n] = "the compressed run lengths end within a number"
        else:
            problems[n] = f"the run lengths do not add up to the picture's {num_pixels[n]} pixels"
    return problems


def _shorten_first_run(counts: bytes, amount: int) -> bytes | None:
    """Subtract ``amount`` from the first of COCO's compressed run lengths; None if nothing follows it."""
    first, position = _read_number(counts, 0)
    if position == len(counts):
        return None
    rest = first - amount
    groups = bytearray()
    while True:
        group = rest & 0x1F
        rest >>= 5
        more = rest != 0 or bool(group & 0x10)
        groups.append((group | 0x20 if more else group) + 48)
        if not more:
            return bytes(groups) + counts[position:]


def block_from_rle(counts: bytes, height: int, width: int) -> MaskBlock:
    """Decode COCO's compressed run lengths of a whole image and cut out their box."""
    rle = {"size": [height, width], "counts": counts}
    left, top, box_width, box_height = (int(v) for v in mask_util.toBbox(rle))
    if box_width == 0 or box_height == 0:
        return EMPTY_BLOCK
    mask = mask_util.decode(rle)
    return MaskBlock(left, top, mask[top : top + box_height, left : left + box_width])


def block_from_mask(mask: np.ndarray) -> MaskBlock:
    """Cut the box of a full mask, bool or uint8 [H, W]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return EMPTY_BLOCK
    top, left = int(rows[0]), int(columns[0])
    return MaskBlock(left, top, mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1])


def compress_rle(segmentation: dict[str, Any], height: int, width: int) -> bytes:
    """Return compressed run lengths from either of COCO's two spellings (list of counts, or string)."""
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return mask_util.frPyObjects(segmentation, height, width)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def counts_of_block(block: MaskBlock, height: int, width: int) -> bytes:
    """Return COCO's compressed run lengths of a mask block in an image of the given size.

    Runs are counted inside the block, column by column, and strung together over the rows above and below it.
    """
    rows, columns = block.pixels.shape
    if not block.pixels.any():
        counts = [height * width]
    else:
        # Positions in the column-major image where the value changes, in pairs: start of a run, its end.
        padded = np.zeros((columns, rows + 2), dtype=np.int8)
        padded[:, 1:-1] = block.pixels.T
        column, edge = np.nonzero(np.diff(padded, axis=1))
        positions = (column + block.left) * height + edge + block.top
        starts, ends = positions[0::2], positions[1::2]
        touching = starts[1:] == ends[:-1]  # a run that goes on in the next column
        starts, ends = starts[np.r_[True, ~touching]], ends[np.r_[~touching, True]]
        bounds = np.stack([starts, ends], axis=1).reshape(-1)
        counts = np.diff(np.r_[0, bounds, height * width]).tolist()
        if counts[-1] == 0:
            counts.pop()
    return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]


def area_of_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> float:
    """Return the number of pixels that the union of polygons covers."""
    return float(np.count_nonzero(block_from_polygons(polygons, height, width).pixels))


def mask_edges(blocks: Sequence[MaskBlock], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where masks change along the rows of their canvases, which lie one after another.

    Every row begins with 0; whether the number of edges up to a pixel is odd says whether the pixel is 1.

    Args:
        blocks: They lie inside their canvases.
        height: Height of every canvas in pixels.
        width: Width of every canvas in pixels.

    Returns:
        int64 [E], in rising order: pixels counted through all canvases. And how many belong to each mask, int64 [N].
    """
    shapes = np.array([block.pixels.shape for block in blocks], dtype=np.int64).reshape(-1, 2)
    lefts, tops = (np.array([block[i] for block in blocks], dtype=np.int64) for i in range(2))
    sizes = shapes[:, 0] * (shapes[:, 1] + 1)  # with a 0 behind every row
    ends = np.cumsum(sizes)
    starts = ends - sizes
    rows_of_all = np.zeros(1 + int(sizes.sum()), dtype=np.uint8)
    for block, start, end in zip(blocks, starts.tolist(), ends.tolist()):
        padded = rows_of_all[1 + start : 1 + end].reshape(-1, block.pixels.shape[1] + 1)
        padded[:, :-1] = block.pixels
    edges = np.flatnonzero(rows_of_all[1:] != rows_of_all[:-1])
    mask = np.repeat(np.arange(len(blocks)), np.searchsorted(edges, ends) - np.searchsorted(edges, starts))
    rows, columns = np.divmod(edges - starts[mask], shapes[mask, 1] + 1)
    columns += lefts[mask]
    kept = columns < width  # a run up to the last column ends with its row
    places = (mask * height + tops[mask] + rows) * width + columns
    return places[kept], np.bincount(mask[kept], minlength=len(blocks))


def paste_blocks(blocks: Sequence[MaskBlock], height: int, width: int) -> np.ndarray:
    """Return full masks, uint8 [N, height, width], from blocks that lie inside the image."""
    masks = np.zeros((len(blocks), height, width), dtype=np.uint8)
    for mask, (left, top, pixels) in zip(masks, blocks):
        mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return masks
