"""Counts, on any machine, the operations that a device would get and what would make the host wait for it.

Two kinds of waits are found: values that the host reads (sizes that depend on data among them), and ordinary memory
that is copied to the device. On a CPU both sides are the same memory, so this file keeps its own books. A tensor is
the host's where it was made without a device and from no tensor of the device, such as ``torch.tensor([1])``; all
others, and whatever was there before, are the device's.

Not seen: whether memory is page-locked. Copies with ``non_blocking`` are counted by themselves, as copies.
"""

import contextlib
import functools
import sys
from collections import Counter

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import boxes

from models import proposal_step
from optimization.step import StepOptions, update_parameters

# Operators whose result the host must know before it can go on, as they appear below autograd.
_READING_OPS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "nms",
    "bincount",
}  # fmt: skip
# What Python code calls to read values, where no operator shows it.
_READING_CALLS = {"tolist", "numpy", "cpu", "__array__"}
_FROM_PYTHON = {"tensor", "as_tensor", "asarray", "new_tensor"}
_FROM_MEMORY = {"from_numpy", "frombuffer"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# The parts of a detector by the names of its modules, and by files where no module of its own is called.
_PART_OF_MODULE = {
    "transform": "transform", "backbone": "backbone", "rpn": "rpn", "roi_heads": "roi heads", "head": "head",
    "anchor_generator": "anchors",
}  # fmt: skip
_PART_OF_FILE = {"batched_pictures.py": "transform", "anchor_cache.py": "anchors"}
# Operators that may have tensors of both sides.
_MIXING_OPS = {"copy_", "where", *_INDEXING}


class Count(TorchDispatchMode):
    """What is issued within a ``with`` block.

    Attributes:
        operations: How many, by part; views are none of them, a copy to the device is one.
        waits: What the host waits for, by (part, name).
        places: The same by the line of code that asked for it: (file, line, name).
        copies: Copies to the device with ``non_blocking``, by part.
        mixed: Operators that got tensors of both sides and would fail on a device, by name.
        part: What runs now: set it to have counts apart. Of "losses" what the files of other parts do is theirs.
    """

    def __init__(self):
        super().__init__()
        self.clear()
        self.part = "all"
        self._calls = _Calls(self)
        self._host = {}  # the host's storages by their addresses, which may be used again when they are gone
        self._makes_host = False  # whether what a Python call makes from nothing is the host's

    def clear(self):
        """Start again from 0; which tensors are the host's is kept."""
        self.operations, self.waits, self.places = Counter(), Counter(), Counter()
        self.copies, self.mixed = Counter(), Counter()

    def __enter__(self):
        self._from_memory = {name: getattr(torch, name) for name in _FROM_MEMORY}  # no mode sees these
        for name, function in self._from_memory.items():
            setattr(torch, name, functools.partial(self._of_host, function))
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)
        for name, function in self._from_memory.items():
            setattr(torch, name, function)

    def _of_host(self, function, *args, **kwargs):
        result = function(*args, **kwargs)
        self.mark(result, True)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().split("::")[1].split(".")[0], kwargs or {}
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        hosts = [self.is_host(a) for a in inputs]
        if not (func.is_view or name == "_unsafe_view"):
            self.operations[self._part()] += 1
        if inputs and not all(hosts):
            self._look(name, args, kwargs, [a for a, host in zip(inputs, hosts) if host])
        result = func(*args, **kwargs)
        known = {_address(a) for a in inputs}
        for output in tree_leaves(result):
            if isinstance(output, Tensor) and _address(output) not in known:
                self.mark(output, all(hosts) if inputs else self._makes_host)
        return result

    def _look(self, name, args, kwargs, of_host):
        """Find waits of an operator that has tensors of the device."""
        if name in _INDEXING:
            places = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in places):
                self.wait(name)
            elif of_host and not self.is_host(args[0]):
                self.wait(f"{name} with the host's tensor", copies=len(of_host))
        elif name == "copy_":
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if self.is_host(args[0]):
                self.wait(name)
            elif of_host:
                self.to_device(name, non_blocking)
        elif name == "where" and of_host:  # a single value that is moved first
            self.wait(f"{name} with the host's tensor", copies=len(of_host))
        elif name in _READING_OPS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        if name not in _MIXING_OPS and any(tensor.dim() for tensor in of_host):
            self.mixed[name] += 1

    def _part(self):
        if self.part == "losses":
            frame = sys._getframe(1)
            while frame is not None:
                part = _PART_OF_FILE.get(frame.f_code.co_filename.rpartition("/")[2])
                if part:
                    return part
                frame = frame.f_back
        return self.part

    def is_host(self, tensor):
        storage = self._host.get(_address(tensor))
        return storage is not None and not storage.expired()

    def mark(self, tensor, is_host):
        """Note on which side a new tensor is."""
        address = _address(tensor)
        if is_host and address:  # an empty one has none
            self._host[address] = StorageWeakRef(tensor.untyped_storage())
        else:
            self._host.pop(address, None)

    def wait(self, name, copies=0):
        self.waits[self._part(), name] += 1
        self.operations[self._part()] += copies
        self.places[(*_caller(), name)] += 1

    def to_device(self, name, non_blocking):
        """Note a copy from the host's memory to the device."""
        self.operations[self._part()] += 1
        if non_blocking:
            self.copies[self._part()] += 1
        else:
            self.waits[self._part(), name] += 1
            self.places[(*_caller(), name)] += 1


