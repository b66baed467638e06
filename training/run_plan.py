"""What a run is going to do, before it does it; and a rehearsal of its most expensive step."""

import contextlib
import datetime
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from group_by_aspect_ratio import GroupedBatchSampler
from loading.collate import unpack
from loading.holdout import count_classes
from loading.loaders import DeviceLoader
from loading.repeats import find_repeats
from loading.trainable import Trainable, count_trainable
from models.architectures import ModelSpec
from models.resize import resize_scales, short_sides
from optimization.schedule import LearningRate
from optimization.step import StepOptions, add_gradients, update_parameters
from runtime.progress import Progress
from training.state import TrainingState
from utils import format_peak_memory

# Steps of a rehearsal that are timed, after one that warms up.
REHEARSED_STEPS = 2

# torchvision's detectors pad the sides of a batch to multiples of this (GeneralizedRCNNTransform).
SIZE_DIVISIBLE = 32

# Classes that the plan names; the rarest are what a user must know of.
MAX_CLASSES = 12


@dataclass(frozen=True)
class Plan:
    """The parts of a run that a plan speaks of.

    Attributes:
        state: With the start weights.
        loader: For training.
        learning_rate: Gives the rate of every update.
        accumulate: Steps per update.
        output_dir: The run's folder; None saves nothing.
        keep_checkpoints: How many checkpoints stay; 0: one per epoch.
    """

    state: TrainingState
    loader: DeviceLoader
    learning_rate: LearningRate
    accumulate: int
    output_dir: Path | None
    keep_checkpoints: int

    @property
    def sampler(self) -> GroupedBatchSampler:
        """What orders the training batches."""
        assert isinstance(self.loader.batch_sampler, GroupedBatchSampler)
        return self.loader.batch_sampler

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch."""
        steps = -(-self.sampler.num_batches // self.sampler.world_size)
        return -(-steps // self.accumulate)

    def checkpoint_bytes(self) -> int:
        """Return about how large a checkpoint becomes: weights, their average, and the optimizer's state."""
        weights = sum(v.numel() * v.element_size() for v in self.state.model.state_dict().values())
        trained = sum(
            p.numel() * p.element_size() for group in self.state.optimizer.param_groups for p in group["params"]
        )
        moments = 2 if isinstance(self.state.optimizer, torch.optim.AdamW) else 1
        return weights * (2 if self.state.average is not None else 1) + trained * moments

    def format_lines(self) -> str:
        """Return the plan, a line per subject."""
        data, train = self.state.data, self.state.data.train
        assert train is not None
        trainable = count_trainable(train, data.label_map, self.state.spec, self.loader.dataset.indices)
        rows = {
            "data": self._data(),
            "split": self._split(),
            "objects": trainable.format_counts(),
            "classes": self._classes(trainable),
            "repeats": self._repeats(),
            "batches": self._batches(),
            "rate": format_rate(self.learning_rate),
            "model": self._model(),
            "saved": self._saved(),
        }
        return "plan\n" + "\n".join(f"  {name:<8} {text}" for name, text in rows.items() if text)

    def _data(self) -> str:
        train, val = self.state.data.train, self.state.data.val
        assert train is not None
        kept, usable, all_images = len(self.loader.dataset), len(train.indices), train.num_images
        dropped = []
        if all_images > usable:
            dropped.append(f"{all_images - usable} unusable")
        if usable > kept:
            dropped.append(f"{usable - kept} without objects to train on")
        left_out = f" ({', '.join(dropped)} left out)" if dropped else ""
        return f"trains on {kept} of {all_images} images{left_out}, is scored on {len(val.indices)}"

    def _split(self) -> str:
        data, holdout = self.state.data, self.state.data.holdout
        if holdout is None:
            return ""
        assert data.train is not None
        trained, held = count_classes(data.train), count_classes(data.val)
        names = [name for _, name in data.train.annotations.categories]
        rows = [f"{name} {t} + {h}" for name, t, h in zip(names, trained.tolist(), held.tolist())]
        pictures = f"{len(data.train.indices)} pictures + {len(data.val.indices)} held out"
        rule = f"--val-fraction {holdout.fraction:g}, seed {holdout.seed}"
        return f"{pictures} ({rule}), objects: {first_and_last(rows, trained + held)}"

    def _classes(self, trainable: Trainable) -> str:
        names = [name for _, name in trainable.categories]
        rows = [f"{name} {count}" for name, count in zip(names, trainable.counts.tolist())]
        return f"{len(rows)} with {trainable.num_objects} objects: {first_and_last(rows, trainable.counts)}"

    def _repeats(self) -> str:
        threshold = self.state.flags.get("repeat_threshold")
        if threshold is None:
            return ""
        data, images = self.state.data, self.loader.dataset.indices
        assert data.train is not None
        found = find_repeats(data.train, data.label_map, self.state.spec, images, threshold)
        rows = found.format_rows([name for _, name in data.train.annotations.categories])
        what = f"{found.of_picture.sum():.0f} pictures drawn per epoch of {len(images)}"
        return f"{what}; those with each class: {first_and_last(rows, found.pictures)}"

    def _batches(self) -> str:
        sampler = self.sampler
        images = sampler.batch_size * sampler.world_size * self.accumulate
        parts = f"{sampler.batch_size} per process x {sampler.world_size} process(es) x {self.accumulate} step(s)"
        groups = len(np.unique(sampler.groups))
        epochs = self.learning_rate.epochs
        done = "; all are done, a larger --epochs goes on" if self.state.progress.epoch >= epochs else ""
        return (
            f"{images} images per update ({parts}) from {groups} group(s) of similar shape; "
            f"{self.updates_per_epoch} updates per epoch, {self.updates_per_epoch * epochs} in {epochs} epochs{done}"
        )

    def _model(self) -> str:
        total = sum(p.numel() for p in self.state.model.parameters())
        trained = sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)
        frozen = [name for name, p in self.state.model.named_parameters() if not p.requires_grad]
        parts = sorted({".".join(name.split(".")[:3]) for name in frozen})
        text = f"{self.state.spec.name}, {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
        if parts:
            text += f"; frozen: {', '.join(parts)}"
        text += "; batch norms are constants" if self.state.spec.frozen_norm else ""
        return text + self._random_weights()

    def _random_weights(self) -> str:
        """Say that nothing was learnt before, which few pictures cannot make up for; empty where something was."""
        flags = self.state.flags
        if self.state.progress != Progress() or flags.get("weights") or flags.get("weights_backbone"):
            return ""
        published = torchvision.models.get_model_weights(self.state.spec.name)["COCO_V1"]
        return f"; from RANDOM weights, for very many pictures: --weights {published} starts from COCO's"

    def _saved(self) -> str:
        if self.output_dir is None:
            return "nothing (no --output-dir)"
        size, free = self.checkpoint_bytes(), free_bytes(self.output_dir)
        files = (self.keep_checkpoints or self.learning_rate.epochs) + 2  # the best one, and one while it is written
        text = (
            f"{self.output_dir}: checkpoints of {size >> 20} MB, {files * size >> 20} MB in all, {free >> 20} MB free"
        )
        return text + (" - NOT ENOUGH" if free < files * size else "")

    def check_output(self) -> None:
        """Raise ValueError where the output folder cannot be written or cannot take two checkpoints."""
        if self.output_dir is None:
            return
        folder = existing_parent(self.output_dir)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{self.output_dir}: cannot be written to; choose another --output-dir")
        needed, free = 2 * self.checkpoint_bytes(), free_bytes(self.output_dir)
        if free < needed:
            raise ValueError(
                f"{self.output_dir}: two checkpoints need {needed >> 20} MB, {free >> 20} MB are free; "
                "make room or choose another --output-dir"
            )


