"""Mixed precision: which type, and whether gradients are scaled."""

import logging

import torch

logger = logging.getLogger(__name__)


def choose_amp(name: str, device: torch.device) -> tuple[torch.dtype, torch.amp.GradScaler | None]:
    """Return the type for mixed precision and, for float16 alone, a gradient scaler.

    Args:
        name: ``float16``, ``bfloat16``, or ``auto``: bfloat16 where the hardware computes in it.
        device: What it is for.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bfloat16 else "float16"
    logger.info("mixed precision in %s", name)
    if name == "bfloat16":
        return torch.bfloat16, None
    return torch.float16, torch.amp.GradScaler(device.type)