class _Calls(TorchFunctionMode):
    """Sees what Python code asks for, devices that it names among it."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs, count = getattr(func, "__name__", ""), kwargs or {}, self.count
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        on_device = [tensor for tensor in tensors if not count.is_host(tensor)]
        # A device that is given as an object may be any: fused optimizers move their flags to the parameters' own.
        devices = [a for a in [*args[1:], *kwargs.values()] if isinstance(a, torch.device) or a in ("cpu", "cuda")]
        to_host, names_device = "cpu" in devices, any(isinstance(d, torch.device) for d in devices)
        if name in _READING_CALLS or (name == "to" and to_host and not kwargs.get("non_blocking")):
            if on_device:
                count.wait(name)
        elif name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if on_device and any(isinstance(i, list) or type(i).__module__ == "numpy" for i in index):
                count.wait("index by a list", copies=1)
        before, count._makes_host = count._makes_host, not (on_device or names_device)
        try:
            result = func(*args, **kwargs)
        finally:
            count._makes_host = before
        if name in _FROM_PYTHON and not any(isinstance(a, Tensor) for a in args[name == "new_tensor" :]):
            goes = names_device or (name == "new_tensor" and bool(on_device))
            if goes:
                count.to_device(name, non_blocking=False)
            count.mark(result, not goes)
        elif name in ("to", "as_tensor") and names_device and tensors and not on_device:
            count.to_device(name, kwargs.get("non_blocking", False))
            if _address(result) == _address(tensors[0]):
                with torch.utils._python_dispatch._disable_current_modes():
                    result = result.clone()
            count.mark(result, False)
        return result


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def _caller():
    """Return file and line of the innermost code outside of torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__ and not file.startswith("<"):
            return "/".join(file.split("/")[-2:]), frame.f_lineno
        frame = frame.f_back
    return "?", 0


def count_waits(function):
    """Run ``function`` and return a Counter of the waits in it, by name."""
    with Count() as count:
        function()
    found = Counter()
    for (_, name), number in count.waits.items():
        found[name] += number
    return found


class StepCount(Count):
    """What one training step of a detector issues: see `count_step`."""

    def forward(self, *not_bookkeeping):
        """Return the operations of the forward pass outside of some parts."""
        outside = {"backward", "update", *not_bookkeeping}
        return sum(number for part, number in self.operations.items() if part not in outside)

    def waits_of(self, *parts):
        """Return the waits of some parts; without any, of the whole step."""
        return sum(number for (part, _), number in self.waits.items() if not parts or part in parts)


@contextlib.contextmanager
def as_on_a_gpu():
    """Let torchvision's code and ours take the way of a GPU where CPUs have one of their own: one call of nms, not many."""
    places = [(boxes, "_batched_nms_vanilla", boxes._batched_nms_coordinate_trick)]
    places.append((proposal_step, "calls_nms_once", lambda device: True))
    saved = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, saved):
            setattr(module, name, value)


def count_step(model, images, targets, optimizer):
    """Count forward, by part, backward and update, after a step with the first two pictures that fills what is kept.

    Args:
        model: A detector in training mode.
        images: As the loader gives them, two or more.
        targets: Likewise.
        optimizer: With fused kernels.

    Returns:
        A `StepCount`. The parts of the forward are those of the model, and "losses" for what is in none.
    """
    count, handles = StepCount(), []
    for module in model.modules():
        for value in vars(module).values():  # neither parameters nor buffers: they do not move with the model
            if isinstance(value, list):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        count.mark(tensor, True)
    for name, part in _PART_OF_MODULE.items():
        if isinstance(module := getattr(model, name, None), torch.nn.Module):
            handles += _count_apart(module, part, count)
    try:
        with as_on_a_gpu(), count:
            for number in (2, len(images)):
                count.clear()
                count.part = "losses"
                losses = model(images[:number], targets if number == len(images) else targets[:number])
                count.part = "backward"
                sum(losses.values()).backward()
                count.part = "update"
                update_parameters(optimizer, StepOptions(), images[0].new_zeros(()))
    finally:
        for handle in handles:
            handle.remove()
    return count


def _count_apart(module, part, count):
    """Let a module's operations be a part of their own, unless it is called by one that is."""
    outer = []

    def enter(*_):
        outer.append(count.part)
        if count.part == "losses":
            count.part = part

    def leave(*_):
        count.part = outer.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