def first_and_last(rows: Sequence[str], counts: np.ndarray) -> str:
    """Return rows about classes by falling count, in one line; of more than `MAX_CLASSES` those at both ends."""
    ordered = [rows[k] for k in np.argsort(-counts, kind="stable").tolist()]
    if len(ordered) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        ordered = [*ordered[:half], "...", *ordered[-half:]]
    return ", ".join(ordered)


def format_rate(learning_rate: LearningRate) -> str:
    """Return the learning rate's course in words."""
    text = f"{learning_rate.base:g} after {learning_rate.warmup_iters} warm-up updates"
    if learning_rate.scheduler == "cosineannealinglr":
        return f"{text}, down to 0 along a cosine over {learning_rate.epochs} epochs"
    inside = [epoch for epoch in sorted(learning_rate.milestones) if epoch < learning_rate.epochs]
    if not inside:
        return f"{text}, constant over {learning_rate.epochs} epochs"
    return f"{text}, times {learning_rate.gamma:g} at epoch(s) {' '.join(map(str, inside))} of {learning_rate.epochs}"


def existing_parent(folder: Path) -> Path:
    """Return ``folder``, or the first folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Return the free space where ``folder`` is or will be."""
    return shutil.disk_usage(existing_parent(folder)).free


def largest_batch(batches: np.ndarray, heights: np.ndarray, widths: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Return the batch that is largest in the model: after its resize, at the longest of its short sides, and padded.

    Of batches that come out the same, the one whose pictures are largest before the resize.

    Args:
        batches: Indices of pictures, [number of batches, batch size].
        heights: int [N], of all pictures, in pixels.
        widths: int [N], of all pictures, in pixels.
        spec: What the model is built from: its sizes decide which batch is the largest.
    """
    of_widths, of_heights = resize_scales(heights, widths, spec, short_side=max(short_sides(spec)))
    resized = [np.floor(sides * scales) for sides, scales in ((heights, of_heights), (widths, of_widths))]
    height, width = (np.ceil(sides[batches].max(axis=1) / SIZE_DIVISIBLE) for sides in resized)
    given = heights[batches].max(axis=1).astype(np.int64) * widths[batches].max(axis=1)
    return batches[int(np.lexsort((given, height * width))[-1])]


@contextlib.contextmanager
def longest_short_side(model: nn.Module) -> Iterator[None]:
    """Let the model's resize take the longest of its short sides instead of drawing one."""
    transform: Any = model.transform
    own = transform.min_size
    transform.min_size = (max(own),)
    try:
        yield
    finally:
        transform.min_size = own


def rehearse(plan: Plan, model: nn.Module, options: StepOptions) -> str:
    """Train on the batch that takes most memory, and return what it took; the weights are not the same afterwards.

    Args:
        plan: Its loader, optimizer and length of the run are used.
        model: ``plan.state.model``, in DDP where there are several processes.
        options: How each step goes; the same as in training, so that memory and time are.
    """
    dataset, sampler, device = plan.loader.dataset, plan.sampler, plan.loader.device
    largest = largest_batch(sampler.epoch_batches(0), dataset.heights, dataset.widths, plan.state.spec)
    packed = plan.loader.collate([dataset[0, int(index)] for index in largest])
    images, targets = unpack(packed, device)
    model.train()
    seconds = []
    for _ in range(1 + REHEARSED_STEPS):
        start = time.perf_counter()
        with longest_short_side(plan.state.model):
            for step in range(options.accumulate):
                is_update, weight = step + 1 == options.accumulate, 1 / options.accumulate
                add_gradients(model, images, targets, options, weight=weight, is_update=is_update)
        update_parameters(plan.state.optimizer, options, torch.zeros((), device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    update = float(np.mean(seconds[1:]))
    whole = datetime.timedelta(seconds=math.ceil(update * plan.updates_per_epoch * plan.learning_rate.epochs))
    shape = "x".join(map(str, images[0].shape[1:]))
    return (
        f"  rehearsed {len(images)} images of {shape} and similar, the largest batch for the model: {update:.2f} s per "
        f"update, {format_peak_memory(device)}; at most about {whole} for all epochs, without evaluation"
    )
