"""The state of a run, which a checkpoint restores, and what moves it on."""

import datetime
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loading.splits import Data
from models.architectures import ModelSpec
from optimization.optimizer import restore_optimizer
from optimization.weight_average import WeightAverage
from runtime.checkpoint import CheckpointError
from runtime.progress import Progress
from runtime.run_folder import RunFolder
from runtime.trackers import StepRecord, Tracker
from utils import versions, world_size

logger = logging.getLogger(__name__)

# Flags that change how a step computes: the last digits may differ from here on.
_NUMERIC_FLAGS = ("amp", "amp_dtype", "accumulate", "sync_bn", "ema", "channels_last", "compile", "torchvision_step")

# Flags that change nothing of what is learnt. Any other that differs after a resume is named.
_SILENT_FLAGS = {
    *("output_dir", "resume", "device", "verify_resume", "dry_run", "test_only", "start_epoch", "keep_checkpoints"),
    *("checkpoint_every", "print_freq", "profile", "workers", "cache_dir", "dist_url", "world_size"),
    *("eval_every", "eval_batch_size", "best_metric", "early_stop", "val_loss", "save_predictions", "max_dets", "tile"),
    *("overlap", "kpt_oks_sigmas", "oks_area", "backend", "use_v2", "lr_step_size", "use_deterministic_algorithms"),
    *("weights", "weights_backbone", "val_fraction"),  # a checkpoint has its own
    *("trainable_backbone_layers", "anchor_sizes", "anchor_ratios"),  # its model too
}

# Flags that hold for a checkpoint's model where they are given; without them it keeps what it had.
_MODEL_FLAGS = ("min_size", "max_size", "rpn_score_thresh")


