"""Large pictures in overlapping tiles: which tiles, and a model run on them as if it took the picture whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.detections import blocks_of_output
from evaluation.postprocess import outputs_on_host
from inference.seams import Pieces, join_pieces

# Smaller tiles show a model next to nothing.
MIN_TILE = 32
# More overlap makes tiles many times the picture: at 0.9 every pixel is looked at a hundred times.
MAX_OVERLAP = 0.9
DEFAULT_OVERLAP = 0.2


@dataclass(frozen=True)
class Tiling:
    """How pictures that are larger than a tile are cut.

    Attributes:
        size: Sides of a tile in pixels.
        overlap: What neighbours share at least, as a share of a tile's side.
        batch_size: Tiles of a picture that the model takes at a time.

    Raises:
        ValueError: A number is out of range.
    """

    size: int
    overlap: float = DEFAULT_OVERLAP
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.size < MIN_TILE:
            raise ValueError(f"tile {self.size}: expected at least {MIN_TILE} pixels")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"overlap {self.overlap}: expected a share from 0 to {MAX_OVERLAP}, such as 0.2")

    @classmethod
    def of_flags(cls, tile: int | None, overlap: float | None, batch_size: int) -> "Tiling | None":
        """Return what ``--tile`` and ``--overlap`` ask for.

        Raises:
            ValueError: They are out of range, or there is an overlap of no tiles.
        """
        if tile is None:
            if overlap is not None:
                raise ValueError("--overlap is what the tiles of --tile PIXELS share: give --tile too, or leave it out")
            return None
        try:
            return cls(tile, DEFAULT_OVERLAP if overlap is None else overlap, batch_size)
        except ValueError as error:
            raise ValueError(f"--{error}") from None

    def to_plain(self) -> dict[str, int | float]:
        """Return what the result depends on, by the flags' names."""
        return {"tile": self.size, "overlap": self.overlap}

    def __str__(self) -> str:
        """Return it in words, for logs."""
        return f"tiles of {self.size} x {self.size} pixels, {self.overlap:.0%} overlap"

    def cuts(self, height: int, width: int) -> bool:
        """Tell whether a picture is larger than a tile."""
        return max(height, width) > self.size

    def windows(self, height: int, width: int) -> np.ndarray:
        """Return the tiles of a picture as x1, y1, x2, y2, int64 [T, 4]: all of one size, evenly spread to its borders.

        The sides are those of a tile, or the picture's where it is narrower.
        """
        starts = [self._starts(length) for length in (height, width)]
        rows = [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in starts[0] for x in starts[1]]
        return np.array(rows, dtype=np.int64)

    def _starts(self, length: int) -> list[int]:
        """Return where tiles begin along one side of a picture."""
        if length <= self.size:
            return [0]
        step = max(1, int(self.size * (1 - self.overlap)))
        count = 1 + -(-(length - self.size) // step)
        return [n * (length - self.size) // (count - 1) for n in range(count)]


def outputs_in_tiles(model: nn.Module, images: Sequence[Tensor], tiling: Tiling | None) -> list[dict[str, Any]]:
    """Run a detector on a batch of pictures, on those that are larger than a tile piece by piece.

    Args:
        model: In evaluation mode; torchvision's outputs, plain or those of `fast_scoring`.
        images: float [3, H, W] in 0..1 each, on the model's device.
        tiling: None cuts nothing.

    Returns:
        Per picture what the model would return, on the CPU. A picture in tiles has no ``masks`` but ``blocks``, a
        `MaskBlock` per object: full masks of large pictures would fill the memory. It may have more objects than the
        model's limit, which holds for each tile.
    """
    cut = [n for n, image in enumerate(images) if tiling is not None and tiling.cuts(*image.shape[-2:])]
    whole = [n for n in range(len(images)) if n not in cut]
    outputs: dict[int, dict[str, Any]] = {}
    if whole:
        outputs |= zip(whole, outputs_on_host(model([images[n] for n in whole])))
    for n in cut:
        assert tiling is not None
        outputs[n] = _output_of_tiles(model, images[n], tiling)
    return [outputs[n] for n in range(len(images))]


def _output_of_tiles(model: nn.Module, image: Tensor, tiling: Tiling) -> dict[str, Any]:
    """Return what is found in one picture that is larger than a tile."""
    windows = tiling.windows(*image.shape[-2:])
    pieces = []
    for start in range(0, len(windows), tiling.batch_size):
        part = windows[start : start + tiling.batch_size]
        for window, output in zip(part, outputs_on_host(model([_crop(image, window) for window in part]))):
            pieces.append(_pieces_of(output, window))
    return _to_output(join_pieces(pieces, windows))


def _crop(image: Tensor, window: np.ndarray) -> Tensor:
    left, top, right, bottom = window.tolist()
    return image[:, top:bottom, left:right].contiguous()


def _pieces_of(output: dict[str, Any], window: np.ndarray) -> Pieces:
    """Return a tile's output in the picture's pixels."""
    left, top = window[:2].tolist()
    boxes = output["boxes"].numpy() + np.array([left, top, left, top], dtype=np.float32)
    masks = None
    if "masks" in output:
        masks = [block._replace(left=block.left + left, top=block.top + top) for block in blocks_of_output(output)]
    keypoints = heats = None
    if "keypoints" in output:
        keypoints = output["keypoints"].numpy() + np.array([left, top, 0], dtype=np.float32)
        if "keypoints_scores" in output:
            heats = output["keypoints_scores"].numpy()
    return Pieces(boxes, output["labels"].numpy(), output["scores"].numpy(), masks, keypoints, heats)


def _to_output(pieces: Pieces) -> dict[str, Any]:
    """Return objects as a model's output."""
    output: dict[str, Any] = {
        "boxes": torch.from_numpy(pieces.boxes),
        "labels": torch.from_numpy(pieces.labels),
        "scores": torch.from_numpy(pieces.scores),
    }
    if pieces.masks is not None:
        output["blocks"] = pieces.masks
    if pieces.keypoints is not None:
        output["keypoints"] = torch.from_numpy(pieces.keypoints)
    return output
