"""A batch arrives in a few pieces of memory, after few operations, with what picture by picture would have given."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.coded import coded_dataset
from loading.collate import collate_fn, unpack
from loading.samples import Sample
from models.object_block import BatchTargets, objects_of
from pixels.colours import LUMA
from pixels.masks import MaskBlock, paste_blocks
from presets import PRESETS, build_transforms

CPU = torch.device("cpu")


def recolour(planes, ops):
    """Apply colour changes to one picture, float [3, H, W] of whole levels."""
    brightness = 1.0
    for name, value in ops:
        if name == "brightness":
            planes.mul_(value).clamp_(max=255).floor_()
            brightness *= value
        elif name == "contrast":
            factor, mean = value
            planes.mul_(factor).add_((1 - factor) * min(mean * brightness, 255)).clamp_(0, 255).floor_()
        elif name == "saturation":
            grey = (planes[0] * LUMA[0] + planes[1] * LUMA[1] + planes[2] * LUMA[2]).floor_()
            planes.mul_(value).add_(grey, alpha=1 - value).clamp_(0, 255).floor_()
        elif name == "hue":
            shift_hue(planes, value)
            planes.mul_(255.999 / 255).floor_()
        elif name == "permute":
            planes = torch.stack([planes[c] for c in value])
        else:
            raise ValueError(f"unknown colour change {name!r}")
    return planes


def shift_hue(planes, shift):
    """Turn the hue of one picture by part of a circle."""
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1e-6)
    is_largest = torch.empty_like(value)
    hue = ((red - green) / divisor).add_(4)
    hue.lerp_(((blue - red) / divisor).add_(2), torch.eq(value, green, out=is_largest))
    hue.lerp_((green - blue) / divisor, torch.eq(value, red, out=is_largest))
    hue.add_(6 * shift)
    for plane, n in zip(planes, (5, 3, 1)):
        k = hue + n
        k.sub_((k / 6).floor_(), alpha=6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, k, chroma, value=-1, out=plane)


def finish(image, placement):
    """What is left to do with one picture, step by step."""
    if placement.target_size != placement.source_size:
        size = placement.target_size
        image = nnf.interpolate(image[None], size=size, mode="bilinear", antialias=placement.antialias)[0]
    if placement.colour_ops:
        image = recolour(image.mul(255).round_(), placement.colour_ops).mul_(1 / 255)
    left, top, right, bottom = placement.target
    canvas = (torch.tensor(placement.fill) / 255)[:, None, None].repeat(1, placement.height, placement.width)
    canvas[:, top:bottom, left:right] = image
    return canvas.flip(-1) if placement.flipped else canvas


def finish_mask(masks, placement):
    if placement.target_size != placement.source_size and len(masks):
        masks = nnf.interpolate(masks[:, None], size=placement.target_size, mode="nearest")[:, 0]
    left, top, right, bottom = placement.target
    canvas = masks.new_zeros((len(masks), placement.height, placement.width))
    if len(masks):
        canvas[:, top:bottom, left:right] = masks
    return canvas.flip(-1) if placement.flipped else canvas


def one_by_one(sample):
    """Return image and target of one sample, each array a tensor of its own."""
    image = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1).contiguous().to(torch.float32).mul_(1 / 255)
    target = {name: v if isinstance(v, int) else torch.from_numpy(v.copy()) for name, v in sample.target.items()}
    if sample.blocks is not None:
        target["masks"] = torch.from_numpy(paste_blocks(sample.blocks, *sample.pixels.shape[:2]))
    if sample.placement is not None:
        image = finish(image, sample.placement)
        if sample.blocks is not None:
            target["masks"] = finish_mask(target["masks"], sample.placement)
    return image, target


def without_objects(sample):
    target = {k: v if isinstance(v, int) else v[:0] for k, v in sample.target.items()}
    return Sample(sample.pixels, sample.placement, target, [])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_what_picture_by_picture_gives(preset, on_device):
    fixed = (60, 60) if preset.startswith("ssd") else None
    transforms = build_transforms(preset, min_size=160, max_size=400, fixed_size=fixed)
    dataset = coded_dataset(transforms, resize_on_device=on_device)
    placed = flipped = recoloured = 0
    for epoch in range(6):
        samples = [dataset[epoch, i % 3] for i in range(5)]
        samples[1] = without_objects(samples[1])
        placed += sum(sample.placement is not None for sample in samples)
        flipped += sum(sample.placement is not None and sample.placement.flipped for sample in samples)
        recoloured += sum(sample.placement is not None and bool(sample.placement.colour_ops) for sample in samples)
        images, targets = unpack(collate_fn(samples), CPU)
        for image, target, sample in zip(images, targets, samples, strict=True):
            expected, expected_target = one_by_one(sample)
            assert torch.equal(image, expected) and image.dtype == torch.float32
            assert target.keys() == expected_target.keys() == {"image_id", "boxes", "labels", "keypoints", "masks"}
            for name, value in expected_target.items():
                if name == "image_id":
                    assert target[name] == value
                else:
                    assert torch.equal(target[name], value) and target[name].dtype == value.dtype
    assert (placed > 0) == (flipped > 0) == on_device
    assert (recoloured > 0) == (on_device and preset == "ssd")


def test_objects_arrive_in_one_block_of_which_the_targets_are_views():
    dataset = coded_dataset(None)
    samples = [dataset[0, 0], without_objects(dataset[0, 1]), dataset[0, 2]]
    for name in ("boxes", "labels", "keypoints"):
        samples[0].target[name] = samples[0].target[name][:3]
    samples[0].blocks = samples[0].blocks[:3]
    _, targets = unpack(collate_fn(samples), CPU)
    assert isinstance(targets, BatchTargets)
    block, expected = objects_of(targets), objects_of(list(targets))
    assert block is targets.objects and block.counts == expected.counts == (3, 0, 5)
    for name in ("boxes", "labels", "keypoints", "is_object"):
        assert torch.equal(getattr(block, name), getattr(expected, name)), name
        assert getattr(block, name).dtype == getattr(expected, name).dtype
    assert all(a is b["masks"] for a, b in zip(block.masks, targets))
    memory = block.boxes.untyped_storage().data_ptr()
    pieces = [block.labels, block.is_object, block.keypoints]
    pieces += [target[name] for target in targets for name in ("boxes", "labels", "keypoints")]
    assert all(piece.untyped_storage().data_ptr() == memory for piece in pieces)


def test_a_batch_without_objects_has_one_empty_place():
    dataset = coded_dataset(None)
    _, targets = unpack(collate_fn([without_objects(dataset[0, i]) for i in range(2)]), CPU)
    block = targets.objects
    assert block.boxes.shape == (2, 1, 4) and block.keypoints.shape == (2, 1, 4, 3) and block.counts == (0, 0)
    assert not block.is_object.any() and not block.boxes.any() and not block.labels.any()


def test_samples_without_objects_give_image_ids_alone():
    pixels = np.zeros((4, 6, 3), np.uint8)
    images, targets = unpack(collate_fn([Sample(pixels, None, {"image_id": n}) for n in (7, 8)]), CPU)
    assert targets == [{"image_id": 7}, {"image_id": 8}] and not isinstance(targets, BatchTargets)
    assert [image.shape for image in images] == [(3, 4, 6)] * 2


@pytest.mark.parametrize("left", [0, 3, 5])
def test_masks_that_touch_the_borders_of_their_canvas_end_there(left):
    """A run up to the right edge must not go on in the next row, nor into the next mask."""
    rng = np.random.default_rng(left)
    blocks = [MaskBlock(left, 0, rng.integers(0, 2, (7, 8 - left), dtype=np.uint8)) for _ in range(4)]
    blocks += [MaskBlock(left, 2, np.ones((5, 8 - left), np.uint8)), MaskBlock(0, 0, np.ones((7, 8), np.uint8))]
    blocks += [MaskBlock(0, 0, np.zeros((0, 0), np.uint8)), MaskBlock(1, 1, np.ones((2, 3), np.uint8))]
    sample = Sample(np.zeros((7, 8, 3), np.uint8), None, {"image_id": 0}, blocks)
    _, (target, _) = unpack(collate_fn([sample, sample]), CPU)
    assert torch.equal(target["masks"], torch.from_numpy(paste_blocks(blocks, 7, 8)))


def test_rows_with_hundreds_of_edges_are_filled_right():
    """The number of edges up to a pixel is counted in eight bits."""
    row = np.arange(700) % 2
    blocks = [MaskBlock(3, 1, np.stack([row, 1 - row]).astype(np.uint8))]
    sample = Sample(np.zeros((4, 710, 3), np.uint8), None, {"image_id": 0}, blocks)
    _, (target,) = unpack(collate_fn([sample]), CPU)
    assert torch.equal(target["masks"], torch.from_numpy(paste_blocks(blocks, 4, 710)))


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(samples):
    batch = collate_fn(samples)
    with Operations() as operations:
        unpack(batch, CPU)
    return operations.count


def test_pictures_and_objects_of_any_batch_take_three_operations_and_masks_four_a_picture():
    dataset = coded_dataset(None)
    for count in (1, 2, 7):
        samples = [dataset[0, i % 3] for i in range(count)]
        assert operations(samples) == 3 + 4 * count
        assert operations([Sample(s.pixels, None, s.target) for s in samples]) == 3


def test_a_further_recoloured_picture_takes_few_operations():
    """A resize, a copy, a place on the canvas, and what depends on its own numbers: the rest is shared."""
    dataset = coded_dataset(build_transforms("ssd", fixed_size=(60, 60)), resize_on_device=True)
    samples = [dataset[epoch, 0] for epoch in range(60)]
    for sample in samples:
        sample.blocks = None
    most = max(samples, key=lambda sample: len(sample.placement.colour_ops))
    assert len(most.placement.colour_ops) == 5
    assert operations([most] * 8) - operations([most] * 2) <= 6 * 10
    mixed = operations(samples[:4])
    assert operations(samples[:8]) - mixed <= 4 * 20  # not all that one needs is shared


def test_what_is_unpacked_shares_no_memory_with_the_batch():
    """The batch lies in a slot of shared memory, which is used again."""
    dataset = coded_dataset(None)
    batch = collate_fn([dataset[i] for i in range(3)])
    images, targets = unpack(batch, CPU)
    batch.buffer.fill_(77)
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        expected_image, expected_target = one_by_one(dataset[i])
        assert torch.equal(image, expected_image)
        assert all(torch.equal(target[k], expected_target[k]) for k in ("boxes", "labels", "keypoints", "masks"))
