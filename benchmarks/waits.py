"""Counts what would make the host wait for a GPU, on any device: values read, sizes that depend on data."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host must know before it can go on, as they appear below autograd.
_WAITING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "nms"}
# What Python code calls to read values, where no operator shows it.
_READING_CALLS = {"tolist", "numpy", "cpu", "__array__"}


class _Operators(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        is_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in _WAITING_OPS or is_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        # A device that is given as an object may be any: fused optimizers move their flags to the parameters' own.
        to_host = name == "to" and "cpu" in [*args[1:], *kwargs.values()] and not kwargs.get("non_blocking")
        if name in _READING_CALLS or to_host:
            self.counts[name] += 1
        return func(*args, **kwargs)


def count_waits(function):
    """Run ``function`` and return a Counter of the waits in it."""
    counts = Counter()
    with _Calls(counts), _Operators(counts):
        function()
    return counts
