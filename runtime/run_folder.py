"""The folder of a run: where it lies and what is written into it beside checkpoints."""

import datetime
import functools
import itertools
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

from files import write_aside
from runtime.checkpoint import CheckpointFolder, lock_folder
from runtime.trackers import METRICS, Tracker, build_trackers
from utils import broadcast_json, log_to_file, meet, rank, versions, world_size

logger = logging.getLogger(__name__)

# Folders of the newest and of the best evaluation's files, below the run's.
NEWEST_EVAL, BEST_EVAL = "eval", "best"
SUMMARY = "summary.json"
ARGS = "args.json"


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
        root: Folder of the dataset; the results of a custom dataset go below it.
    """
    if given is not None:
        return Path(given) if given else None
    if dataset == "custom":
        return root / "result"
    started = datetime.datetime.now()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # restarts by one torchrun share a folder
        started = _start_of(os.getppid())
    stamp = started.strftime("%Y%m%d-%H%M%S")
    if "SLURM_JOB_ID" in os.environ:  # the tasks of an array start in the same second
        stamp += f"-job{os.environ['SLURM_JOB_ID']}"
    return Path(broadcast_json(f"runs/{dataset}-{model}-{stamp}"))


def _start_of(process: int, folder: Path = Path("/proc")) -> datetime.datetime:
    """Return when a process started, the same at every call.

    Args:
        process: Its id.
        folder: Where Linux shows processes; ``ps`` is asked where there is none, as on macOS.
    """
    if (folder / str(process)).exists():
        return datetime.datetime.fromtimestamp((folder / str(process)).stat().st_mtime)
    call = ["ps", "-o", "lstart=", "-p", str(process)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    return datetime.datetime.strptime(done.stdout.strip(), "%a %b %d %H:%M:%S %Y")


class RunFolder:
    """The folder that a training writes into; only the first process writes, and only it may.

    A run that is not continued is never written over: its folder is moved aside, whole.

    Args:
        path: The folder, the same on all processes; None writes nothing.
        keep: How many ``model_N.pth`` stay; 0 keeps all.
        resumed_from: The checkpoint that the run continues from; one in the folder means that its run goes on.

    Raises:
        ValueError: Another run writes there, or the run that is there cannot be moved aside.
    """

    def __init__(self, path: Path | None, keep: int = 0, *, resumed_from: Path | None = None) -> None:
        self.path = path
        self.trackers: list[Tracker] = []
        self.checkpoints: CheckpointFolder | None = None
        self.saved_at = time.monotonic()
        if path is None or rank() != 0:
            return
        self.lock = lock_folder(path)
        is_continued = resumed_from is not None and resumed_from.resolve().is_relative_to(path.resolve())
        if holds_run(path) and not is_continued:
            aside = move_aside(path)
            self.lock.close()
            self.lock = lock_folder(path)
            logger.warning("%s held a run that is not continued (--resume auto would): it is now %s", path, aside)
        log_to_file(path / "log.txt")
        self.checkpoints = CheckpointFolder(path / "weights", keep, resumed_from=resumed_from if is_continued else None)
        self.trackers = build_trackers(path)

    @property
    def last_save_failed(self) -> bool:
        """Whether the newest state is not on the disk."""
        return self.checkpoints is not None and self.checkpoints.last_save_failed

    def best_epoch(self) -> int | None:
        """Return the epoch that ``weights/best.pth`` is of, the same on all processes; None without a readable one."""
        meet("prepare the run's folder")
        return broadcast_json(self.checkpoints.best_epoch() if self.checkpoints is not None else None)

    def save(self, content: dict[str, Any], *, epoch_done: int | None = None, is_best: bool = False) -> None:
        """Write a checkpoint, see `CheckpointFolder.save`."""
        if self.checkpoints is not None:
            self.checkpoints.save(content, epoch_done=epoch_done, is_best=is_best)
        self.saved_at = time.monotonic()

    def write_args(self, flags: dict[str, Any]) -> None:
        """Write ``args.json``: flags, command line, versions, git commit of the suite, host and time."""
        if self.path is None or rank() != 0:
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
        with write_aside(self.path / ARGS) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def holds_run(folder: Path) -> bool:
    """Return whether a training or an evaluation has written into a folder."""
    return (folder / METRICS).exists() or any((folder / "weights").glob("*.pth"))


def move_aside(folder: Path) -> Path:
    """Rename a run's folder to its name with the time of its start, and return the new name.

    Raises:
        ValueError: It cannot be moved.
    """
    remedy = "continue it with --resume auto, or choose another --output-dir"
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: holds a run, and cannot be moved aside as it is the working folder; {remedy}")
    try:
        started = datetime.datetime.fromisoformat(json.loads((folder / ARGS).read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        started = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
    name = f"{folder.name}_{started:%Y%m%d-%H%M%S}"
    aside = folder.with_name(name)
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = folder.with_name(f"{name}-{number}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise ValueError(f"{folder}: holds a run, and cannot be moved aside ({error.strerror}); {remedy}") from None
    return aside


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
    """Return what stands in an evaluation's ``summary.json``: epoch and `Evaluation.to_plain`; {} if there is none.

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


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a command line as values that json and checkpoints take."""
    return {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in flags.items()}
