"""Mixed precision: which type, and whether gradients are scaled."""

import logging

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


def choose_amp(name: str, device: torch.device) -> tuple[torch.dtype, torch.amp.GradScaler | None]:
    """Return the type for mixed precision and, for float16 alone, a gradient scaler; all processes must call it.

    Args:
        name: ``float16``, ``bfloat16``, or ``auto``: bfloat16 where the hardware of all processes computes in it. With
            different types some would scale their gradients and others not, and the mean of both is no gradient.
        device: What it is for.
    """
    if name == "auto":
        lacks_bfloat16 = torch.tensor(not computes_in_bfloat16(device), dtype=torch.float32)
        if dist.is_initialized():
            dist.all_reduce(lacks_bfloat16, op=dist.ReduceOp.MAX)
        name = "float16" if lacks_bfloat16 else "bfloat16"
    logger.info("mixed precision in %s", name)
    if name == "bfloat16":
        return torch.bfloat16, None
    return torch.float16, torch.amp.GradScaler(device.type)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16 by itself; CPUs are taken to."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
