"""The folder of a run: where it lies and what is written into it beside checkpoints."""

import contextlib
import datetime
import functools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.checkpoint import CheckpointFolder, lock_folder, write_atomically
from utils import broadcast_json, rank, versions, world_size

logger = logging.getLogger(__name__)

SCORE_KINDS = ("bbox", "segm", "keypoints", "val_loss")

# Folders of the newest and of the best evaluation's files, below the run's.
NEWEST, BEST = "eval", "best"
SUMMARY = "summary.json"


@functools.cache
def is_installed(library: str) -> bool:
    """Return whether an optional library is there; its absence is logged once, with the command that installs it."""
    if find_spec(library) is not None:
        return True
    logger.warning("%s is not installed, what needs it is left out: pip install %s", library, library)
    return False


def choose_output_dir(given: str | None, *, dataset: str, model: str, root: Path) -> Path | None:
    """Return the run's folder, the same on all processes; None saves nothing.

    Args:
        given: ``--output-dir``; an empty text saves nothing.
        dataset: Name of the dataset.
        model: Name of the model.
        root: Of the dataset; a custom dataset keeps its results beside it.
    """
    if given is not None:
        return Path(given) if given else None
    if dataset == "custom":
        return root / "result"
    started = time.time()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # restarts by one torchrun share a folder
        started = Path(f"/proc/{os.getppid()}").stat().st_mtime
    stamp = datetime.datetime.fromtimestamp(started).strftime("%Y%m%d-%H%M%S")
    return Path(broadcast_json(f"runs/{dataset}-{model}-{stamp}"))


class RunFolder:
    """The folder that a training writes into; only the first process writes, and only it may.

    Args:
        path: The folder, the same on all processes.
        keep: How many ``model_N.pth`` stay; 0 keeps all.

    Raises:
        ValueError: Another run writes there.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.lock = lock_folder(path) if rank() == 0 else None
        self.checkpoints = CheckpointFolder(path / "weights", keep) if rank() == 0 else None
        self.events = _open_events(path) if rank() == 0 else None
        self.saved_at = time.monotonic()

    @property
    def last_save_failed(self) -> bool:
        """Whether the newest state is not on the disk."""
        return self.checkpoints is not None and self.checkpoints.last_save_failed

    def best_epoch(self) -> int | None:
        """Return the epoch that ``best/`` and ``weights/best.pth`` are of, the same on all processes."""
        return broadcast_json(read_summary(self.path / BEST).get("epoch"))

    def save(self, content: dict[str, Any], *, epoch_done: int | None = None, is_best: bool = False) -> None:
        """Write a checkpoint, see `CheckpointFolder.save`."""
        if self.checkpoints is not None:
            self.checkpoints.save(content, epoch_done=epoch_done, is_best=is_best)
        self.saved_at = time.monotonic()

    def write_args(self, flags: dict[str, Any]) -> None:
        """Write ``args.json``: flags, command line, versions, git commit of the suite, host and time."""
        if rank() != 0:
            return
        content = {
            "args": flags,
            "command": shlex.join(sys.argv),
            "versions": {**versions(), "python": platform.python_version()},
            "git_commit": _git_commit(),
            "processes": world_size(),
            "host": platform.node(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "args.json").write_text(json.dumps(content, indent=1) + "\n")

    def add_epoch(self, epoch: int, averages: dict[str, float], scores: dict[str, Any]) -> None:
        """Note an epoch's losses and times and its scores, see `append_metrics`."""
        if rank() != 0:
            return
        append_metrics(self.path, epoch, averages, scores)
        if self.events is not None:
            figures = {"train": averages, **{kind: scores[kind] for kind in SCORE_KINDS if kind in scores}}
            for kind, values in figures.items():
                for name, value in values.items():
                    if isinstance(value, float):
                        self.events.add_scalar(f"{kind}/{name}", value, epoch)
            self.events.flush()


def append_metrics(folder: Path, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``: an epoch's losses and times, and `Scored.to_plain`.

    Lines of this epoch and of later ones, left by a run that was continued from an older checkpoint, go.

    Args:
        folder: Of the run.
        epoch: From 0; None for an evaluation alone.
        averages: See `train_one_epoch`.
        scores: See `Scored.to_plain`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*read_metrics(folder), {"epoch": epoch, "train": averages, **scores}]
    if epoch is not None:
        lines = [line for line in lines[:-1] if line["epoch"] is None or line["epoch"] < epoch] + lines[-1:]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _open_events(path: Path) -> Any:
    """Return a TensorBoard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events; pip install tensorboard for them")
        return None
    return SummaryWriter(log_dir=str(path))


def _git_commit() -> str | None:
    """Return the commit of the suite's own files, with a + where they differ from it; None outside git."""
    here = Path(__file__).parent.parent
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what stands in an evaluation's ``summary.json``: epoch and `Scored.to_plain`; empty where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid json ({error})") from None
    return content if isinstance(content, dict) else {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; one that was cut off by a full disk or a kill is left out."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a command line as values that json and checkpoints take."""
    return {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in flags.items()}
