"""A batch in one piece of memory, and back into what torchvision's models take.

A batch crosses the process border as one uint8 buffer (all images and mask blocks), in shared memory that is used
again, and small numpy arrays; every tensor on its own would cost a shared-memory segment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loading.samples import Sample
from loading.shared_memory import SharedSlots
from pixels.geometry import Placement
from pixels.lazy_image import finish_masks, finish_pixels

Targets = list[dict[str, Any]]

# Masks of the source's size, before the device resizes them, take so many bytes at a time: 100 objects on 12 megapixels
# would take 1.2 GB.
MAX_MASK_BYTES = 64 << 20


@dataclass
class PackedBatch:
    """A batch in one piece of memory.

    Attributes:
        buffer: uint8, all images [h, w, 3] and then all mask blocks [h, w] one after another.
        image_sizes: (h, w) of every image in ``buffer``.
        placements: What is left to do with each image on the device, or None.
        targets: As `Sample.target`, of numpy arrays.
        blocks: Per image int64 [N, 4] as (left, top, h, w) of its mask blocks, or None.
    """

    buffer: Tensor
    image_sizes: list[tuple[int, int]]
    placements: list[Placement | None]
    targets: list[dict[str, np.ndarray | int]]
    blocks: list[np.ndarray] | None

    def pin_memory(self) -> "PackedBatch":
        """Move the buffer to page-locked memory; the DataLoader calls this."""
        self.buffer = self.buffer.pin_memory()
        return self


def allocate(num_bytes: int) -> Tensor:
    """Return a new buffer, uint8 [num_bytes]."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def collate_fn(samples: list[Sample], allocate: Callable[[int], Tensor] = allocate) -> PackedBatch:
    """Pack samples into one buffer of ``allocate``."""
    parts = [sample.pixels for sample in samples]
    blocks = None
    if samples[0].blocks is not None:
        blocks = []
        for sample in samples:
            assert sample.blocks is not None
            rows = [(block.left, block.top, *block.pixels.shape) for block in sample.blocks]
            blocks.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
            parts.extend(block.pixels for block in sample.blocks)
    buffer = allocate(sum(part.size for part in parts))
    packed, start = buffer.numpy(), 0
    for part in parts:
        packed[start : start + part.size].reshape(part.shape)[...] = part
        start += part.size
    sizes = [sample.pixels.shape[:2] for sample in samples]
    placements = [sample.placement for sample in samples]
    return PackedBatch(buffer, sizes, placements, [sample.target for sample in samples], blocks)


class SharedCollate:
    """Collates in a worker, into shared memory.

    Args:
        collate: `collate_fn`, or one that mixes samples first; takes samples and an allocator.
        slots: Where buffers go.
    """

    def __init__(self, collate: Callable[..., PackedBatch], slots: SharedSlots) -> None:
        self.collate, self.slots = collate, slots

    def __call__(self, samples: list[Sample]) -> PackedBatch:
        """Pack samples; in the main process the batch arrives with a tensor again."""
        batch = self.collate(samples, self.slots.take)
        batch.buffer = self.slots.address(batch.buffer)  # type: ignore[assignment]
        return batch


def unpack(batch: PackedBatch, device: torch.device) -> tuple[list[Tensor], Targets]:
    """Turn a packed batch into what torchvision's detectors take, on ``device``.

    Returns:
        Images, float32 [3, H, W] in 0..1, and one dict per image: ``image_id`` (int) and the tensors of
        `Sample.target`, with ``masks`` uint8 [N, H, W] where the samples have blocks.
    """
    beside = device.type != "mps"  # MPS does not order such copies
    buffer = batch.buffer.to(device, non_blocking=beside)
    images: list[Tensor] = []
    start = 0
    for (height, width), placement in zip(batch.image_sizes, batch.placements):
        size = height * width * 3
        pixels = buffer[start : start + size].view(height, width, 3).permute(2, 0, 1)
        # v2's to_dtype multiplies by 1 / 255 as well; dividing differs in the last bit.
        image = pixels.contiguous().to(torch.float32).mul_(1 / 255)
        images.append(image if placement is None else finish_pixels(image, placement))
        start += size

    targets: Targets = []
    for i, arrays in enumerate(batch.targets):
        target: dict[str, Any] = {
            name: value if isinstance(value, int) else torch.from_numpy(value).to(device, non_blocking=beside)
            for name, value in arrays.items()
        }
        if batch.blocks is not None:
            rows = batch.blocks[i].tolist()
            target["masks"] = _unpack_masks(buffer[start:], rows, batch.image_sizes[i], batch.placements[i])
            start += sum(height * width for _, _, height, width in rows)
        targets.append(target)
    return images, targets


def _unpack_masks(buffer: Tensor, rows: list[list[int]], size: tuple[int, int], placement: Placement | None) -> Tensor:
    """Return the masks of one image on its canvas, uint8 [N, H, W], on the buffer's device.

    Where the device resizes them, masks of the source's size exist for a few objects at a time only.

    Args:
        buffer: uint8, begins with the pixels of the mask blocks.
        rows: (left, top, h, w) of each block.
        size: (h, w) of the image in the batch.
        placement: What is left to do with it.
    """
    if placement is None:
        return _paste_blocks(buffer, rows, size)
    at_once = max(1, MAX_MASK_BYTES // (size[0] * size[1]))
    if len(rows) <= at_once:
        return finish_masks(_paste_blocks(buffer, rows, size), placement)
    masks, start = buffer.new_empty((len(rows), placement.height, placement.width)), 0
    for first in range(0, len(rows), at_once):
        piece = rows[first : first + at_once]
        masks[first : first + at_once] = finish_masks(_paste_blocks(buffer[start:], piece, size), placement)
        start += sum(height * width for _, _, height, width in piece)
    return masks


def _paste_blocks(buffer: Tensor, rows: list[list[int]], size: tuple[int, int]) -> Tensor:
    """Return the masks of the blocks that ``buffer`` begins with, uint8 [N, *size]; arguments as `_unpack_masks`."""
    masks, start = buffer.new_zeros((len(rows), *size)), 0
    for mask, (left, top, height, width) in zip(masks, rows):
        block = buffer[start : start + height * width].view(height, width)
        mask[top : top + height, left : left + width] = block
        start += height * width
    return masks
