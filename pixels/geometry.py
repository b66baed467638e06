"""Which part of a source image a canvas shows, how large, where, mirrored or not; the two forms of boxes.

A `View` is changed by transforms; a `Placement` is the same in whole pixels and moves boxes, keypoints and masks. Both
are plain arithmetic; `lazy_image` moves the pixels.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pixels.masks import MaskBlock


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Return [x, y, width, height] as corners [x1, y1, x2, y2]: a new array [..., 4] of the same dtype."""
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Return corners [x1, y1, x2, y2] as [x, y, width, height]: a new array [..., 4] of the same dtype."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


@dataclass(frozen=True)
class View:
    """How a canvas shows a source image: ``canvas = scale * source + offset``, then mirrored if ``flipped``.

    Attributes:
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.
        scale_x: Canvas pixels per source pixel.
        scale_y: Canvas pixels per source pixel.
        offset_x: Canvas position of the source's left edge, before mirroring.
        offset_y: Canvas position of the source's top edge.
        visible: (left, top, right, bottom) of the part that is shown, in source pixels.
        flipped: Whether the canvas is mirrored left to right.
        fill: RGB in 0..255 of the canvas around the source.
        antialias: Whether shrinking averages over source pixels.
        colour_ops: (name, value) of colour changes, in order.
    """

    height: int
    width: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    visible: tuple[float, float, float, float]
    flipped: bool = False
    fill: tuple[float, ...] = (0, 0, 0)
    antialias: bool = True
    colour_ops: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, height: int, width: int) -> "View":
        """Return the view that shows a source of this size as it is."""
        return cls(height, width, 1.0, 1.0, 0.0, 0.0, (0.0, 0.0, float(width), float(height)))

    @property
    def shows_nothing(self) -> bool:
        """Whether the source lies outside the canvas, up to rounding errors."""
        x1, y1, x2, y2 = self.visible
        return min((x2 - x1) * self.scale_x, (y2 - y1) * self.scale_y) < 1e-6

    def flip(self) -> "View":
        """Mirror left to right."""
        return replace(self, flipped=not self.flipped)

    def crop(self, top: float, left: float, height: int, width: int) -> "View":
        """Show the given part of this canvas; it may reach over the edges, which show the fill colour."""
        if self.flipped:
            left = self.width - left - width
        offset_x, offset_y = self.offset_x - left, self.offset_y - top
        x1, y1, x2, y2 = self.visible
        visible = (
            max(x1, -offset_x / self.scale_x),
            max(y1, -offset_y / self.scale_y),
            min(x2, (width - offset_x) / self.scale_x),
            min(y2, (height - offset_y) / self.scale_y),
        )
        return replace(self, height=height, width=width, offset_x=offset_x, offset_y=offset_y, visible=visible)

    def resize(self, height: int, width: int, antialias: bool) -> "View":
        """Scale this canvas to the given size."""
        x, y = width / self.width, height / self.height
        return replace(
            self,
            height=height,
            width=width,
            scale_x=self.scale_x * x,
            scale_y=self.scale_y * y,
            offset_x=self.offset_x * x,
            offset_y=self.offset_y * y,
            antialias=antialias,
        )

    def pad(self, left: int, top: int, right: int, bottom: int, fill: tuple[float, ...]) -> "View":
        """Enlarge this canvas by pixels of the fill colour."""
        if self.flipped:
            left, right = right, left
        return replace(
            self,
            height=self.height + top + bottom,
            width=self.width + left + right,
            offset_x=self.offset_x + left,
            offset_y=self.offset_y + top,
            fill=fill,
        )

    def recolour(self, name: str, value: Any) -> "View":
        """Note down a colour change."""
        return replace(self, colour_ops=(*self.colour_ops, (name, value)))

    def place(self) -> "Placement":
        """Round the visible part to whole source pixels and its place to whole canvas pixels.

        Views made of crops, flips and pads, or of one resize, are whole already. A crop after a resize or a
        resize after a pad moves its edges by half a pixel at the most; boxes, keypoints and masks use the
        rounded figures too, so they stay exactly on the pixels.
        """
        x1, y1, x2, y2 = self.visible
        left, right = _round_range(self.scale_x * x1 + self.offset_x, self.scale_x * x2 + self.offset_x, self.width)
        top, bottom = _round_range(self.scale_y * y1 + self.offset_y, self.scale_y * y2 + self.offset_y, self.height)
        (x1, x2), (y1, y2) = _round_range(x1, x2), _round_range(y1, y2)
        return Placement(
            source=(x1, y1, x2, y2),
            target=(left, top, right, bottom),
            height=self.height,
            width=self.width,
            flipped=self.flipped,
            fill=self.fill,
            antialias=self.antialias,
            colour_ops=self.colour_ops,
        )


def _round_range(start: float, end: float, limit: int | None = None) -> tuple[int, int]:
    """Round a range to integers, not empty, inside 0..limit if there is one."""
    first, last = round(start), round(end)
    if limit is not None:
        first, last = max(first, 0), min(last, limit)
        first = min(first, limit - 1)
    elif last == first:  # less than a pixel: the one it lies in
        first = math.floor((start + end) / 2)
    return first, max(last, first + 1)


