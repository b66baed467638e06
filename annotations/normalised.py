"""Boxes written as shares of the picture (0 to 1) where pixels belong."""

import numpy as np

# A picture of so few pixels has real boxes of that size.
MIN_SIDE = 8

NORMALISED = (
    "boxes look normalised to the picture's size (0 to 1), expected pixels: multiply x and width by the picture's "
    "width, y and height by its height (where x and y are the box's centre, as YOLO writes them, first take half "
    "of width and height off)"
)


def look_normalised(numbers: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Tell which boxes have nothing but shares of 0 to 1, as no box in pixels has.

    Args:
        numbers: float [N, 4], as the file writes them: corners or width and height.
        heights: int [N], of each box's picture.
        widths: int [N].

    Returns:
        bool [N].
    """
    fits = ((numbers >= 0) & (numbers <= 1)).all(axis=1) & (numbers[:, 2:] > 0).all(axis=1)
    return fits & (np.minimum(heights, widths) >= MIN_SIDE)
