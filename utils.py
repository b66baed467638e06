"""Processes, collectives, seeds, log and help output: what every other file stands on.

World size 1 is the ordinary case: without a process group every collective returns its input at once, so
callers hold no ``if distributed``. Nothing here knows about images, models or metrics.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from process.device import use_device
from process.joining import join_group, launched_ranks
from process.log_lines import LinesAboveBars, LogFile, close_stdout, is_of_each_process
from process.waiting import EXIT_SIGNAL, GRACE_OF_MEETINGS, Stopped, noted_signal, signals_raise, wait_until

logger = logging.getLogger(__name__)

# How long a rank waits for the others. Evaluation on rank 0 may take minutes; a hang must still end.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Distributed:
    """Who this process is.

    Attributes:
        rank: Number of this process among all, from 0.
        local_rank: Number of this process on its machine, from 0.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each flag's help, unless it is None, False or an empty text, which say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def _raise(error: OSError) -> None:
    raise error


def setup_logging(is_main: bool, on_lost: Callable[[OSError], None] = _raise) -> None:
    """Send the log to stdout, one plain line per message.

    The first process says all from INFO on, the first of each other machine warnings, and all others what differs from
    process to process, see `is_of_each_process`.

    Args:
        is_main: Whether this is the first process.
        on_lost: Called with the error when stdout takes no more: a closed pipe, a full disk; by default it is raised.
    """
    handler = LinesAboveBars(sys.stdout, on_lost)
    prefix = "" if is_main else f"[rank {launched_ranks()[0]}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    if launched_ranks()[1] != 0:
        handler.addFilter(is_of_each_process)
    # What is said before the run has a folder waits here for its log file.
    early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, handlers=[handler, early], force=True)


def log_to_file(path: Path) -> None:
    """Write all that was and will be logged by this process at the end of a file, with the time of every line."""
    root = logging.getLogger()
    file = LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    for handler in root.handlers[:]:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
        if isinstance(handler, (logging.handlers.MemoryHandler, logging.FileHandler)):
            root.removeHandler(handler)
    root.addHandler(file)


def run_command(program: str, main: Callable[[Any], int], args: Any, *, aftermath: str = "", stopped: str = "") -> int:
    """Return the exit code of ``main(args)``: every end but that of a bug is one line on stderr and a code.

    An expected error gives 1. SIGINT and SIGTERM give 130 and 143, after what was half written is removed. A closed
    pipe, as with ``| head``, gives 141 without a word; where only log lines went into it the work is done first.

    Args:
        program: Name of the command, at the start of that line.
        main: Does the command's work.
        args: Its parsed flags.
        aftermath: What the line adds after an error, such as that nothing was written.
        stopped: What it adds after a signal.
    """
    cut_off: list[OSError] = []

    def note_cut_off(error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            raise error
        cut_off.append(error)

    setup_logging(is_main=True, on_lost=note_cut_off)
    try:
        with signals_raise():
            code = main(args)
            sys.stdout.flush()
            return code or (EXIT_SIGNAL + signal.SIGPIPE if cut_off else 0)
    except Stopped as stop:
        close_stdout()  # what was not printed until now is not wanted
        print_error(f"{program}: {stop}{stopped}")
        return stop.exit_code
    except BrokenPipeError:
        close_stdout()
        return EXIT_SIGNAL + signal.SIGPIPE
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print_error(f"{program}: error: {describe_error(error)}{aftermath}")
        if isinstance(error, OSError):
            close_stdout()
        return 1


def print_error(text: str) -> None:
    """Print lines to stderr in one piece, as other processes of the run write there too.

    Where nobody reads them the exit code alone must do.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")


def describe_error(error: BaseException) -> str:
    """Return an error as one line; of the system's, the file and what is wrong with it."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    advice = {
        errno.ENOSPC: "; make room, or choose another disk",
        errno.EDQUOT: "; make room, or choose another disk",
        errno.EACCES: "; its owner or its rights forbid it",
    }
    return f"{place}{error.strerror}{advice.get(error.errno or 0, '')}"


def init_distributed(device: torch.device, dist_url: str = "env://") -> Distributed:
    """Join the process group that torchrun or SLURM describes; do nothing in a single process.

    NCCL carries CUDA tensors and gloo CPU tensors in one group. A torchrun restart reuses the address of the
    attempt before it, where dead ranks have left their entries: every attempt gets its own store prefix
    (https://github.com/pytorch/pytorch/issues/167288), see `_name_attempt`.

    Args:
        device: ``cuda`` without an index means the device with this process's local rank.
        dist_url: ``env://`` or an init method of ``torch.distributed``, such as ``tcp://host:port``.
    """
    rank, local_rank, world_size = launched_ranks()
    if device.type == "cuda":
        # SLURM's --gpus-per-task=1 shows every process a GPU of its own, called cuda:0.
        has_own = world_size > 1 and "RANK" not in os.environ and torch.cuda.device_count() == 1
        index = local_rank if device.index is None or world_size > 1 else device.index
        device = torch.device("cuda", 0 if has_own else index)
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine wants {device}, but it has {torch.cuda.device_count()} GPU(s); "
                "start fewer processes per machine"
            )
        use_device(device)
    if world_size == 1:
        return Distributed(0, 0, 1, device)

    join_group(rank, world_size, device, dist_url, COLLECTIVE_TIMEOUT)
    return Distributed(rank, local_rank, world_size, device)


