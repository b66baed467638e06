"""The epochs of a run: train, save, evaluate, note down; and the state that a checkpoint restores."""

import datetime
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import CheckpointFolder
from coco_eval import CocoEvaluator
from data_loading import DeviceLoader
from datasets import Data
from engine import Progress, train_one_epoch
from group_by_aspect_ratio import GroupedBatchSampler
from models import ModelSpec
from optimization import LearningRate
from run_folder import append_metrics, describe_scores, versions
from scoring import score_model
from stopping import StopRequest
from utils import world_size

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What changes while a run goes on, and what is needed to rebuild it.

    Attributes:
        model: Bare, not in DDP.
        spec: Of the model.
        optimizer: Its optimizer.
        scaler: For float16.
        data: What it is trained on.
        flags: The command line as plain values.
        progress: Where the run is.
        metrics: Of the last evaluation, with what they depend on.
    """

    model: nn.Module
    spec: ModelSpec
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    data: Data
    flags: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    metrics: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return a checkpoint's content: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "model_spec": self.spec.to_plain(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "progress": vars(self.progress).copy(),
            "dataset": self.data.describe(),
            "args": self.flags,
            "metrics": self.metrics,
            "versions": versions(),
            "world_size": world_size(),
            "num_threads": torch.get_num_threads(),
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take up optimizer, scaler and position of a checkpoint; the model is rebuilt from it before."""
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler is not None and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        self.metrics = content["metrics"]


def train_epochs(
    state: TrainingState,
    model: nn.Module,
    train_loader: DeviceLoader,
    val_loader: DeviceLoader,
    evaluator: CocoEvaluator,
    learning_rate: LearningRate,
    stop: StopRequest,
    *,
    epochs: int,
    output_dir: Path | None = None,
    folder: CheckpointFolder | None = None,
    predictions_dir: Path | None = None,
    checkpoint_every: int | None = None,
    eval_every: int = 1,
    **step_options: Any,
) -> int:
    """Train to the last epoch, with checkpoints and evaluations on the way.

    Args:
        state: Moved forward.
        model: ``state.model``, in DDP where there are several processes.
        train_loader: With a `GroupedBatchSampler`.
        val_loader: With an `EvalBatchSampler`.
        evaluator: Of the validation images.
        learning_rate: Of every update.
        stop: This process's wish to stop.
        epochs: Number of the epoch to stop before.
        output_dir: Where metrics go; None on all processes but the first, or where nothing is saved.
        folder: Where checkpoints go; likewise.
        predictions_dir: Where detections on the validation images go, on all processes; None writes none.
        checkpoint_every: Updates between checkpoints inside an epoch.
        eval_every: Epochs between evaluations, the last one always; 0 for none.
        **step_options: For `train_one_epoch`.

    Returns:
        The exit code.
    """
    sampler, progress = train_loader.batch_sampler, state.progress
    assert isinstance(sampler, GroupedBatchSampler)

    def save(epoch_done: int | None = None) -> None:
        if folder is not None:
            folder.save(state.content(), epoch_done=epoch_done)

    def after_update() -> None:
        if checkpoint_every and progress.updates % checkpoint_every == 0:
            save()

    started = time.time()
    while progress.epoch < epochs:
        epoch = progress.epoch
        sampler.set_epoch(epoch, progress.batches)
        averages = train_one_epoch(
            model,
            state.optimizer,
            train_loader,
            progress=progress,
            learning_rate=learning_rate,
            stop=stop,
            scaler=state.scaler,
            after_update=after_update,
            debug_folder=output_dir,
            **step_options,
        )
        if progress.batches < sampler.num_batches:
            save()
            logger.info("asked to stop: saved epoch %d, update %d", epoch, progress.updates)
            return 0
        progress.epoch, progress.batches = epoch + 1, 0
        save(epoch_done=epoch)
        if eval_every and ((epoch + 1) % eval_every == 0 or epoch + 1 == epochs):
            scored = score_model(
                state.model,
                val_loader,
                evaluator,
                state.data.label_map,
                stop=stop,
                predictions_dir=predictions_dir,
            )
            if scored is None:
                logger.info("asked to stop during the evaluation after epoch %d", epoch)
                return 0
            state.metrics = describe_scores(scored.result, scored.report, scored.intervals)
            if output_dir is not None:
                append_metrics(output_dir, epoch, averages, state.metrics)
            save(epoch_done=epoch)
    logger.info("training took %s", datetime.timedelta(seconds=int(time.time() - started)))
    return 1 if folder is not None and folder.last_save_failed else 0