@dataclass(frozen=True)
class Placement:
    """A `View` in whole pixels: ``source`` is resized to ``target`` on a canvas, then mirrored if ``flipped``.

    Attributes:
        source: (left, top, right, bottom) in source pixels.
        target: (left, top, right, bottom) on the canvas, before mirroring.
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.
        flipped: Whether the canvas is mirrored left to right.
        fill: RGB in 0..255 around ``target``.
        antialias: Whether shrinking averages over source pixels.
        colour_ops: Colour changes of the resized picture, as in `View`.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    height: int
    width: int
    flipped: bool
    fill: tuple[float, ...]
    antialias: bool
    colour_ops: tuple[tuple[str, Any], ...] = ()

    @property
    def source_size(self) -> tuple[int, int]:
        """(height, width) of the part of the source that is shown."""
        return self.source[3] - self.source[1], self.source[2] - self.source[0]

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of that part on the canvas."""
        return self.target[3] - self.target[1], self.target[2] - self.target[0]

    @property
    def shrink(self) -> float:
        """How many source pixels a canvas pixel covers, along the side where that is more."""
        (source_height, source_width), (height, width) = self.source_size, self.target_size
        return max(source_height / height, source_width / width)

    @property
    def fills_canvas(self) -> bool:
        """Whether nothing of the fill colour shows."""
        return self.target == (0, 0, self.width, self.height)

    def move_points(self, points: np.ndarray) -> np.ndarray:
        """Map source positions to the canvas, before mirroring; float [..., 2] as (x, y)."""
        (sx, sy, _, _), (tx, ty, _, _) = self.source, self.target
        (sh, sw), (th, tw) = self.source_size, self.target_size
        ratio = np.array([tw / sw, th / sh], dtype=points.dtype)
        return (points - np.array([sx, sy], dtype=points.dtype)) * ratio + np.array([tx, ty], dtype=points.dtype)

    def move_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes, float [N, 4] xyxy, from the source to the canvas and cut them to what is shown."""
        corners = self.move_points(boxes.reshape(-1, 2, 2))
        corners[..., 0] = corners[..., 0].clip(self.target[0], self.target[2])
        corners[..., 1] = corners[..., 1].clip(self.target[1], self.target[3])
        moved = corners.reshape(-1, 4)
        if self.flipped:
            moved = moved[:, [2, 1, 0, 3]]
            moved[:, [0, 2]] = self.width - moved[:, [0, 2]]
        return moved

    def move_keypoints(self, keypoints: np.ndarray, flip_order: np.ndarray | None) -> np.ndarray:
        """Map keypoints, float [N, K, 3] as (x, y, v), from the source to the canvas.

        A point that leaves the canvas becomes (0, 0, 0). Mirroring takes the pixel x to width - 1 - x, as
        torchvision's v2 does (a keypoint names a pixel; a box edge lies between two), and reorders the points
        by ``flip_order`` so that a left wrist stays a left wrist.

        Args:
            keypoints: v 0 not labelled, 1 hidden, 2 visible.
            flip_order: int [K], which point takes the place of point k in a mirror; needed if flipped.
        """
        moved = keypoints.copy()
        moved[..., :2] = self.move_points(keypoints[..., :2])
        x, y = moved[..., 0], moved[..., 1]
        left, top, right, bottom = self.target
        shown = (keypoints[..., 2] > 0) & (x >= left) & (x < right) & (y >= top) & (y < bottom)
        if self.flipped:
            moved[..., 0] = np.maximum(self.width - 1 - x, 0)
        moved[~shown] = 0
        if self.flipped and moved.shape[1]:
            if flip_order is None:
                raise ValueError("keypoints cannot be mirrored without flip pairs")
            moved = moved[:, flip_order]
        return moved

    def crop_block(self, block: MaskBlock) -> MaskBlock:
        """Cut a mask block of the source to the part that is shown; the result counts from that part's corner."""
        x1, y1, x2, y2 = self.source
        height, width = block.pixels.shape
        left, right = max(block.left, x1), min(block.left + width, x2)
        top, bottom = max(block.top, y1), min(block.top + height, y2)
        if left >= right or top >= bottom:
            return MaskBlock(0, 0, block.pixels[:0, :0])
        rows = slice(top - block.top, bottom - block.top)
        columns = slice(left - block.left, right - block.left)
        return MaskBlock(left - x1, top - y1, block.pixels[rows, columns])

    def resize_block(self, block: MaskBlock) -> MaskBlock:
        """Scale a cropped mask block onto the canvas, nearest neighbour, and mirror it if flipped.

        Equal to resizing the full mask with torch's mode "nearest", which reads row floor(y * ratio), but
        computed only for the rows and columns that fall into the block.
        """
        left, top, pixels = block
        if self.source_size != self.target_size:
            rows, top = _nearest(top, pixels.shape[0], self.source_size[0], self.target_size[0])
            columns, left = _nearest(left, pixels.shape[1], self.source_size[1], self.target_size[1])
            pixels = pixels[rows[:, None], columns]
        left, top = left + self.target[0], top + self.target[1]
        if self.flipped:
            pixels = pixels[:, ::-1]
            left = self.width - left - pixels.shape[1]
        return MaskBlock(left, top, pixels)


def _nearest(start: int, count: int, source_size: int, target_size: int) -> tuple[np.ndarray, int]:
    """Return (indices into a range of ``count`` from ``start`` that target pixels read, first such target pixel)."""
    ratio = np.float32(source_size) / np.float32(target_size)  # torch computes it in float32
    reads = np.minimum((np.arange(target_size, dtype=np.float32) * ratio).astype(np.int64), source_size - 1)
    first, last = np.searchsorted(reads, (start, start + count))
    return reads[first:last] - start, int(first)
