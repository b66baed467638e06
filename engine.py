"""One epoch of training, and evaluation. Loops and nothing else: what they work on is made elsewhere."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from annotations.labels import LabelMap
from coco_eval import CocoEvaluator, EvalResult
from evaluation.postprocess import fast_scoring
from group_by_aspect_ratio import EvalBatchSampler, GroupedBatchSampler
from loading.collate import Targets
from loading.loaders import DeviceLoader
from optimization.optimizer import LearningRate, update_parameters
from runtime.epoch_log import EpochLog, progress_bar
from runtime.signals import StopRequest, agree_to_stop
from utils import all_reduce_max, broadcast_json, gather_bytes, rank, seed_torch

logger = logging.getLogger(__name__)

ON_NAN = ("stop", "skip")

# So many updates in a row may be skipped before the run is given up.
MAX_SKIPPED_IN_A_ROW = 20

# Batches of an evaluation between two looks at the wish to stop.
EVAL_POLL = 10


class NonFiniteLossError(RuntimeError):
    """A loss that is NaN or infinite; the text names term, step, rate and image ids."""


@dataclass
class Progress:
    """Where a run is: the position that a checkpoint continues from.

    Attributes:
        epoch: Current epoch, from 0.
        batches: Batches of the epoch's global list that are done.
        updates: Optimizer updates since the start of the run.
        to_score: Whether the evaluation after the epoch before is still to be done.
        skipped: How many updates in a row have been left out.
    """

    epoch: int = 0
    batches: int = 0
    updates: int = 0
    to_score: bool = False
    skipped: int = 0


@dataclass
class StepRecord:
    """What is remembered of a step until its flags have arrived on the host.

    Attributes:
        epoch: From 0.
        step: Within the epoch.
        lr: Of its update.
        names: Of the loss terms.
        losses: float [len(names)], on the device.
        images: The batch.
        targets: The batch.
        is_update: Whether the optimizer took a step after it.
    """

    epoch: int
    step: int
    lr: float
    names: list[str]
    losses: Tensor
    images: list[Tensor]
    targets: Targets
    is_update: bool = True


@dataclass
class StepGuard:
    """Lets all ranks agree, step by step, whether a loss was not finite and whether someone was asked to stop.

    The flags travel in one small reduction and are read on the host one step late on a GPU, when they have
    long arrived: nothing waits for them. An update with a loss or gradient that is not finite is not made in the first
    place, since the optimizer reads the flag on the device.

    Attributes:
        device: Where losses are.
        stop: This process's own wish to stop.
        progress: Counts the updates left out in a row, over epochs.
        on_nan: ``stop`` or ``skip``, for losses and gradients that are not finite.
        has_scaler: In float16 an overflow belongs to the scaler, which leaves out the update and lowers its scale.
        debug_folder: Where a batch with a bad loss is saved.
    """

    device: torch.device
    stop: StopRequest
    progress: Progress
    on_nan: str = "stop"
    has_scaler: bool = False
    debug_folder: Path | None = None
    stopping: bool = False
    _has_bad_loss: bool = False  # in the update that is under way
    _waiting: list[tuple[Tensor, StepRecord]] = field(default_factory=list)

    def agree(self, record: StepRecord) -> Tensor:
        """Reduce a step's flags: float [2] on the device, whether any rank's loss is not finite, and any is to stop."""
        bad = (~torch.isfinite(record.losses).all()).to(torch.float32)
        return all_reduce_max(torch.stack([bad, torch.full_like(bad, float(bool(self.stop)))]))

    def watch(self, record: StepRecord, flags: Tensor, left_out: Tensor | None) -> None:
        """Send a step's flags to the host.

        Args:
            record: Of the step.
            flags: See `agree`.
            left_out: Of its update, see `update_parameters`; None for a step without one. The same on all ranks, as
                the gradients are.
        """
        flags = torch.cat([flags, flags.new_zeros(1) if left_out is None else left_out[None]])
        on_host = flags.to("cpu", non_blocking=self.device.type != "mps")  # MPS does not order such copies
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            on_host.arrived = event  # type: ignore[attr-defined]
        self._waiting.append((on_host, replace(record, is_update=left_out is not None)))

    def look(self, at_all: bool = False) -> None:
        """Act on the flags that are due: set ``stopping``, report bad losses.

        Args:
            at_all: Also wait for those that a GPU has not sent yet.

        Raises:
            NonFiniteLossError: See `report_bad_loss`.
        """
        lag = 1 if self.device.type == "cuda" and not at_all else 0
        while len(self._waiting) > lag:
            flags, record = self._waiting.pop(0)
            if self.device.type == "cuda":
                flags.arrived.synchronize()  # type: ignore[attr-defined]
            bad, stop, left_out = (flag > 0 for flag in flags.tolist())
            self.stopping |= stop
            self._has_bad_loss |= bad
            if record.is_update:
                self.progress.skipped = self.progress.skipped + 1 if left_out else 0
            given_up = self.progress.skipped >= MAX_SKIPPED_IN_A_ROW
            is_news = bad or (left_out and not self._has_bad_loss)
            if given_up or (is_news and not self.has_scaler):
                report_bad_loss(record, bad, self.on_nan == "stop" or given_up, self.debug_folder)
            if record.is_update:
                self._has_bad_loss = False


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DeviceLoader,
    *,
    progress: Progress,
    learning_rate: LearningRate,
    seed: int,
    stop: StopRequest,
    scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    print_freq: int = 20,
    on_nan: str = "stop",
    after_update: Callable[[], None] = lambda: None,
    on_losses: Callable[[Progress, Tensor], None] = lambda progress, losses: None,
    debug_folder: Path | None = None,
) -> dict[str, float]:
    """Train from ``progress`` to the end of its epoch, or until a rank is asked to stop.

    Args:
        model: In DDP or bare; returns a dict of losses.
        optimizer: With fused kernels.
        loader: Its batch sampler is a `GroupedBatchSampler` at ``progress``.
        progress: Moved forward with every update.
        learning_rate: Rate of every update.
        seed: Each step's generators are seeded from (seed, epoch, batch), so it does not depend on those before.
        stop: Looked at by all ranks together.
        scaler: For float16.
        amp_dtype: Autocast to this type; None computes in float32.
        accumulate: Steps per update.
        clip_grad_norm: Largest norm of the gradient.
        print_freq: Steps between log lines.
        on_nan: ``stop`` raises `NonFiniteLossError`, ``skip`` leaves the update out and goes on.
        after_update: Called after every update, for checkpoints.
        on_losses: Called in every step, with the position before it and its losses, float32 [terms].
        debug_folder: Where a batch with a non-finite loss is saved.

    Returns:
        Averages of the epoch, see `EpochLog.finish`.
    """
    model.train()
    device = loader.device
    sampler = loader.batch_sampler
    assert isinstance(sampler, GroupedBatchSampler)
    log = EpochLog(f"Epoch: [{progress.epoch}]", len(sampler), print_freq, device)
    guard = StepGuard(device, stop, progress, on_nan, scaler is not None, debug_folder)
    bad: Tensor | None = None
    asked_at = time.perf_counter()
    for step, (images, targets) in enumerate(loader):
        wait = time.perf_counter() - asked_at
        is_update = (step + 1) % accumulate == 0 or step + 1 == len(sampler)
        seed_torch(seed, "step", progress.epoch, sampler.first_batch + step * sampler.world_size + sampler.rank)
        lr = learning_rate.set(optimizer, progress.epoch, progress.updates)

        with contextlib.nullcontext() if is_update else _no_sync(model):
            loss_dict = _forward_backward(model, images, targets, sampler.weight(step, accumulate), scaler, amp_dtype)
        losses = torch.stack(list(loss_dict.values()))
        record = StepRecord(progress.epoch, step, lr, list(loss_dict), losses, images, targets)
        on_losses(progress, losses)
        flags = guard.agree(record)
        bad = flags[0] if bad is None else torch.maximum(bad, flags[0])
        log.step(record.names, losses, lr=lr, num_images=len(images), wait=wait)
        left_out: Tensor | None = None
        if is_update:
            left_out, bad = update_parameters(optimizer, scaler, clip_grad_norm, bad), None
            progress.updates += 1
            progress.batches = sampler.done_after(step + 1)
        guard.watch(record, flags, left_out)
        guard.look()
        if is_update:
            after_update()
            if guard.stopping:
                break
        asked_at = time.perf_counter()
    guard.look(at_all=True)
    return log.finish()


def _forward_backward(
    model: nn.Module,
    images: list[Tensor],
    targets: Targets,
    weight: float,
    scaler: torch.amp.GradScaler | None,
    amp_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Add the gradient of ``weight`` times the loss; returns the loss terms, float32 without a graph."""
    with torch.autocast(images[0].device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        loss_dict = model(images, targets)
    loss = sum(loss_dict.values()) * weight
    (loss if scaler is None else scaler.scale(loss)).backward()
    return {name: term.detach().float() for name, term in loss_dict.items()}


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep DDP from reducing gradients until the last step of an update."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def report_bad_loss(record: StepRecord, is_loss: bool, gives_up: bool, debug_folder: Path | None) -> None:
    """Say which loss, or that the gradient, was not finite and on which images.

    Raises:
        NonFiniteLossError: If ``gives_up``.
    """
    values = dict(zip(record.names, record.losses.tolist()))
    here = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    ids = [target["image_id"] for target in record.targets]
    what = f"loss not finite ({', '.join(here) or 'on another process'})" if is_loss else "gradient not finite"
    text = f"epoch {record.epoch} step {record.step}: {what}, learning rate {record.lr:.6g}, image ids {ids}"
    if (here or not is_loss) and debug_folder is not None:
        path = debug_folder / f"bad_batch_epoch{record.epoch}_step{record.step}_rank{rank()}.pt"
        torch.save({"images": record.images, "targets": record.targets, "losses": values}, path)
        text += f"; the batch is in {path}"
    if gives_up:
        hint = "lower --lr, lengthen --warmup-iters, or set --clip-grad-norm; --on-nan skip goes on without the batch"
        raise NonFiniteLossError(f"{text}; {hint}")
    logger.warning("%s; the update is skipped", text)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    evaluator: CocoEvaluator,
    label_map: LabelMap,
    *,
    print_freq: int = 100,
    on_batch: Callable[[list[int], list[Any]], None] = lambda image_ids, detections: None,
    stop: StopRequest | None = None,
) -> EvalResult | None:
    """Score ``model`` on ``loader``'s images; all ranks get the same result.

    The model's mode and the random generators are afterwards as they were.

    Args:
        model: Bare, not in DDP: the ranks may have different numbers of batches.
        loader: With an `EvalBatchSampler`.
        evaluator: Of the same images; what it held is forgotten.
        label_map: What the model's labels mean.
        print_freq: Batches between log lines.
        on_batch: Gets the image ids and detections of every batch.
        stop: Looked at by all ranks together every `EVAL_POLL` batches.

    Returns:
        The metrics; None if a rank was asked to stop.
    """
    assert isinstance(loader.batch_sampler, EvalBatchSampler)
    was_training = model.training
    cpu_rng = torch.get_rng_state()
    evaluator.reset()
    model.eval()
    try:
        start, scoring = time.perf_counter(), 0.0
        with fast_scoring(model, evaluator.max_keypoint_dets), progress_bar("Test", len(loader)) as bar:
            for step, (images, targets) in enumerate(loader):
                outputs = model(images)
                image_ids = [target["image_id"] for target in targets]
                before = time.perf_counter()
                detections = evaluator.update(image_ids, outputs, label_map)
                scoring += time.perf_counter() - before
                on_batch(image_ids, detections)
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
        torch.set_rng_state(cpu_rng)


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
    cpu_rng = torch.get_rng_state()
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, GeneralizedRCNNTransform)):
            module.eval()
    rows: list[list[Any]] = []
    try:
        for images, targets in loader:
            image_id = targets[0]["image_id"]
            seed_torch("validation loss", image_id)
            losses = model(images, targets)
            rows.append([image_id, len(images), {name: float(value) for name, value in losses.items()}])
    finally:
        for module, mode in modes.items():
            module.training = mode
        torch.set_rng_state(cpu_rng)
    gathered = gather_bytes(json.dumps(rows).encode())
    means: dict[str, float] = {}
    if gathered is not None:
        rows = sorted((row for part in gathered for row in json.loads(part)), key=lambda row: row[0])
        count = sum(row[1] for row in rows)
        terms = {name: math.fsum(row[1] * row[2][name] for row in rows) / count for name in rows[0][2]}
        means = {"loss": math.fsum(terms.values()), **terms}
    return broadcast_json(means)
