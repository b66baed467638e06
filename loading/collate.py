"""A batch in one piece of memory, and back into what torchvision's models take.

A batch crosses the process border as one uint8 buffer, in shared memory that is used again, and goes to the device in
one copy: all images, the masks as the places where they change, and the objects of all images in one block. Every
tensor on its own would cost a shared-memory segment and a copy, and every image on its own some kernels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loading.samples import Sample
from loading.shared_memory import SharedSlots
from models.object_block import BatchTargets, ObjectBlock
from pixels.finish import finish_masks, finish_pictures
from pixels.geometry import Placement
from pixels.masks import mask_edges

Targets = list[dict[str, Any]]

# Masks of the source's size, before the device resizes them, take so many bytes at a time: 100 objects on 12 megapixels
# would take 1.2 GB.
MAX_MASK_BYTES = 64 << 20


@dataclass
class PackedBatch:
    """A batch in one piece of memory.

    Attributes:
        buffer: uint8, all images [h, w, 3] and then all ``fields``, one after another.
        image_sizes: (h, w) of every image in ``buffer``.
        placements: What is left to do with each image on the device, or None.
        image_ids: Id of every image.
        counts: Number of objects of every image; None where the samples have none.
        fields: Type and shape of each array that follows the images, in the order of falling alignment: ``edges`` int64
            [E] of all masks, see `mask_edges`; and those of `ObjectBlock`: ``labels``, ``boxes``, ``keypoints`` and
            ``is_object``.
        edge_counts: Edges of every object's mask, for each image; None where the samples have no masks.
    """

    buffer: Tensor
    image_sizes: list[tuple[int, int]]
    placements: list[Placement | None]
    image_ids: list[int]
    counts: tuple[int, ...] | None = None
    fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    edge_counts: list[list[int]] | None = None

    def pin_memory(self) -> "PackedBatch":
        """Move the buffer to page-locked memory; the DataLoader calls this."""
        self.buffer = self.buffer.pin_memory()
        return self

    def pictures(self, buffer: Tensor) -> list[Tensor]:
        """Return the images [3, h, w] that ``buffer`` begins with, as views; of the batch's or of its values."""
        sizes = [height * width * 3 for height, width in self.image_sizes]
        parts = buffer[: sum(sizes)].split(sizes)
        return [part.view(*size, 3).permute(2, 0, 1) for part, size in zip(parts, self.image_sizes)]


