"""The epochs of a run: train, save, evaluate, note down; and the state that a checkpoint restores."""

import datetime
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from engine import Progress, train_one_epoch
from group_by_aspect_ratio import GroupedBatchSampler
from loading.loaders import DeviceLoader
from loading.splits import Data
from models.acceleration import broadcast_buffers
from models.architectures import ModelSpec
from optimization.optimizer import LearningRate, restore_optimizer
from optimization.weight_average import WeightAverage
from report.page import publish
from runtime.checkpoint import CheckpointError
from runtime.run_folder import RunFolder
from runtime.signals import StopRequest, agree_to_stop
from training.evaluate_model import EvalSetup, score_model
from utils import rank, versions, world_size

logger = logging.getLogger(__name__)

# Flags that change what is trained, as the user wants it from now on.
_COURSE_FLAGS = (
    *("opt", "lr", "scale_lr", "momentum", "weight_decay", "norm_weight_decay", "lr_scheduler", "lr_steps", "lr_gamma"),
    *("warmup_iters", "epochs", "clip_grad_norm", "data_augmentation", "use_copypaste"),
)

# Flags that change how a step computes.
_NUMERIC_FLAGS = ("amp", "amp_dtype", "accumulate", "sync_bn", "ema", "channels_last", "compile")


@dataclass
class TrainingState:
    """What changes while a run goes on, and what is needed to rebuild it.

    Attributes:
        model: Bare, not in DDP.
        spec: Of the model.
        optimizer: Its optimizer.
        scaler: For float16.
        average: Of the weights, or None.
        data: What it is trained on.
        flags: The command line as plain values.
        order: What the order of the batches follows from, see `GroupedBatchSampler.describe`.
        progress: Where the run is.
        averages: Losses and times of the last epoch.
        metrics: Of the last evaluation, with what they depend on.
        best: ``metric``, ``value``, ``epoch`` and ``interval`` of the best evaluation; ``since``: how many came after.
    """

    model: nn.Module
    spec: ModelSpec
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    average: WeightAverage | None
    data: Data
    flags: dict[str, Any]
    order: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    averages: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def scored_model(self) -> nn.Module:
        """What is evaluated: the averaged weights where there are any."""
        return self.model if self.average is None else self.average.model

    def content(self) -> dict[str, Any]:
        """Return a checkpoint's content: tensors and plain values."""
        content = {
            "model": self.model.state_dict(),
            "model_spec": self.spec.to_plain(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "progress": vars(self.progress).copy(),
            "dataset": self.data.describe(),
            "args": self.flags,
            "order": self.order,
            "averages": self.averages,
            "metrics": self.metrics,
            "best": self.best,
            "versions": versions(),
            "world_size": world_size(),
            "num_threads": torch.get_num_threads(),
            "device": next(self.model.parameters()).device.type,
        }
        if self.average is not None:
            content["model_ema"] = self.average.model.state_dict()
        return content

    def restore(self, content: dict[str, Any]) -> None:
        """Take up optimizer, scaler, average and position of a checkpoint; the model is rebuilt from it before.

        Raises:
            CheckpointError: The checkpoint stands inside an epoch whose batches would now be others, or is of another
                kind of optimizer.
        """
        self._check_order(content)
        self._check_optimizer(content)
        self._log_changes(content)
        restore_optimizer(self.optimizer, content["optimizer"])
        if self.scaler is not None and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        if self.average is not None and "model_ema" in content:
            self.average.model.load_state_dict(content["model_ema"])
        self.progress = Progress(**content["progress"])
        self.averages = content.get("averages", {})
        self.metrics, self.best = content["metrics"], content.get("best", {})

    def _check_order(self, content: dict[str, Any]) -> None:
        """Refuse to go on inside an epoch whose list of batches is another one."""
        order, batches = content.get("order", {}), content["progress"]["batches"]
        others = [f"{name} {order[name]}, now {now}" for name, now in self.order.items() if order.get(name, now) != now]
        if batches and others:
            raise CheckpointError(
                f"the checkpoint stands after batch {batches} of epoch {content['progress']['epoch']}, and the rest of "
                f"the epoch would be made of other batches ({'; '.join(others)}): samples would be lost or repeated. "
                "Give the same flags and data, or continue from the end of an epoch (weights/model_N.pth)"
            )

    def _check_optimizer(self, content: dict[str, Any]) -> None:
        """Refuse momenta of another kind of optimizer, or of other groups of parameters."""
        before, now = content["args"].get("opt"), self.flags.get("opt")
        others = [f"--opt {before}, now {now}"] if (before == "adamw") != (now == "adamw") else []
        groups = len(content["optimizer"]["param_groups"]), len(self.optimizer.param_groups)
        if groups[0] != groups[1]:
            others.append(f"{groups[0]} group(s) of weight decay, now {groups[1]} (--norm-weight-decay)")
        if others:
            raise CheckpointError(
                f"the checkpoint's optimizer is another one: {'; '.join(others)}. Give the same flags, or start anew "
                "from its weights: --weights CHECKPOINT instead of --resume"
            )

    def _log_changes(self, content: dict[str, Any]) -> None:
        """Say in one line what may change the last digits from here on."""
        now, before = self.content(), content
        course = [(flag, before["args"].get(flag), self.flags.get(flag)) for flag in _COURSE_FLAGS]
        others = [f"--{flag.replace('_', '-')} {old}, now {new}" for flag, old, new in course if old != new]
        if others:
            logger.info("from here on with other flags: %s", "; ".join(others))
        pairs = {
            "processes": (before["world_size"], now["world_size"]),
            "threads": (before["num_threads"], now["num_threads"]),
            "device": (before.get("device", now["device"]), now["device"]),
            **{name: (before["versions"].get(name), version) for name, version in now["versions"].items()},
            **{
                f"--{flag.replace('_', '-')}": (before["args"].get(flag), self.flags.get(flag))
                for flag in _NUMERIC_FLAGS
            },
        }
        changes = [f"{name} {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
        if changes:
            logger.warning(
                "continuing with other settings (%s): no sample is lost or repeated, but losses and weights may differ "
                "in their last digits from those of an uninterrupted run",
                "; ".join(changes),
            )

    def forget_other_best(self, best_epoch: int | None) -> None:
        """Choose the best anew from here on where the run's folder does not hold the best that the checkpoint knows.

        So it is after going back to an older checkpoint, whose later epochs are given up, and in a new folder.

        Args:
            best_epoch: See `RunFolder.best_epoch`.
        """
        if self.best and self.best["epoch"] != best_epoch:
            held = "no best epoch" if best_epoch is None else f"epoch {best_epoch} as the best"
            text = "the run's folder holds %s, the checkpoint knows epoch %d: the best is chosen anew from here on"
            logger.warning(text, held, self.best["epoch"])
            self.best = {}

    def note_best(self, metric: str) -> bool:
        """Compare the last evaluation with the best one so far; returns whether it is the best now.

        Args:
            metric: As kind of score and figure, such as ``bbox/AP``.
        """
        kind, name = metric.split("/")
        value = self.metrics[kind][name]
        if value is None:  # nothing of the kind in the ground truth
            return False
        interval = self.metrics["intervals"].get(kind, {}).get(name)
        new = {"metric": metric, "value": value, "epoch": self.progress.epoch - 1, "interval": interval, "since": 0}
        old = self.best if self.best.get("metric") == metric else None
        is_best = old is None or value > old["value"]
        self.best = new if is_best else {**self.best, "since": self.best["since"] + 1}
        logger.info("%s", describe_best(new, old))
        return is_best


def describe_best(new: dict[str, Any], old: dict[str, Any] | None) -> str:
    """Return one line on the best evaluation so far, and whether the difference means anything.

    Args:
        new: ``metric``, ``value``, ``epoch`` and ``interval`` of the last evaluation.
        old: The same of the best one before it.
    """
    if old is None:
        return f"best so far: {new['metric']} {new['value']:.4f}"
    best, other = (new, old) if new["value"] > old["value"] else (old, new)
    text = f"best so far: {best['metric']} {best['value']:.4f} of epoch {best['epoch']}"
    text += f", against {other['value']:.4f} of epoch {other['epoch']}"
    if best["interval"] and best["interval"][0] <= other["value"] <= best["interval"][1]:
        low, high = best["interval"]
        text += f"; the difference is within its interval over images, {low:.4f} to {high:.4f}"
    return text


@dataclass(frozen=True)
class EpochOptions:
    """How the epochs of a run go.

    Attributes:
        epochs: Number of the epoch to stop before.
        eval_every: Epochs between evaluations, the last one always; 0 for none.
        best_metric: What "best" means, see `TrainingState.note_best`.
        early_stop: End after so many evaluations without a better one; 0 for never.
        checkpoint_every: Between checkpoints inside an epoch: updates, or minutes such as ``15m``; None for none.
        save_predictions: Write detections on the validation images.
    """

    epochs: int
    eval_every: int = 1
    best_metric: str = "bbox/AP"
    early_stop: int = 0
    checkpoint_every: int | str | None = None
    save_predictions: bool = False

    def wants_evaluation(self, done: int) -> bool:
        """Return whether the model is to be scored after ``done`` epochs."""
        return self.eval_every > 0 and (done % self.eval_every == 0 or done == self.epochs)

    def wants_checkpoint(self, updates: int, seconds: float) -> bool:
        """Return whether to save inside an epoch, after so many updates and so long after the last time."""
        if isinstance(self.checkpoint_every, str):
            return seconds >= 60 * int(self.checkpoint_every.removesuffix("m"))
        return self.checkpoint_every is not None and updates % self.checkpoint_every == 0


def train_epochs(
    state: TrainingState,
    model: nn.Module,
    train_loader: DeviceLoader,
    evaluation: EvalSetup,
    learning_rate: LearningRate,
    stop: StopRequest,
    options: EpochOptions,
    output: RunFolder | None = None,
    **step_options: Any,
) -> int:
    """Train to the last epoch, with checkpoints and evaluations on the way.

    An epoch counts as evaluated only when its scores are in a checkpoint: an evaluation that was cut short is made up
    for after the resume.

    Args:
        state: Moved forward.
        model: ``state.model``, in DDP where there are several processes.
        train_loader: With a `GroupedBatchSampler`.
        evaluation: What the model is scored on.
        learning_rate: Of every update.
        stop: This process's wish to stop.
        options: How the epochs go.
        output: Where results and checkpoints go; None saves nothing.
        **step_options: For `train_one_epoch`.

    Returns:
        The exit code.
    """
    progress = state.progress
    started = time.time()

    def leave(why: str) -> int:
        failed = output is not None and output.last_save_failed
        logger.info("asked to stop: %s%s", why, ", NOT saved" if failed else "")
        return int(failed)

    while True:
        if agree_to_stop(stop):
            return leave(f"before epoch {progress.epoch}")
        if progress.to_score and not evaluate_epoch(state, evaluation, stop, options, output):
            return leave(f"in the evaluation after epoch {progress.epoch - 1}, which starts again when continued")
        if options.early_stop and state.best.get("since", 0) >= options.early_stop:
            logger.info("no better evaluation in the last %d: stopping early", options.early_stop)
            break
        if progress.epoch >= options.epochs:
            break
        if not train_epoch(state, model, train_loader, learning_rate, stop, options, output, **step_options):
            return leave(f"saved epoch {progress.epoch}, update {progress.updates}")
    logger.info("training took %s", datetime.timedelta(seconds=int(time.time() - started)))
    if output is None or not output.last_save_failed:
        return 0
    logger.error("the end of the training is NOT saved: the last checkpoint could not be written")
    return 1


def train_epoch(
    state: TrainingState,
    model: nn.Module,
    train_loader: DeviceLoader,
    learning_rate: LearningRate,
    stop: StopRequest,
    options: EpochOptions,
    output: RunFolder | None,
    **step_options: Any,
) -> bool:
    """Train to the end of the epoch and save; returns False if someone asked to stop before."""
    progress = state.progress
    sampler = train_loader.batch_sampler
    assert isinstance(sampler, GroupedBatchSampler)
    sampler.set_epoch(progress.epoch, progress.batches)

    def after_update() -> None:
        if state.average is not None:
            state.average.update(state.model, progress.updates)
        if output is not None and options.wants_checkpoint(progress.updates, time.monotonic() - output.saved_at):
            output.save(state.content())

    state.averages = train_one_epoch(
        model,
        state.optimizer,
        train_loader,
        progress=progress,
        learning_rate=learning_rate,
        stop=stop,
        scaler=state.scaler,
        after_update=after_update,
        debug_folder=None if output is None else output.path,
        **step_options,
    )
    state.averages["lr"] = state.optimizer.param_groups[0]["lr"]
    is_whole = progress.batches == sampler.num_batches
    if is_whole:
        progress.epoch, progress.batches = progress.epoch + 1, 0
        progress.to_score = options.wants_evaluation(progress.epoch)
    if output is not None:
        output.save(state.content(), epoch_done=progress.epoch - 1 if is_whole else None)
    return is_whole


def evaluate_epoch(
    state: TrainingState, evaluation: EvalSetup, stop: StopRequest, options: EpochOptions, output: RunFolder | None
) -> bool:
    """Score the epochs done so far, note the figures and save; returns False if someone asked to stop meanwhile."""
    progress, model = state.progress, state.scored_model
    broadcast_buffers(model)
    predictions_dir = output.path if output is not None and options.save_predictions else None
    scored = score_model(model, evaluation, stop=stop, predictions_dir=predictions_dir)
    if scored is None:
        return False
    state.metrics = scored.to_plain()
    is_best = state.note_best(options.best_metric)
    progress.to_score = False
    if output is not None:
        epoch, evaluator = progress.epoch - 1, evaluation.evaluator
        output.add_epoch(epoch, state.averages, state.metrics)
        if rank() == 0:
            val = state.data.val
            publish(output.path, evaluator, scored, val, epoch=epoch, predictions_dir=predictions_dir, is_best=is_best)
        output.save(state.content(), epoch_done=epoch, is_best=is_best)
    return True
