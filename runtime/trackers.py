"""Who is told how a training goes: the losses of every step, and the figures of every epoch.

To log somewhere else, write a `Tracker` and add it in `build_trackers`.
"""

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.checkpoint import write_atomically
from utils import describe_error

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"

LOGGED_KINDS = ("bbox", "segm", "keypoints", "val_loss")


@dataclass(frozen=True)
class StepRecord:
    """What is known of a step on the host without waiting for the device.

    Attributes:
        epoch: From 0.
        step: Within the epoch, from 0; a run that goes on inside an epoch counts on.
        updates: Optimizer updates since the start of the run, this step's included.
        is_update: Whether the optimizer takes a step after it.
        lr: Rate of its update.
        names: Names of the loss terms, in the order of ``losses``.
        losses: float32 [len(names)], on the device; reading them on the host waits for it.
        images: float [3, H, W] each, as the model gets them.
        targets: One dict per image, torchvision's targets.
    """

    epoch: int
    step: int
    updates: int
    is_update: bool
    lr: float
    names: list[str]
    losses: Tensor
    images: list[Tensor]
    targets: list[dict[str, Any]]


class Tracker:
    """Told how a training goes, on every process that has it; this one does nothing."""

    def on_step(self, record: StepRecord) -> None:
        """Hear of a step whose gradients are there and whose update is not made yet."""

    def on_update(self, record: StepRecord, may_save: Callable[[], bool]) -> None:
        """Hear of an update; ``may_save`` waits for the device and says whether the run goes on from here."""

    def on_epoch(self, epoch: int, averages: dict[str, float]) -> None:
        """Hear of a finished epoch: its averages, see `EpochLog.finish`."""

    def on_scores(self, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Hear of an epoch's evaluation: its averages again, and `Evaluation.to_plain`; None: of no epoch."""


@dataclass
class LastScores(Tracker):
    """Keeps the last evaluation's figures."""

    scores: dict[str, Any] = field(default_factory=dict)

    def on_scores(self, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Keep them."""
        self.scores = scores


@dataclass
class CallEachStep(Tracker):
    """Calls a function in every step."""

    function: Callable[[], None]

    def on_step(self, record: StepRecord) -> None:
        """Call it."""
        self.function()


@dataclass
class JsonlTracker(Tracker):
    """Writes ``metrics.jsonl``: a line for each epoch with its losses and times, and its scores where it has some."""

    folder: Path

    def on_epoch(self, epoch: int, averages: dict[str, float]) -> None:
        """Add the epoch's line."""
        self._append(epoch, averages, {})

    def on_scores(self, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Write the epoch's line again, with its scores."""
        self._append(epoch, averages, scores)

    def _append(self, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Add the line; a full disk costs it, not the training."""
        try:
            append_metrics(self.folder, epoch, averages, scores)
        except OSError as error:
            logger.error("no line for epoch %d: %s", epoch, describe_error(error))


class TensorBoardTracker(Tracker):
    """Writes TensorBoard events.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(folder))

    def on_epoch(self, epoch: int, averages: dict[str, float]) -> None:
        """Write the epoch's losses and times."""
        self._write("train", averages, epoch)

    def on_scores(self, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Write the scores of each kind."""
        for kind in LOGGED_KINDS:
            self._write(kind, scores.get(kind, {}), epoch)

    def _write(self, kind: str, values: dict[str, Any], epoch: int | None) -> None:
        try:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{kind}/{name}", value, epoch)
            self.writer.flush()
        except OSError as error:
            logger.error("no TensorBoard events for epoch %d: %s", epoch, describe_error(error))


def build_trackers(folder: Path) -> list[Tracker]:
    """Return the trackers that write into a run's folder; TensorBoard's only where it is installed."""
    trackers: list[Tracker] = [JsonlTracker(folder)]
    try:
        trackers.append(TensorBoardTracker(folder))
    except ImportError:
        logger.info("no TensorBoard events; pip install tensorboard for them")
    return trackers


def append_metrics(folder: Path, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``: an epoch's losses and times, and `Evaluation.to_plain`.

    Lines of this epoch and of later ones, left by a run that was continued from an older checkpoint, go.

    Args:
        folder: The run's folder; is made.
        epoch: From 0; None for an evaluation alone.
        averages: The epoch's mean losses, times and learning rate by name, see `EpochLog.finish`.
        scores: The evaluation's figures, see `Evaluation.to_plain`; empty for an epoch without evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*read_metrics(folder), {"epoch": epoch, "train": averages, **scores}]
    if epoch is not None:
        lines = [line for line in lines[:-1] if line["epoch"] is None or line["epoch"] < epoch] + lines[-1:]
    write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; one that was cut off by a full disk or a kill is left out."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
