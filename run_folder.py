"""The folder of a run: where it lies and what is written into it beside checkpoints."""

import datetime
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coco_eval import EvalResult
from eval_report import Report
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


def describe_scores(result: EvalResult, report: Report | None, intervals: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation as plain values: every figure by name, and beside them what they depend on."""
    described: dict[str, Any] = {**result.metrics, "per_class": result.per_class, "intervals": intervals}
    described |= {"keypoint_errors": result.keypoint_errors, "settings": {**result.settings, **versions()}}
    return described | (report.to_plain() if report is not None else {})


def append_metrics(folder: Path, epoch: int | None, averages: dict[str, float], scores: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``: the epoch's losses and times, and `describe_scores`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": epoch, "train": averages, **scores}) + "\n")


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a command line as values that json and checkpoints take."""
    return {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in flags.items()}
