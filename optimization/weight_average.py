"""A running average of the weights (EMA), which scores steadier than the weights themselves."""

import copy
from collections.abc import Iterator

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
        self._paired: tuple[nn.Module, _Places, _Places] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the weights of ``model`` after ``updates`` optimizer updates; waits for nothing.

        Not torch's ``AveragedModel``: it moves its counter to the device in every update, and waits for that.

        Args:
            model: With the modules that it had when the average began.
            updates: How many updates its weights have seen.
        """
        kept = min(self.decay, (1 + updates) / (10 + updates))
        if self._paired is None or self._paired[0] is not model:  # a walk through a model takes some milliseconds
            self._paired = model, _Places(self.model), _Places(model)
        _, average, current = self._paired
        torch._foreach_lerp_(average.floats(), current.floats(), 1 - kept)
        if average.counters():
            torch._foreach_copy_(average.counters(), current.counters())


class _Places:
    """Where a model keeps its parameters and buffers: moving or loading it may put other tensors there.

    Args:
        model: Its modules stay.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        parameters = [(modules[path]._parameters, name) for path, name in _split(model.named_parameters())]
        buffers = [(modules[path]._buffers, name) for path, name in _split(model.named_buffers())]
        places: list[tuple[dict[str, Tensor], str]] = [*parameters, *buffers]
        self._floats = [(owner, name) for owner, name in places if owner[name].is_floating_point()]
        self._counters = [(owner, name) for owner, name in places if not owner[name].is_floating_point()]

    def floats(self) -> list[Tensor]:
        """Return the weights and running statistics."""
        return [owner[name] for owner, name in self._floats]

    def counters(self) -> list[Tensor]:
        """Return the buffers of whole numbers, such as batch norm's count of batches."""
        return [owner[name] for owner, name in self._counters]


def _split(named: Iterator[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Return (path of the module, name in it) of parameters or buffers."""
    parts = [name.rpartition(".") for name, _ in named]
    return [(path, name) for path, _, name in parts]
