"""A running average of the weights (EMA), which scores steadier than the weights themselves."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """The exponential moving average of a model's weights and running statistics.

    Early in a run the average would be mostly random start weights: the decay grows as (1 + n) / (10 + n) with the
    number n of updates, up to ``decay`` (as TensorFlow's ExponentialMovingAverage does with ``num_updates``).

    Args:
        model: Whose weights are averaged; bare, on its device.
        decay: Share of the old average that stays, in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True)
        self._averaged.update_parameters(model)  # the first call copies
        self.model: nn.Module = self._averaged.module.eval()

    @torch.no_grad()
    def _blend(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1 - kept)
        else:  # counters
            torch._foreach_copy_(list(averaged), list(current))

    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the weights of ``model`` after ``updates`` optimizer updates; waits for nothing."""
        self.updates = updates
        self._averaged.update_parameters(model)