def shut_down_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        # A CPU tensor: the wait is on gloo, with this file's timeout, and takes no GPU memory.
        dist.all_reduce(torch.zeros(1))


def meet(what: str) -> None:
    """Wait until all processes are here, before anything is trained: the wait says what it is for and can be ended.

    A process that has got a signal before tells the others, and all of them stop here. One that gets it while it
    waits is still met, and tells it at the next meeting; only where the others let it wait does it leave alone.

    Args:
        what: What the others may still be doing, as in "waiting for the other processes, which ...".

    Raises:
        Stopped: A signal has come, to this process or to another one.
        WaitError: They did not come.
    """
    if not dist.is_initialized():
        return
    what = f"the other processes, which {what}"
    own = noted_signal()
    number = torch.tensor([0 if own is None else signal.Signals[own]])
    work = dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True)
    limit = COLLECTIVE_TIMEOUT.total_seconds() - 10  # gloo's own end of the wait says nothing
    advice = "the log of each one says how far it is, and kill -USR2 makes it print where it stands"
    wait_until(functools.partial(_is_over, work), what, limit=limit, advice=advice, grace=GRACE_OF_MEETINGS)
    if number > 0:
        whose = "" if noted_signal() is not None else " to another process"
        raise Stopped(signal.Signals(int(number)).name, f"{whose} while waiting for {what}")


def _is_over(work: dist.Work, seconds: float) -> bool:
    """Wait for a collective, but no longer than so many seconds; returns whether it is over."""
    try:
        work.wait(datetime.timedelta(seconds=seconds))
    except RuntimeError:
        if work.is_completed():
            work.wait()  # raises what went wrong, unless it has ended well just now
            return True
        return False
    return True


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add ``tensor`` over all processes, in place, and return it; float and integer dtypes, any device."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the maximum of ``tensor`` over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_bytes(data: bytes) -> list[bytes] | None:
    """Send bytes of any length to rank 0 over gloo, without pickling.

    Returns:
        On rank 0 the bytes of every rank, in rank order; elsewhere None.
    """
    if not dist.is_initialized():
        return [data]
    lengths = torch.zeros(world_size(), dtype=torch.int64)
    lengths[rank()] = len(data)
    dist.all_reduce(lengths)
    if rank() != 0:
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0)
        return None
    parts = [data]
    for source in range(1, world_size()):
        buffer = torch.empty(int(lengths[source]), dtype=torch.uint8)
        if buffer.numel():
            dist.recv(buffer, src=source)
        parts.append(buffer.numpy().tobytes())
    return parts


def broadcast_json(value: Any) -> Any:
    """Hand rank 0's ``value`` (what json can write; NaN and infinities included) to all processes."""
    if not dist.is_initialized():
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if rank() == 0 else None
    length = torch.tensor([0 if data is None else data.numel()])
    dist.broadcast(length, src=0)
    if data is None:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(data.numpy().tobytes())


def check_same_everywhere(what: str, value: str) -> None:
    """Raise ValueError on every process unless all of them have the same ``value``, such as a hash of their data."""
    if not dist.is_initialized():
        return
    meet(f"have not read their {what} yet")
    mine = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "little")
    bounds = torch.tensor([mine, -mine])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) != -int(bounds[1]):
        raise ValueError(f"the processes do not have the same {what}; give all machines the same files")


@contextlib.contextmanager
def main_process_first(what: str) -> Iterator[None]:
    """Let each machine's first process run the block before its others, for downloads and caches on disk.

    Args:
        what: What it does, as in "waiting for the other processes, which ...".
    """
    is_first = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0
    if not is_first:
        meet(what)
    try:
        yield
    except Stopped:
        raise  # to meet the others now would be one more wait
    except BaseException:
        if is_first:
            meet(what)
        raise
    if is_first:
        meet(what)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else.

    Streams of neighbouring parts, such as (seed, epoch, index) and (seed, epoch, index + 1), are unrelated.
    """
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_torch(*parts: int | str) -> None:
    """Seed torch's generators of the CPU and of the current device from ``parts``.

    ``torch.manual_seed`` does this for all devices, and notes a stack for those that are not in use: 0.3 ms a call.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the generators that `seed_torch` seeds as they are found, whatever the block draws."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def peak_memory_mb(device: torch.device) -> int:
    """Return the most memory this process has held: of the GPU's allocator on CUDA, else resident, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, else kB


def format_peak_memory(device: torch.device) -> str:
    """Return `peak_memory_mb` in words; on CUDA also what the allocator has taken from the GPU to hold that much."""
    text = f"{peak_memory_mb(device)} MB at the peak"
    if device.type == "cuda":
        text += f" ({torch.cuda.max_memory_reserved(device) >> 20} MB taken from the GPU for it)"
    return text


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "pycocotools", "numpy", "pillow")}


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def seeded_cpu_rng(*parts: int | str) -> Iterator[None]:
    """Run the block with torch's CPU generator seeded from ``parts``; put its state back afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        generator.set_state(state)


def seeded_numpy_rng(*parts: int | str) -> np.random.Generator:
    """Return a numpy generator seeded from ``parts``."""
    return np.random.default_rng(derive_seed(*parts))
