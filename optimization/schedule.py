"""The learning rate, a pure function of the run's position, and its warm-up."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SCHEDULERS = ("multisteplr", "cosineannealinglr")

# The rate that warm-up starts from, as a share of the full one.
WARMUP_START = 1 / 1000


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of epoch and number of updates.

    Attributes:
        base: The full rate.
        epochs: Length of the run.
        scheduler: ``multisteplr``: times ``gamma`` at each of ``milestones``; ``cosineannealinglr``: down to 0
            at the end of the run. Both change between epochs.
        milestones: Epochs.
        gamma: Factor of the rate at each milestone; ``multisteplr`` only.
        warmup_iters: Over so many updates the rate climbs linearly from `WARMUP_START` of itself.
    """

    base: float
    epochs: int
    scheduler: str = "multisteplr"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_iters: int = 0

    def at(self, epoch: int, updates: int) -> float:
        """Return the rate for the update after ``updates`` others, in ``epoch``."""
        if self.scheduler == "multisteplr":
            factor = self.gamma ** bisect.bisect_right(sorted(self.milestones), epoch)
        elif self.scheduler == "cosineannealinglr":
            factor = 0.5 * (1 + math.cos(math.pi * min(epoch, self.epochs) / self.epochs))
        else:
            raise ValueError(f"unknown scheduler {self.scheduler!r}; expected one of {', '.join(SCHEDULERS)}")
        if updates < self.warmup_iters:
            factor *= WARMUP_START + (1 - WARMUP_START) * updates / self.warmup_iters
        return self.base * factor

    def set(self, optimizer: torch.optim.Optimizer, epoch: int, updates: int) -> float:
        """Set and return the rate of all parameter groups."""
        rate = self.at(epoch, updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def default_warmup(updates_per_epoch: int) -> int:
    """Return torchvision's warm-up length: 1000 updates, at most the first epoch; none for a one-update epoch."""
    return min(1000, updates_per_epoch - 1)
