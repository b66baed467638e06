"""A running average of the weights (EMA), which scores steadier than the weights themselves."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of a model's weights and running statistics.

    Early in a run the average would be mostly random start weights: the decay grows as (1 + n) / (10 + n) with the
    number n of updates, up to ``decay`` (as TensorFlow's ExponentialMovingAverage does with ``num_updates``).

    Args:
        model: Its weights are where the average starts; bare, not in DDP, on its device.
        decay: Share of the old average that stays, in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model: nn.Module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the weights of ``model`` after ``updates`` optimizer updates; waits for nothing.

        Not torch's ``AveragedModel``: it moves its counter to the device in every update, and waits for that.
        """
        kept = min(self.decay, (1 + updates) / (10 + updates))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [current for _, current in floats], 1 - kept)
        for average, current in pairs:
            if not average.is_floating_point():  # counters
                average.copy_(current)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
