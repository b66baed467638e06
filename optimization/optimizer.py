"""Parameter groups, optimizers and the learning rate as a pure function of the run's position."""

import bisect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

logger = logging.getLogger(__name__)

OPTIMIZERS = ("sgd", "sgd_nesterov", "adamw")
SCHEDULERS = ("multisteplr", "cosineannealinglr")

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)

# The rate that warm-up starts from, as a share of the full one.
WARMUP_START = 1 / 1000


def parameter_groups(model: nn.Module, norm_weight_decay: float | None) -> list[dict[str, object]]:
    """Return the trainable parameters as optimizer groups.

    Args:
        model: Frozen parameters are left out.
        norm_weight_decay: Weight decay of normalisation layers; None: the same as for all others.
    """
    if norm_weight_decay is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    of_norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    norms = [p for p in trainable if id(p) in of_norms]
    others = [p for p in trainable if id(p) not in of_norms]
    groups: list[dict[str, object]] = []
    if norms:
        groups.append({"params": norms, "weight_decay": norm_weight_decay})
    if others:
        groups.append({"params": others})
    return groups


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_weight_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer called ``name``, one of `OPTIMIZERS`; momentum is for SGD only.

    Raises:
        ValueError: Unknown name, or nothing to train.
    """
    groups = parameter_groups(model, norm_weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("the model has no trainable parameter")
    # Fused kernels take an "is there a non-finite number" flag from the device, see engine.train_one_epoch.
    if name in ("sgd", "sgd_nesterov"):
        nesterov = name == "sgd_nesterov"
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
        )
        if momentum:
            # The fused kernel leaves the momentum uninitialised when the very first update is left out (torch 2.15,
            # _fused_sgd: empty_like). Starting from zeros gives the same momentum after the first real update.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    raise ValueError(f"unknown optimizer {name!r}; expected one of {', '.join(OPTIMIZERS)}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up momenta of a checkpoint; hyperparameters stay those that the optimizer was built with.

    Momenta get the memory format of their weights, which `--channels-last` may have changed since: fused kernels walk
    both in the order of memory.

    Args:
        optimizer: Of the same kind and over the same parameters as the checkpoint's.
        state: Its ``state_dict()``.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, hyperparameters in zip(optimizer.param_groups, own):
        group.update(hyperparameters)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of epoch and number of updates.

    Attributes:
        base: The full rate.
        epochs: Length of the run.
        scheduler: ``multisteplr``: times ``gamma`` at each of ``milestones``; ``cosineannealinglr``: down to 0
            at the end of the run. Both change between epochs.
        milestones: Epochs.
        gamma: See ``scheduler``.
        warmup_iters: Over so many updates the rate climbs linearly from `WARMUP_START` of itself.
    """

    base: float
    epochs: int
    scheduler: str = "multisteplr"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_iters: int = 0

    def at(self, epoch: int, updates: int) -> float:
        """Return the rate for the update after ``updates`` others, in ``epoch``."""
        if self.scheduler == "multisteplr":
            factor = self.gamma ** bisect.bisect_right(sorted(self.milestones), epoch)
        elif self.scheduler == "cosineannealinglr":
            factor = 0.5 * (1 + math.cos(math.pi * min(epoch, self.epochs) / self.epochs))
        else:
            raise ValueError(f"unknown scheduler {self.scheduler!r}; expected one of {', '.join(SCHEDULERS)}")
        if updates < self.warmup_iters:
            factor *= WARMUP_START + (1 - WARMUP_START) * updates / self.warmup_iters
        return self.base * factor

    def set(self, optimizer: torch.optim.Optimizer, epoch: int, updates: int) -> float:
        """Set and return the rate of all parameter groups."""
        rate = self.at(epoch, updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def default_warmup(updates_per_epoch: int) -> int:
    """Return torchvision's warm-up length: 1000 updates, at most the first epoch; none for a one-update epoch."""
    return min(1000, updates_per_epoch - 1)


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


def update_parameters(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, clip_grad_norm: float | None, bad: Tensor
) -> Tensor:
    """Take one optimizer step and clear the gradients.

    Nothing changes where a gradient is not finite or ``bad`` is not 0; with a scaler its scale goes down then.

    Args:
        optimizer: With fused kernels.
        scaler: For float16.
        clip_grad_norm: Largest norm of the gradient.
        bad: float, on the device: 1 where a loss of this update was not finite.

    Returns:
        float, on the device: 1 where the update was left out.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scaler is not None:
        # An infinite loss can have finite gradients, which the scaler would take: it finds this one.
        gradients[0].add_(torch.where(bad > 0, math.nan, 0.0))
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(gradients)
    left_out = torch.maximum(bad, (~torch.isfinite(norm)).to(bad.dtype))
    if clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        # The protocol between GradScaler and fused optimizers: a step with found_inf 1 does nothing.
        optimizer.grad_scale, optimizer.found_inf = None, left_out  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)
    return left_out
