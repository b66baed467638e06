"""Outlines of masks as polygons, for drawings that scale: along the edges of pixels, then with fewer corners."""

import numpy as np

from pixels.masks import MaskBlock


def outlines(block: MaskBlock, tolerance: float = 0.0) -> list[np.ndarray]:
    """Return closed lines around the pixels of a mask, those around its holes included.

    Filled by the even-odd rule they give the mask: exactly with ``tolerance`` 0, since they run along the edges of
    pixels.

    Args:
        block: The mask.
        tolerance: How far, in pixels, a line may be off for the sake of fewer corners.

    Returns:
        int64 [P, 2] each, x and y of its corners in the image; the last one joins the first.
    """
    padded = np.pad(block.pixels.astype(np.int8), 1)
    # A corner is where one or three of four pixels are 1; where two that lie diagonally are, two corners meet.
    turns = np.abs(padded[1:, 1:] - padded[1:, :-1] - padded[:-1, 1:] + padded[:-1, :-1])
    rows, columns = np.nonzero(turns)
    times = turns[rows, columns]
    rows, columns = np.repeat(rows, times), np.repeat(columns, times)
    # Along a row corners pair up to edges in their order, 2 n with 2 n + 1, and so they do down a column.
    order = np.lexsort((rows, columns))
    below = np.empty_like(order)
    below[order[0::2]], below[order[1::2]] = order[1::2], order[0::2]
    points = np.stack([columns + block.left, rows + block.top], axis=1)
    lines = [points[loop] for loop in _loops(below.tolist())]
    return [_simplify(line, tolerance) for line in lines] if tolerance > 0 else lines


def _loops(below: list[int]) -> list[list[int]]:
    """Follow edges, in turn along a row and down a column, until each corner is in a loop."""
    seen = bytearray(len(below))
    loops = []
    for start in range(len(below)):
        loop: list[int] = []
        corner = start
        while not seen[corner]:
            beside = corner ^ 1
            seen[corner] = seen[beside] = 1
            loop += [corner, beside]
            corner = below[beside]
        if loop:
            loops.append(loop)
    return loops


def _simplify(line: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave corners out of a closed line that lie nearer than ``tolerance`` to it without them (Douglas, Peucker)."""
    far = int(np.square(line - line[0]).sum(axis=1).argmax())
    closed = np.concatenate([line, line[:1]]).astype(np.float64)
    kept = np.zeros(len(line), dtype=bool)
    kept[[0, far]] = True
    parts = [(0, far), (far, len(line))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        between = closed[first + 1 : last] - closed[first]
        x, y = closed[last] - closed[first]
        length = float(np.hypot(x, y))
        off = np.abs(between[:, 0] * y - between[:, 1] * x) / length if length else np.hypot(*between.T)
        worst = int(off.argmax())
        if off[worst] > tolerance:
            middle = first + 1 + worst
            kept[middle] = True
            parts += [(first, middle), (middle, last)]
    return line[kept]
