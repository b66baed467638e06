"""The folder of a run: where it lies and what is written into it beside checkpoints."""

import datetime
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coco_eval import EvalResult
from utils import broadcast_json


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


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "pycocotools", "numpy", "pillow")}


def append_metrics(folder: Path, epoch: int | None, averages: dict[str, float], result: EvalResult) -> None:
    """Add a line to ``metrics.jsonl``: the epoch's losses and times, every figure by name, and what it depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {"epoch": epoch, "train": averages, **result.metrics}
    line |= {"per_class": result.per_class, "settings": {**result.settings, **versions()}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a command line as values that json and checkpoints take."""
    return {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in flags.items()}
