"""Batches travel in one piece of shared memory: nothing is overwritten, lost, or left open."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from coco_utils import read_coco
from group_by_aspect_ratio import EvalBatchSampler
from helpers.coded import coded_dataset, without_colours
from helpers.drawn import draw_coco
from loading.collate import SharedCollate, collate_fn, unpack
from loading.loaders import DeviceLoader
from loading.samples import DetectionDataset, ImageFolder
from loading.shared_memory import SharedSlots
from loading.splits import label_map_for

CPU = torch.device("cpu")


class Numbers(torch.utils.data.Dataset):
    """Batch n is ten thousand times the number n."""

    def __init__(self, count=40):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


class IntoSlot:
    def __init__(self, slots, size=10_000):
        self.slots, self.size = slots, size

    def __call__(self, indices):
        buffer = self.slots.take(self.size)
        buffer.fill_(indices[0])
        return self.slots.address(buffer)


def loader_of(slots, method="fork", **options):
    return DataLoader(
        Numbers(),
        batch_size=1,
        num_workers=2,
        collate_fn=IntoSlot(slots, **options),
        multiprocessing_context=method,
        persistent_workers=True,
    )


def is_in_slots(tensor, slots):
    return 0 <= tensor.data_ptr() - slots.memory.data_ptr() < slots.memory.numel()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_batches_arrive_whole_from_forked_and_spawned_workers(method):
    slots = SharedSlots(2, 4, slot_bytes=1 << 16)
    loader = loader_of(slots, method)
    for _ in range(2):
        for expected, buffer in enumerate(loader):
            assert (buffer == expected).all() and is_in_slots(buffer, slots)
    del buffer
    assert not slots.is_taken.any()


def test_a_batch_that_is_kept_is_not_overwritten():
    slots = SharedSlots(2, 3, slot_bytes=1 << 16)
    kept = list(loader_of(slots))  # more batches than slots: the rest travels on its own
    assert all((buffer == n).all() for n, buffer in enumerate(kept))
    assert any(is_in_slots(b, slots) for b in kept) and not all(is_in_slots(b, slots) for b in kept)


def test_a_pass_that_is_given_up_leaves_no_slot_taken():
    slots = SharedSlots(2, 4, slot_bytes=1 << 16)
    loader = loader_of(slots)
    for _ in range(5):
        for n, _buffer in enumerate(loader):
            if n == 3:
                break
    assert all(is_in_slots(buffer, slots) for buffer in loader)
    del _buffer
    assert not slots.is_taken.any()


def test_a_batch_larger_than_a_slot_travels_on_its_own():
    slots = SharedSlots(2, 4, slot_bytes=1 << 12)
    for expected, buffer in enumerate(loader_of(slots)):
        assert (buffer == expected).all() and not is_in_slots(buffer, slots)


def test_in_the_main_process_memory_is_ordinary():
    slots = SharedSlots(1, 2, slot_bytes=1 << 12)
    collate = SharedCollate(collate_fn, slots)
    samples = [coded_dataset(without_colours("hflip"))[0, 0]]
    (image,), _ = unpack(collate(samples), CPU)
    (expected,), _ = unpack(collate_fn(samples), CPU)
    assert torch.equal(image, expected) and not slots.is_taken.any()


def test_sixteen_workers_cost_no_segment_and_no_descriptor_per_batch(tmp_path):
    """Open files and shared segments while batches are under way are those from before them."""
    root = draw_coco(tmp_path, num_images=12)
    annotations = read_coco(root / "annotations" / "instances_train2017.json")
    dataset = DetectionDataset(
        annotations, ImageFolder(root / "train2017"), label_map_for(annotations), needs_masks=True, seed=0
    )

    class Repeated(EvalBatchSampler):
        def __iter__(self):
            for _ in range(16):
                yield from super().__iter__()

        def __len__(self):
            return 16 * super().__len__()

    def open_files():
        """Descriptors and mapped segments of this process: /dev/shm itself is shared with every other test."""
        segments = Path("/proc/self/maps").read_text().count("/dev/shm/")
        return len(list(Path("/proc/self/fd").iterdir())), segments

    loader = DeviceLoader(dataset, Repeated(len(dataset), batch_size=2), workers=16, device=CPU)
    batches = iter(loader.loader)
    held = [next(batches)]
    files, segments = open_files()
    held += [next(batches) for _ in range(30)]
    assert open_files() == (files, segments)
    assert all(isinstance(batch.buffer, torch.Tensor) for batch in held)
    expected = np.concatenate([collate_fn([dataset[0, i] for i in (0, 1)]).buffer.numpy()])
    assert (held[0].buffer.numpy() == expected).all()
