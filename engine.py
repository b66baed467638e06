"""One epoch of training, and evaluation. Loops and nothing else: what they work on is made elsewhere."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from annotations.labels import LabelMap
from coco_eval import CocoEvaluator
from evaluation.background import Background
from evaluation.eval_result import EvalResult
from evaluation.postprocess import fast_scoring
from group_by_aspect_ratio import EvalBatchSampler, GroupedBatchSampler
from inference.tiles import Tiling, outputs_in_tiles
from loading.loaders import DeviceLoader
from optimization.running_statistics import RunningStatistics
from optimization.schedule import LearningRate
from optimization.step import StepOptions, add_gradients, update_parameters
from runtime.epoch_log import EpochLog, progress_bar
from runtime.progress import Progress
from runtime.signals import StopRequest, agree_to_stop
from runtime.step_guard import StepGuard
from runtime.trackers import StepRecord, Tracker
from utils import broadcast_json, gather_bytes, kept_generators, seed_torch

logger = logging.getLogger(__name__)

# Batches of an evaluation between two looks at the wish to stop.
EVAL_POLL = 10


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DeviceLoader,
    *,
    progress: Progress,
    learning_rate: LearningRate,
    options: StepOptions,
    stop: StopRequest,
    trackers: Sequence[Tracker] = (),
) -> dict[str, float]:
    """Train from ``progress`` to the end of its epoch, or until a rank is asked to stop.

    Args:
        model: In DDP or bare; returns a dict of losses.
        optimizer: With fused kernels.
        loader: Its batch sampler is a `GroupedBatchSampler` at ``progress``.
        progress: Moved forward with every update.
        learning_rate: Rate of every update.
        options: How each step goes.
        stop: This process's wish to stop.
        trackers: Told of every step and update.

    Returns:
        Averages of the epoch, see `EpochLog.finish`.

    Raises:
        NonFiniteLossError: A loss or gradient is not finite, see `StepGuard`.
    """
    model.train()
    sampler = loader.batch_sampler
    assert isinstance(sampler, GroupedBatchSampler)
    first, num_steps = sampler.first_step, len(sampler)
    log = EpochLog(f"Epoch: [{progress.epoch}]", num_steps, options.print_freq, loader.device, first_step=first)
    guard = StepGuard(loader.device, stop, progress, options)
    statistics = RunningStatistics(model)
    for step, (images, targets) in enumerate(log.time_waits(loader)):  # on the device when they arrive
        is_update = (step + 1) % options.accumulate == 0 or step + 1 == num_steps
        # Randomness depends on the position alone, so that a resumed step equals the uninterrupted one.
        seed_torch(options.seed, "step", progress.epoch, sampler.batch_number(step))
        lr = learning_rate.set(optimizer, progress.epoch, progress.updates)

        # Forward and backward; an update is the mean over its batches, of which an epoch's last one may have fewer.
        weight = sampler.weight(step, options.accumulate)
        loss_dict = add_gradients(model, images, targets, options, weight=weight, is_update=is_update)

        losses = torch.stack(list(loss_dict.values()))  # stays on the device: reading it would wait for the step
        updates = progress.updates + is_update
        where = progress.epoch, first + step, updates, is_update
        record = StepRecord(*where, lr, list(loss_dict), losses, images, targets)
        for tracker in trackers:
            tracker.on_step(record)
        non_finite = guard.reduce_flags(losses)  # two numbers over all ranks: they skip or stop together
        log.step(record)  # waits for the device every print_freq steps

        skipped = None
        if is_update:
            # Clip, step, clear. The device reads non_finite itself and then changes nothing.
            skipped = update_parameters(optimizer, options, non_finite)
            statistics.settle(skipped)
            progress.updates, progress.batches = updates, sampler.done_after(step + 1)
        guard.enqueue(record, skipped)
        guard.handle_arrived()  # on a GPU the flags of the step before: this one is still being computed
        if is_update:
            for tracker in trackers:
                tracker.on_update(record, guard.may_save)
            if guard.stopping:
                break
    guard.handle_arrived(wait=True)
    return log.finish()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    evaluator: CocoEvaluator,
    label_map: LabelMap,
    *,
    tiling: Tiling | None = None,
    print_freq: int = 100,
    on_batch: Callable[[list[int], list[Any]], None] = lambda image_ids, detections: None,
    stop: StopRequest | None = None,
) -> EvalResult | None:
    """Score ``model`` on ``loader``'s images; all ranks get the same result.

    A batch is scored in a thread while the model works on the next one. The model's mode and the random generators are
    afterwards as they were.

    Args:
        model: Bare, not in DDP: the ranks may have different numbers of batches.
        loader: With an `EvalBatchSampler`.
        evaluator: Holds the ground truth of the same images; what it held of detections is forgotten.
        label_map: What the model's labels mean.
        tiling: How large images are cut into tiles; None looks at every image as a whole.
        print_freq: Batches between log lines.
        on_batch: Gets the image ids and detections of every batch, in that thread.
        stop: Looked at by all ranks together every `EVAL_POLL` batches.

    Returns:
        The metrics; None if a rank was asked to stop.
    """
    assert isinstance(loader.batch_sampler, EvalBatchSampler)
    was_training = model.training
    evaluator.reset()
    model.eval()
    start, scoring = time.perf_counter(), 0.0

    def score(image_ids: list[int], outputs: list[dict[str, Any]]) -> None:
        """Match a batch to the ground truth."""
        nonlocal scoring
        before = time.perf_counter()
        with torch.inference_mode():  # each thread has a mode of its own
            detections = evaluator.update(image_ids, outputs, label_map)
        scoring += time.perf_counter() - before
        on_batch(image_ids, detections)

    try:
        with (
            kept_generators(),
            # Which of a tile's detections are among the best of the image shows only later.
            fast_scoring(model, evaluator.max_keypoint_dets if tiling is None else sys.maxsize),
            progress_bar("Test", len(loader)) as bar,
            Background() as background,
        ):
            for step, (images, targets) in enumerate(loader):
                outputs = outputs_in_tiles(model, images, tiling)  # the thread has nothing to do with the device
                background.run(score, [target["image_id"] for target in targets], outputs)
                bar.update()
                # The ranks' shards differ by a batch: only steps that all of them have may hold a reduction.
                polls = (step + 1) % EVAL_POLL == 0 and step + 1 < loader.batch_sampler.min_length
                if stop is not None and polls and agree_to_stop(stop):
                    return None
                if (step + 1) % print_freq == 0 or step + 1 == len(loader):
                    seconds = time.perf_counter() - start
                    share = f"{(step + 1) / seconds:.2f} batches/s  scoring: {scoring / seconds:.1%} of the time"
                    logger.info("Test: [%d/%d]  %s", step + 1, len(loader), share)
        return evaluator.compute()
    finally:
        model.train(was_training)


@torch.no_grad()
def validation_loss(model: nn.Module, loader: DeviceLoader) -> dict[str, float]:
    """Return the losses of training on ``loader``'s images, without augmentation and without learning from them.

    The model is in training mode but for its norms and its resize, which are as in evaluation. Sampling is seeded
    per batch, and means are taken in the order of the images: any number of processes gives the same digits.
    Generators and mode are afterwards as they were.

    Args:
        model: Bare, not in DDP.
        loader: With an `EvalBatchSampler` and targets.

    Returns:
        ``loss`` and each of its terms, averaged over images.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, GeneralizedRCNNTransform)):
            module.eval()
    rows: list[list[Any]] = []
    try:
        with kept_generators():
            for images, targets in loader:
                image_id = targets[0]["image_id"]
                seed_torch("validation loss", image_id)
                losses = model(images, targets)
                values = torch.stack(list(losses.values())).tolist()
                rows.append([image_id, len(images), dict(zip(losses, values))])
    finally:
        for module, mode in modes.items():
            module.training = mode
    gathered = gather_bytes(json.dumps(rows).encode())
    means: dict[str, float] = {}
    if gathered is not None:
        rows = sorted((row for part in gathered for row in json.loads(part)), key=lambda row: row[0])
        count = sum(row[1] for row in rows)
        terms = {name: math.fsum(row[1] * row[2][name] for row in rows) / count for name in rows[0][2]}
        means = {"loss": math.fsum(terms.values()), **terms}
    return broadcast_json(means)