def allocate(num_bytes: int) -> Tensor:
    """Return a new buffer, uint8 [num_bytes]."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def collate_fn(samples: list[Sample], allocate: Callable[[int], Tensor] = allocate) -> PackedBatch:
    """Pack samples into one buffer of ``allocate``."""
    fields: dict[str, np.ndarray] = {}
    counts = edge_counts = None
    if samples[0].blocks is not None:
        found = [mask_edges(sample.blocks or (), *sample.pixels.shape[:2]) for sample in samples]
        fields["edges"] = np.concatenate([edges for edges, _ in found])
        edge_counts = [counts_of_image.tolist() for _, counts_of_image in found]
    if "boxes" in samples[0].target:
        counts = tuple(len(np.asarray(sample.target["boxes"])) for sample in samples)
        fields |= _object_fields(samples, counts)
    arrays = [sample.pixels for sample in samples]
    arrays += [array.reshape(-1).view(np.uint8) for array in fields.values()]
    buffer = allocate(sum(array.size for array in arrays))
    packed, start = buffer.numpy(), 0
    for array in arrays:
        packed[start : start + array.size].reshape(array.shape)[...] = array
        start += array.size
    return PackedBatch(
        buffer,
        [sample.pixels.shape[:2] for sample in samples],
        [sample.placement for sample in samples],
        [int(sample.target["image_id"]) for sample in samples],
        counts,
        {name: (torch.from_numpy(array).dtype, array.shape) for name, array in fields.items()},
        edge_counts,
    )


def _object_fields(samples: list[Sample], counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the fields of the samples' `ObjectBlock`, zeros in the empty places."""
    fields: dict[str, np.ndarray] = {}
    for name in ("labels", "boxes", "keypoints"):
        if name in samples[0].target:
            values = [np.asarray(sample.target[name]) for sample in samples]
            fields[name] = np.zeros((len(samples), max(1, *counts), *values[0].shape[1:]), dtype=values[0].dtype)
            for places, value in zip(fields[name], values):
                places[: len(value)] = value
    fields["is_object"] = np.arange(max(1, *counts)) < np.array(counts)[:, None]
    return fields


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
        `Sample.target`, with ``masks`` uint8 [N, H, W] where the samples have blocks. Where samples have objects, the
        dicts are `BatchTargets`.
    """
    beside = device.type != "mps"  # MPS does not order such copies
    buffer = batch.buffer.to(device, non_blocking=beside)
    num_levels = sum(3 * height * width for height, width in batch.image_sizes)
    # v2's to_dtype multiplies by 1 / 255 as well; dividing differs in the last bit.
    pictures = batch.pictures(buffer[:num_levels].to(torch.float32).mul_(1 / 255))
    images = finish_pictures(pictures, batch.placements)
    targets: Targets = [{"image_id": image_id} for image_id in batch.image_ids]
    if not batch.fields:
        return images, targets
    # A copy, in which every field is aligned: it may outlive the slot in shared memory, and does not keep the pixels.
    fields = _split_fields(buffer[num_levels:].clone(), batch)
    masks = None
    if batch.edge_counts is not None:
        masks, start = [], 0
        for edge_counts, size, placement in zip(batch.edge_counts, batch.image_sizes, batch.placements):
            masks.append(_unpack_masks(fields["edges"][start:], edge_counts, size, placement))
            start += sum(edge_counts)
        for target, of_image in zip(targets, masks):
            target["masks"] = of_image
    if batch.counts is None:
        return images, targets
    objects = ObjectBlock(
        fields["boxes"], fields["labels"], fields["is_object"], batch.counts, fields.get("keypoints"), masks
    )
    for name in fields.keys() & {"boxes", "labels", "keypoints"}:
        for target, values, count in zip(targets, fields[name], batch.counts):
            target[name] = values[:count]
    return images, BatchTargets(targets, objects)


def _split_fields(values: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """Return the fields of a batch as views of ``values``, the bytes behind its images."""
    fields, start = {}, 0
    for name, (dtype, shape) in batch.fields.items():
        end = start + math.prod(shape) * dtype.itemsize
        fields[name] = values[start:end].view(dtype).view(shape)
        start = end
    return fields


def _unpack_masks(edges: Tensor, counts: list[int], size: tuple[int, int], placement: Placement | None) -> Tensor:
    """Return the masks of one image on its canvas, uint8 [N, H, W], on the device of ``edges``.

    Where the device resizes them, masks of the source's size exist for a few objects at a time only.

    Args:
        edges: int64, begins with the edges of the image's masks.
        counts: Edges of each mask.
        size: (h, w) of the image in the batch.
        placement: What is left to do with it.
    """
    if placement is None:
        return _fill_edges(edges[: sum(counts)], len(counts), size)
    at_once = max(1, MAX_MASK_BYTES // (size[0] * size[1]))
    if len(counts) <= at_once:
        return finish_masks(_fill_edges(edges[: sum(counts)], len(counts), size), placement)
    masks = torch.empty((len(counts), placement.height, placement.width), dtype=torch.uint8, device=edges.device)
    start = 0
    for first in range(0, len(counts), at_once):
        piece = counts[first : first + at_once]
        places = edges[start : start + sum(piece)] - first * size[0] * size[1]
        masks[first : first + at_once] = finish_masks(_fill_edges(places, len(piece), size), placement)
        start += sum(piece)
    return masks


def _fill_edges(edges: Tensor, num_masks: int, size: tuple[int, int]) -> Tensor:
    """Return the masks, uint8 [num_masks, *size], that change at ``edges``: 1 after an odd number of them in a row."""
    masks = torch.zeros((num_masks, *size), dtype=torch.uint8, device=edges.device)
    masks.view(-1).index_fill_(0, edges, 1)
    return masks.cumsum_(-1).bitwise_and_(1)  # the sum wraps around at 256, which is even
