"""Which device a process computes on, and what must be settled before its first use of a GPU."""

import os
import warnings
from pathlib import Path

import torch

# Where Linux shows the GPUs of NVIDIA, as files nvidia0, nvidia1, ...
DEVICE_FILES = Path("/dev")


def choose_device(name: str | None) -> torch.device:
    """Return the device called ``name``; without a name, cuda where there is one, else the CPU.

    Raises:
        ValueError: The name is unknown to torch or the machine has no such device; or there is no name, and a GPU that
            torch cannot use: a training on the CPU would take weeks, and is only done where it is asked for.
    """
    has_cuda = torch.cuda.is_available()
    if name is None:
        name = "cuda" if has_cuda else "cpu"
        if not has_cuda and (gpu := _find_gpu()) is not None:
            raise ValueError(
                f"this machine has a GPU ({gpu}) that torch cannot use: {_why_no_cuda()}; mend that, or choose the "
                "CPU with --device cpu"
            )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"--device {name}: torch finds no usable GPU: {_why_no_cuda()}; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: this machine has no usable MPS device; use --device cpu")
    return device


def _find_gpu() -> Path | None:
    """Return the device file of an NVIDIA GPU of this machine, unless the user or scheduler hides all GPUs."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):  # the last is SLURM's
        return None
    return min(DEVICE_FILES.glob("nvidia[0-9]*"), default=None)


def _why_no_cuda() -> str:
    """Return why torch cannot use a GPU, in one line."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say what the error says
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "no GPU is visible to it (nvidia-smi and CUDA_VISIBLE_DEVICES say which are)"


def use_device(device: torch.device) -> None:
    """Make ``device`` the one that this process computes on; to be called before its first use of a GPU.

    Whatever then asks for "the GPU", such as page-locked memory, takes this one, and opens none of the others: each
    costs half a gigabyte. Batches of many sizes leave holes in the GPU's memory that nothing fits into; where the user
    has not configured the allocator, it takes memory in segments that can grow.
    """
    if device.type != "cuda":
        return
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if device.index is not None:  # a plain "cuda" is the current one, which torch does not take here
        torch.cuda.set_device(device)