@dataclass
class TrainingState:
    """What changes while a run goes on, and what is needed to rebuild it.

    Attributes:
        model: Bare, not in DDP.
        spec: What the model was built from.
        optimizer: Its optimizer.
        scaler: Scales the loss where the network computes in float16; None elsewhere.
        average: Moving average of the weights; None without ``--ema``.
        data: What it is trained on.
        flags: The command line as plain values.
        order: What the order of the batches follows from, see `GroupedBatchSampler.to_plain`.
        progress: Where the run is.
        averages: Losses and times of the last epoch.
        metrics: Plain figures of the last evaluation, with what they depend on; empty before the first.
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
            "dataset": self.data.to_plain(),
            "args": self.flags,
            "order": self.order,
            "averages": self.averages,
            "metrics": self.metrics,
            "best": self.best,
            **self._surroundings(),
        }
        if self.average is not None:
            content["model_ema"] = self.average.model.state_dict()
        return content

    def _surroundings(self) -> dict[str, Any]:
        """Return what else the last digits depend on."""
        return {
            "versions": versions(),
            "world_size": world_size(),
            "num_threads": torch.get_num_threads(),
            "device": next(self.model.parameters()).device.type,
        }

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
        self.progress = Progress.from_plain(content["progress"])
        self.averages = content.get("averages", {})
        self.metrics, self.best = content["metrics"], content.get("best", {})

    def _check_order(self, content: dict[str, Any]) -> None:
        """Refuse to go on inside an epoch whose list of batches is another one."""
        order = {"repeat factors": None, **content.get("order", {})}  # older checkpoints had none
        batches = content["progress"]["batches"]
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
        """Say in one line which other flags hold from here on, and in one what may change the last digits."""
        now, before = self._surroundings(), content
        old, spec = before["args"], ModelSpec.from_plain(before["model_spec"])
        course = {
            flag: (old.get(flag), value)
            for flag, value in self.flags.items()
            if flag not in _SILENT_FLAGS and flag not in _NUMERIC_FLAGS
        }
        course |= {flag: (getattr(spec, flag), getattr(self.spec, flag)) for flag in _MODEL_FLAGS}
        others = [f"--{flag.replace('_', '-')} {was}, now {new}" for flag, (was, new) in course.items() if was != new]
        layers = self.flags.get("trainable_backbone_layers")
        if layers not in (None, self.spec.trainable_layers):
            text = "--trainable-backbone-layers has no effect: the checkpoint's model trains %d"
            logger.warning(text, self.spec.trainable_layers)
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

    def end_epoch(self, averages: dict[str, float], num_batches: int, eval_every: int, epochs: int) -> int | None:
        """Take an epoch's averages and move on to the next; returns its number, or None where it was cut short.

        Args:
            averages: Mean losses and times by name, see `EpochLog.finish`.
            num_batches: Batches of a whole epoch, over all processes.
            eval_every: Epochs between evaluations, the last one always; 0 for none.
            epochs: Length of the run.
        """
        self.averages = {**averages, "lr": self.optimizer.param_groups[0]["lr"]}
        progress = self.progress
        if progress.batches < num_batches:
            return None
        progress.epoch, progress.batches = progress.epoch + 1, 0
        progress.eval_due = eval_every > 0 and (progress.epoch % eval_every == 0 or progress.epoch >= epochs)
        return progress.epoch - 1

    def end_evaluation(self, scores: dict[str, Any], metric: str) -> bool:
        """Take the scores of an evaluation; returns whether it is the best now, see `update_best`."""
        self.metrics, self.progress.eval_due = scores, False
        return self.update_best(metric)

    def reset_stale_best(self, best_epoch: int | None) -> None:
        """Choose the best anew from here on where the run's folder does not hold the best that the checkpoint knows.

        So it is after going back to an older checkpoint, whose later epochs are given up, and in a new folder.

        Args:
            best_epoch: Epoch that the run's folder holds as the best; None where it holds none.
        """
        if self.best and self.best["epoch"] != best_epoch:
            held = "no best epoch" if best_epoch is None else f"epoch {best_epoch} as the best"
            text = "the run's folder holds %s, the checkpoint knows epoch %d: the best is chosen anew from here on"
            logger.warning(text, held, self.best["epoch"])
            self.best = {}

    def update_best(self, metric: str) -> bool:
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
        logger.info("%s", format_best(new, old))
        return is_best

    def is_stale(self, early_stop: int) -> bool:
        """Return whether ``early_stop`` evaluations have passed without a better one; 0 for never."""
        return early_stop > 0 and self.best.get("since", 0) >= early_stop

    def where_stopped(self) -> str:
        """Return in words where a run that was asked to stop has stopped."""
        progress = self.progress
        if progress.batches:
            return f"in epoch {progress.epoch}, after update {progress.updates}"
        if progress.eval_due:
            return f"in the evaluation after epoch {progress.epoch - 1}, which starts again when continued"
        return f"before epoch {progress.epoch}"


@dataclass
class EndOfUpdate(Tracker):
    """After every update: moves the averaged weights, and saves inside an epoch where the user asked for that.

    Attributes:
        state: Gives the weights to average and the content of checkpoints.
        output: Where checkpoints go.
        checkpoint_every: ``--checkpoint-every``: updates, or minutes as `datetime.timedelta`; None saves at the ends
            of epochs alone.
    """

    state: TrainingState
    output: RunFolder
    checkpoint_every: int | datetime.timedelta | None

    def on_update(self, record: StepRecord, may_save: Callable[[], bool]) -> None:
        """Move the averaged weights, and save where that is due.

        After a step that ends the run nothing is saved, since its batch is not done.
        """
        if self.state.average is not None:
            self.state.average.update(self.state.model, record.updates)
        is_due = is_checkpoint_due(self.checkpoint_every, record.updates, time.monotonic() - self.output.saved_at)
        if is_due and may_save():
            self.output.save(self.state.content())


def is_checkpoint_due(every: int | datetime.timedelta | None, updates: int, seconds: float) -> bool:
    """Return whether to save inside an epoch, after so many updates and so long after the last time."""
    if isinstance(every, datetime.timedelta):
        return seconds >= every.total_seconds()
    return every is not None and updates % every == 0


def format_best(new: dict[str, Any], old: dict[str, Any] | None) -> str:
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
