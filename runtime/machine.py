"""What the machine allows a run, looked at when it starts, and what its refusals mean in one line.

Open files, shared memory, stuck processes. Nothing here decides whether a run goes on.
"""

import contextlib
import errno
import faulthandler
import logging
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from utils import describe_error

logger = logging.getLogger(__name__)

# More open files than this help nobody, and some container limits are a billion.
MAX_OPEN_FILES = 1 << 20

# A process that gets no further for so long prints its stacks and ends: shortly before the others give up on it.
HANG_SECONDS = 28 * 60

SHARED_MEMORY = Path("/dev/shm")

# What gloo says, in the process that is left, when another one has gone or hangs.
_LOST_PEER = ("gloo", "onnection closed by peer", "pair closure", "Timed out waiting")

# What NCCL says then.
_LOST_NCCL_PEER = (
    "ncclRemoteError",
    "remote process exited",
    "closed by remote peer",
    "connection closed by peer",
    "ollective operation timeout",
)

# What torch, CUDA, its libraries and NCCL say, and what it means.
_KNOWN_FAILURES = {
    "DefaultCPUAllocator: can't allocate memory": "this machine's memory is full; lower --batch-size, --min-size or "
    "--workers; --resume auto continues",
    "Duplicate GPU detected": "two processes have been given one GPU; start no more processes per machine than it has "
    "GPUs (torchrun --nproc_per_node, srun --ntasks-per-node), and let each see all of them or one of its own",
    "CUDA error: out of memory": "the GPU's memory is full, perhaps with another program (nvidia-smi lists them); end "
    "that one, or lower --batch-size or --min-size; --resume auto continues",
    "CUBLAS_STATUS_ALLOC_FAILED": "the GPU's memory is full; lower --batch-size or --min-size, or train with --amp; "
    "--resume auto continues",
    "no kernel image is available": "this torch is not built for this generation of GPU; install one that is "
    "(https://pytorch.org/get-started/locally), or use --device cpu",
    "devices are busy or unavailable": "another program has the GPU to itself (nvidia-smi lists them)",
    "uncorrectable ECC error": "the GPU's memory is broken or needs a reset; take another one, --resume auto continues",
}


def prepare_process() -> None:
    """Raise the limit of open files, and print the stacks of all threads on a crash and on SIGUSR2."""
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.enable(stderr)
    faulthandler.register(signal.SIGUSR2, file=stderr)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class HangWatch:
    """Prints all stacks and ends the process when `alive` has not been called for `HANG_SECONDS`.

    The last resort: a DataLoader that fetches a batch's memory from a stuck process waits without a timeout.
    """

    def __init__(self) -> None:
        self.armed_at = -1.0

    def alive(self) -> None:
        """Say that there is progress; cheap enough for every step."""
        now = time.monotonic()
        if self.armed_at < 0 or now - self.armed_at > 1:  # arming starts a thread
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
            self.armed_at = now

    def end(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Warn when the batches that loading processes hold ready may not fit into shared memory.

    Args:
        batch_bytes: Size of the largest batch that can occur, in bytes.
        workers: Loading processes of this process; each holds two batches ready.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, 2 * workers * batch_bytes
    if needed > free:
        logger.warning(
            "%s has %d MB free, %d loading processes may need %d MB and would then stand still; lower --workers or "
            "--batch-size, or give the container more (docker run --shm-size=8g or --ipc=host)",
            *(SHARED_MEMORY, free >> 20, workers, needed >> 20),
        )


def explain_failure(error: BaseException) -> str | None:
    """Return one line that says what a failure of the machine means and what to try; None for any other error."""
    text = str(error)
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "BadImageError" in lines[-1]:  # raised in a loading process, which sends its traceback as the text
        return f"{lines[-1].partition('BadImageError: ')[2]}; replace the file"
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return (
            f"a loading process has died ({lines[0]}), most often because memory or {SHARED_MEMORY} ran out "
            f"({_free_shared_memory()}); lower --workers or --batch-size, and continue with --resume auto"
        )
    if "DataLoader timed out" in text:
        return (
            f"{lines[0]}: a disk that does not answer, or a full {SHARED_MEMORY} ({_free_shared_memory()}; docker "
            "run --shm-size=8g); --workers 0 shows which, and --resume auto continues"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return (
            f"{lines[0]}: {SHARED_MEMORY} is full ({_free_shared_memory()}); lower --workers, or give the container "
            "more (docker run --shm-size=8g)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return describe_error(error)
    if "ancdata" in text or "Too many open files" in text:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files (limit {soft}, at most {hard}); raise it with ulimit -n, or lower --workers"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{lines[0]} Lower --batch-size or --min-size, or train with --amp; --resume auto continues"
    for sign, advice in _KNOWN_FAILURES.items():
        if sign in text:
            line = next(line for line in lines if sign in line)
            return f"{line.strip()}: {advice}"
    if "NCCL" in text and not any(sign in text for sign in _LOST_NCCL_PEER):
        _, _, last = text.partition("Last error:")
        reason = next((line.strip() for line in last.splitlines() if line.strip()), lines[0])
        return f"the GPUs cannot talk to each other by NCCL: {reason}; NCCL_DEBUG=WARN makes it say more"
    if isinstance(error, dist.DistError) or any(sign in text for sign in _LOST_PEER):
        return (
            f"another process of this run has ended or does not answer ({lines[0]}); its own message says why. "
            "The same command with --resume auto continues from the last checkpoint"
        )
    return None


def _free_shared_memory() -> str:
    try:
        return f"{shutil.disk_usage(SHARED_MEMORY).free >> 20} MB free"
    except OSError:
        return "missing"
