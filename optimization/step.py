"""One training step: gradients of the losses, and the update. The loop around it is `engine.train_one_epoch`."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

ON_NAN = ("stop", "skip")


@dataclass(frozen=True)
class StepOptions:
    """How the steps of a run go; the same from its first step to its last.

    Attributes:
        seed: The run's random seed; with epoch and batch number it seeds the random draws of each step.
        amp_dtype: Autocast to this type; None computes in float32.
        scaler: Scales the loss so that float16 gradients do not vanish; its scale is part of the checkpoint. None
            with other types.
        accumulate: Batches whose gradients are added before each update.
        clip_grad_norm: Largest norm of the gradient; None leaves it as it is.
        on_nan: With a loss or gradient that is not finite: ``stop`` ends the run, ``skip`` skips the update.
        print_freq: Steps between log lines.
        debug_folder: Where a batch whose loss is not finite is saved; None saves none.
    """

    seed: int = 0
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = None
    on_nan: str = "stop"
    print_freq: int = 20
    debug_folder: Path | None = None


def add_gradients(
    model: nn.Module,
    images: list[Tensor],
    targets: list[dict[str, Any]],
    options: StepOptions,
    *,
    weight: float,
    is_update: bool,
) -> dict[str, Tensor]:
    """Run the model forward and backward, and add the gradient of ``weight`` times the sum of its losses.

    Args:
        model: In DDP or bare; returns a dict of losses.
        images: float [3, H, W] in 0..1 each, on the device.
        targets: The objects of each image.
        options: Autocast type and gradient scaler are read.
        weight: Share of this batch in its update.
        is_update: Whether an update follows; only then DDP averages the gradients over the processes.

    Returns:
        The losses by name, float32, without a graph and without the weight.
    """
    waits = isinstance(model, nn.parallel.DistributedDataParallel) and not is_update
    with cast("nn.parallel.DistributedDataParallel", model).no_sync() if waits else contextlib.nullcontext():
        with torch.autocast(images[0].device.type, dtype=options.amp_dtype, enabled=options.amp_dtype is not None):
            loss_dict = model(images, targets)
        loss = sum(loss_dict.values()) * weight
        (loss if options.scaler is None else options.scaler.scale(loss)).backward()
    return {name: term.detach().float() for name, term in loss_dict.items()}


def update_parameters(optimizer: torch.optim.Optimizer, options: StepOptions, non_finite: Tensor) -> Tensor:
    """Take one optimizer step and clear the gradients.

    Nothing changes where a gradient is not finite or ``non_finite`` is not 0; with a scaler its scale goes down then.
    Nothing here waits for the device: the optimizer's fused kernel reads the flag there.

    Args:
        optimizer: With fused kernels.
        options: Gradient scaler and largest norm are read.
        non_finite: float, on the device: 1 where a loss of this update was not finite.

    Returns:
        float, on the device: 1 where the update was skipped.
    """
    scaler = options.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scaler is not None:
        # An infinite loss can have finite gradients, which the scaler would take: it finds this one.
        gradients[0].add_(torch.where(non_finite > 0, math.nan, 0.0))
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(gradients)
    skipped = torch.maximum(non_finite, (~torch.isfinite(norm)).to(non_finite.dtype))
    if options.clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, options.clip_grad_norm, norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        # The protocol between GradScaler and fused optimizers: a step with found_inf 1 does nothing.
        optimizer.grad_scale, optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)
    return skipped
