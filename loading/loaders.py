"""DataLoaders for training and evaluation, and the way of their batches onto the device."""

import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from group_by_aspect_ratio import EvalBatchSampler, GroupedBatchSampler, format_groups
from loading.collate import PackedBatch, SharedCollate, Targets, collate_fn, unpack
from loading.copy_paste import CopyPaste
from loading.repeats import find_repeats
from loading.samples import DetectionDataset
from loading.shared_memory import SLOT_BYTES, SharedSlots
from loading.splits import Data
from loading.trainable import count_trainable
from loading.training_images import training_indices
from models.architectures import ModelSpec
from presets import PRESETS, build_transforms
from runtime.machine import HangWatch, check_shared_memory
from runtime.signals import leave_stopping_to_parent
from utils import Distributed

logger = logging.getLogger(__name__)

# A worker that delivers nothing for so long is stuck, on a dead network disk for example.
WORKER_TIMEOUT_SECONDS = 300

# Batches that a worker makes ahead, and as many more as the main process may hold of it at once.
PREFETCH_FACTOR, HELD_BATCHES = 2, 2


class DeviceLoader:
    """Iterates a DataLoader of packed batches and yields (images, targets) on the device.

    On CUDA a batch is copied and unpacked on a stream of its own, while the device still works off the step before.

    Args:
        dataset: What to load.
        batch_sampler: Yields lists of items of the dataset.
        workers: Worker processes; 0 loads in this one.
        device: Where batches go.
        collate: `collate_fn`, or one that mixes samples first.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_sampler: Sampler[list[tuple[int, int]]] | Sampler[list[tuple[int, ...]]],
        *,
        workers: int,
        device: torch.device,
        collate: Callable[..., PackedBatch] = collate_fn,
    ) -> None:
        self.dataset, self.batch_sampler, self.device = dataset, batch_sampler, device
        self.collate = collate
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if workers and hasattr(os, "memfd_create"):  # Linux
            collate = SharedCollate(collate, SharedSlots(workers, PREFETCH_FACTOR + HELD_BATCHES))
        self.loader = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
            # Workers draw nothing from torch's global generator, nor does the loader when it starts them.
            generator=torch.Generator(),
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Targets]]:
        """Yield batches on the device."""
        if self.stream is None:
            for batch in self._watched():
                yield unpack(batch, self.device)
            return
        for batch in self._watched():
            with torch.cuda.stream(self.stream):  # runs beside what the previous step has left in the queue
                images, targets = unpack(batch, self.device)
            torch.cuda.current_stream().wait_stream(self.stream)
            self._hand_over(images, targets)
            yield images, targets

    def _watched(self) -> Iterator[PackedBatch]:
        """Yield packed batches; a process that does not come back for the next one is ended."""
        watch = HangWatch()
        try:
            for batch in self.loader:
                watch.alive()
                yield batch
        finally:
            watch.end()

    def _hand_over(self, images: list[Tensor], targets: Targets) -> None:
        """Tell the allocator that memory that was filled on the copy stream is now used on the current one."""
        stream = torch.cuda.current_stream()
        values = [value for target in targets for value in target.values() if isinstance(value, Tensor)]
        # Most are views of a few pieces of memory.
        for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in [*images, *values]}.values():
            tensor.record_stream(stream)


def _start_worker(worker_id: int) -> None:
    """One thread per worker: there are as many workers as the user wants threads."""
    leave_stopping_to_parent()
    torch.set_num_threads(1)


def _build_train_dataset(
    data: Data, spec: ModelSpec, *, seed: int, augmentation: str, keep_negatives: bool, resize_on_device: bool
) -> DetectionDataset:
    """Return the images to train on, augmented for a model; the arguments are those of `build_train_loader`."""
    assert data.train is not None
    task = spec.architecture.task
    transforms = build_transforms(
        augmentation,
        hflip_prob=0.5 if task != "keypoint" or data.flip_order is not None else 0.0,
        min_size=max(spec.min_size) if spec.min_size else spec.architecture.min_size,
        max_size=spec.max_size or spec.architecture.max_size,
        fixed_size=spec.architecture.fixed_size,
    )
    indices = training_indices(data.train, keep_negatives=keep_negatives, needs_keypoints=task == "keypoint")
    trainable = count_trainable(data.train, data.label_map, spec, indices)
    text = "training on %d of %d images of %s; objects: %s"
    logger.info(text, len(indices), data.train.num_images, data.train.name, trainable.format_counts())
    trainable.check()
    return DetectionDataset(
        data.train.annotations,
        data.train.images,
        data.label_map,
        indices=indices,
        transforms=transforms,
        needs_masks=task == "mask",
        needs_keypoints=task == "keypoint",
        flip_order=data.flip_order,
        seed=seed,
        resize_on_device=resize_on_device,
    )


def build_train_loader(
    data: Data,
    spec: ModelSpec,
    distributed: Distributed,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    augmentation: str = "hflip",
    copy_paste: bool = False,
    group_factor: int = 3,
    keep_negatives: bool = False,
    repeat_threshold: float | None = None,
) -> tuple[DeviceLoader, GroupedBatchSampler]:
    """Build dataset, loader and batch sampler for training.

    Args:
        data: With a training split.
        spec: Says what the model needs: masks, keypoints, sizes.
        distributed: This process.
        batch_size: Images per process and step.
        workers: Loading processes.
        seed: The run's random seed, for the order of the images and all augmentation.
        augmentation: Name of the preset.
        copy_paste: Paste objects between the images of a batch.
        group_factor: k of the aspect-ratio groups.
        keep_negatives: Train on images without objects too.
        repeat_threshold: Draw images with classes rarer than this several times per epoch, see `loading.repeats`.

    Raises:
        ValueError: No object is left, or fewer images than processes.
    """
    assert data.train is not None
    dataset = _build_train_dataset(
        data,
        spec,
        seed=seed,
        augmentation=augmentation,
        keep_negatives=keep_negatives,
        resize_on_device=distributed.device.type == "cuda" and PRESETS[augmentation].on_device and not copy_paste,
    )
    repeats = None
    if repeat_threshold is not None:
        found = find_repeats(data.train, data.label_map, spec, dataset.indices, repeat_threshold)
        found.log()
        repeats = found.of_picture
    sampler = GroupedBatchSampler(
        dataset.heights,
        dataset.widths,
        group_factor=group_factor,
        batch_size=batch_size,
        seed=seed,
        repeats=repeats,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )
    if sampler.batch_size < spec.architecture.min_batch_size:
        raise ValueError(
            f"{len(dataset)} training image(s) for {distributed.world_size} process(es) make batches of one; "
            f"{spec.name} needs two, its last maps have one value per channel: start fewer processes or add images"
        )
    logger.info(format_groups(sampler.groups, group_factor))
    batch_bytes = 3 * sampler.batch_size * int((dataset.heights.astype(int) * dataset.widths).max())
    if batch_bytes > SLOT_BYTES:  # smaller ones do not travel through /dev/shm
        check_shared_memory(batch_bytes, workers)
    collate = CopyPaste(seed) if copy_paste else collate_fn
    loader = DeviceLoader(dataset, sampler, workers=workers, device=distributed.device, collate=collate)
    return loader, sampler


def build_val_loader(
    data: Data, distributed: Distributed, *, batch_size: int, workers: int, task: str | None = None
) -> DeviceLoader:
    """Build a loader of the validation images: every image once over all processes.

    Args:
        data: With the split.
        distributed: This process.
        batch_size: Images per batch.
        workers: Loading processes.
        task: ``box``, ``mask`` or ``keypoint``: the samples have what its losses need; None: image ids alone.
    """
    val = data.val
    dataset = DetectionDataset(
        val.annotations,
        val.images,
        data.label_map,
        indices=val.indices,
        needs_masks=task == "mask",
        needs_keypoints=task == "keypoint",
        with_targets=task is not None,
    )
    sampler = EvalBatchSampler(
        len(dataset), batch_size=batch_size, rank=distributed.rank, world_size=distributed.world_size
    )
    return DeviceLoader(dataset, sampler, workers=workers, device=distributed.device)
