"""Optimizers and their parameter groups."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

OPTIMIZERS = ("sgd", "sgd_nesterov", "adamw")

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


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
    # Fused kernels take an "is there a non-finite number" flag from the device, see `update_parameters`.
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
        optimizer: The same class as in the checkpoint, over the same parameters in the same order.
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
