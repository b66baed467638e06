"""The proof that a run which is interrupted and continued ends up like one that never stopped, to the last bit.

The run's own code does the training, saving and rebuilding; this file only notes losses, asks it to stop, and compares.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint import NEWEST, load_checkpoint, open_checkpoint
from runtime.signals import StopRequest
from runtime.trackers import StepRecord, Tracker
from utils import all_reduce_max, barrier, broadcast_json, rank

logger = logging.getLogger(__name__)


class ResumeCheckError(ValueError):
    """The check could not be made; the text says why."""


class Probe(StopRequest, Tracker):
    """Notes the losses of every step and asks to stop after some updates.

    Args:
        num_updates: Counted from the start of the run.
    """

    def __init__(self, num_updates: int) -> None:
        super().__init__()
        self.num_updates = num_updates
        self.losses: list[list[str]] = []

    def on_step(self, record: StepRecord) -> None:
        """Note a step's losses."""
        self.losses.append([value.hex() for value in record.losses.tolist()])
        if record.is_update and record.updates >= self.num_updates:
            self.signal_name = "the check of resuming"


def hash_state(value: Any) -> str:
    """Return the SHA-256 over all tensors and plain values in nested dicts and lists, in their order."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        """Hash a value and everything in it."""
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def check_resume(train: Callable[[str, str, Probe], int], resume: str, num_updates: int) -> bool:
    """Train without and with an interruption, print the hashes of losses and weights, and say whether they are equal.

    Everything is written into a temporary folder, which is removed; where there are several machines they must share
    the folder for temporary files (TMPDIR). All processes must call it.

    Args:
        train: Builds everything anew and trains: of (output folder, checkpoint to continue from, probe) to exit code.
        resume: Checkpoint that both runs start from; an empty text for none.
        num_updates: Length of both runs; the interruption is in the middle.

    Raises:
        ResumeCheckError: There was nothing to train, or a run failed.
        CheckpointError: ``resume`` cannot be used.
    """
    holder = tempfile.TemporaryDirectory(prefix="verify-resume-") if rank() == 0 else None
    try:
        folder = Path(broadcast_json(holder.name if holder is not None else None))
        checkpoint, _ = open_checkpoint(resume, None)
        start = checkpoint["progress"]["updates"] if checkpoint is not None else 0
        whole, first = Probe(start + num_updates), Probe(start + num_updates // 2)
        second = Probe(start + num_updates)
        logger.info("resuming is checked: %d updates without an interruption", num_updates)
        codes = [train(str(folder / "whole"), resume, whole)]
        logger.info("the same with an interruption after update %d", first.num_updates)
        codes.append(train(str(folder / "parts"), resume, first))
        newest = folder / "parts" / "weights" / NEWEST
        codes.append(train(str(folder / "parts"), str(newest), second))
        if any(codes) or not whole.losses:
            raise ResumeCheckError(f"the check of resuming could not train (exit codes {codes}); see the lines above")
        return _compare(whole.losses, first.losses, second.losses, folder)
    finally:
        if holder is not None:
            holder.cleanup()


def _compare(whole: list[list[str]], first: list[list[str]], second: list[list[str]], folder: Path) -> bool:
    """Print both hashes of losses and weights; returns whether all processes found them equal."""
    barrier()  # the first process may still be writing
    parts = [*first, *second]
    step = next((k for k, (a, b) in enumerate(zip(whole, parts)) if a != b), min(len(whole), len(parts)))
    same_losses = whole == parts
    states = [load_checkpoint(folder / name / "weights" / NEWEST) for name in ("whole", "parts")]
    weights = [hash_state(state["model"]) for state in states]
    optimizers = [hash_state([state["optimizer"], state["scaler"], state.get("model_ema")]) for state in states]
    logger.info("steps: %d without an interruption, %d + %d with one", len(whole), len(first), len(second))
    for name, losses, digest in zip(("uninterrupted", "continued"), (whole, parts), weights):
        logger.info("%-13s  losses %s  weights %s", name, hash_state(losses), digest)
    if not same_losses:
        here = [losses[step] if step < len(losses) else "missing" for losses in (whole, parts)]
        logger.warning("the losses differ first in step %d: %s uninterrupted, %s continued", step, *here)
    if optimizers[0] != optimizers[1]:
        logger.warning("the states of optimizer, scaler or averaged weights differ")
    differs = not same_losses or weights[0] != weights[1] or optimizers[0] != optimizers[1]
    return not bool(all_reduce_max(torch.tensor([float(differs)])))
