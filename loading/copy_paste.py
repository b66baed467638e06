"""Simple Copy-Paste (https://arxiv.org/abs/2012.07177): objects of one image pasted onto its neighbour in the batch."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from loading.collate import PackedBatch, allocate, collate_fn
from loading.samples import Sample
from pixels.masks import MaskBlock, block_from_mask, paste_blocks
from utils import derive_seed

# Standard deviation in pixels of the Gaussian that softens the border of a pasted object.
BLEND_SIGMA = 2.0


class CopyPaste:
    """Collates samples after pasting objects of sample i - 1 onto sample i; the first takes from the last.

    What is pasted is a function of (seed, the batch's samples). Samples need masks and finished pixels.

    Args:
        seed: The run's random seed; it chooses the objects that are pasted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, samples: list[Sample], allocate: Callable[[int], Tensor] = allocate) -> PackedBatch:
        """Mix and pack a batch into a buffer of ``allocate``."""
        ids = [sample.target["image_id"] for sample in samples]
        # The neighbours' crops differ between epochs, and with them the seed.
        crops = [sample.pixels.shape for sample in samples]
        rng = np.random.default_rng(derive_seed(self.seed, "copy-paste", repr(ids), repr(crops)))
        mixed = [paste_objects(sample, samples[i - 1], rng) for i, sample in enumerate(samples)]
        return collate_fn(mixed, allocate)


def paste_objects(onto: Sample, source: Sample, rng: np.random.Generator) -> Sample:
    """Return ``onto`` with some of ``source``'s objects pasted over it.

    As many objects are drawn, with replacement, as the source has. The pasted pixels blend into the picture
    over a soft border, alpha * source + (1 - alpha) * picture, with alpha the blurred mask; masks stay hard. Objects
    that lose all their pixels are dropped, and boxes of those that lose some are drawn in to what is left.

    Args:
        onto: Changed nowhere; a new sample is returned.
        source: Its picture is resized to that of ``onto``.
        rng: Draws the objects.
    """
    assert onto.blocks is not None and source.blocks is not None
    num_objects = len(source.blocks)
    if num_objects == 0:
        return onto
    chosen = np.unique(rng.integers(0, num_objects, num_objects))
    height, width = onto.pixels.shape[:2]
    masks, pixels, boxes = _resized(source, chosen, height, width)
    has_pixels = masks.any(axis=(1, 2))
    chosen, masks, boxes = chosen[has_pixels], masks[has_pixels], boxes[has_pixels]
    if not len(chosen):
        return onto

    paste = np.logical_or.reduce(masks, axis=0)
    soft = Image.fromarray(paste.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(BLEND_SIGMA))
    alpha = np.asarray(soft, dtype=np.float32)[:, :, None] / 255
    blended = alpha * pixels + (1 - alpha) * onto.pixels

    blocks, kept, old_boxes = [], [], []
    target_boxes = np.asarray(onto.target["boxes"])
    for n, block in enumerate(onto.blocks):
        under = paste[block.top : block.top + block.pixels.shape[0], block.left : block.left + block.pixels.shape[1]]
        rest = np.where(under, 0, block.pixels).astype(np.uint8)
        if not rest.any():
            continue
        kept.append(n)
        blocks.append(MaskBlock(block.left, block.top, rest))
        covered = np.count_nonzero(rest) < np.count_nonzero(block.pixels)
        old_boxes.append(_box_of(blocks[-1]) if covered else target_boxes[n])
    target = {
        "image_id": onto.target["image_id"],
        "boxes": np.concatenate([np.array(old_boxes, dtype=np.float32).reshape(-1, 4), boxes]),
        "labels": np.concatenate(
            [np.asarray(onto.target["labels"])[kept], np.asarray(source.target["labels"])[chosen]]
        ),
    }
    blocks += [block_from_mask(mask) for mask in masks]
    return replace(onto, pixels=blended.round().astype(np.uint8), target=target, blocks=blocks)


def _resized(source: Sample, chosen: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (masks uint8 [N, H, W], pixels [H, W, 3], boxes float32 [N, 4]) of some objects at another size."""
    assert source.blocks is not None
    old_height, old_width = source.pixels.shape[:2]
    masks = paste_blocks([source.blocks[n] for n in chosen], old_height, old_width)
    boxes = np.asarray(source.target["boxes"])[chosen]
    if (old_height, old_width) == (height, width):
        return masks, source.pixels, boxes
    pixels = np.asarray(
        Image.fromarray(np.ascontiguousarray(source.pixels)).resize((width, height), Image.Resampling.BILINEAR)
    )
    resized = torch.nn.functional.interpolate(torch.from_numpy(masks)[:, None], size=(height, width), mode="nearest")
    ratio = np.array([width / old_width, height / old_height] * 2, dtype=np.float32)
    return resized[:, 0].numpy(), pixels, boxes * ratio


def _box_of(block: MaskBlock) -> np.ndarray:
    """Return the xyxy box around a block's pixels; the last pixel's far edge included."""
    tight = block_from_mask(block.pixels)
    left, top = block.left + tight.left, block.top + tight.top
    return np.array([left, top, left + tight.pixels.shape[1], top + tight.pixels.shape[0]], dtype=np.float32)
