"""Frozen batch norms as one multiplication and one addition, in the type of what comes in.

torchvision works scale and shift of a frozen batch norm out again in every forward, in five small kernels, and adds
them in float32: half-precision activations become float32 again after each of its 53 norms, which is twice the memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def fold_frozen_norms(model: nn.Module) -> None:
    """Let the frozen batch norms of a model keep their scale and shift.

    The state dict stays as it is. In float32 results and gradients are those of torchvision to the last bit.

    Args:
        model: Changed in place; copies of it, such as the average of the weights, stay folded.
    """
    for module in model.modules():
        if type(module) is FrozenBatchNorm2d:
            module.__class__ = FoldedNorm
            module._folded = {}  # type: ignore[assignment]


class FoldedNorm(FrozenBatchNorm2d):
    """A `FrozenBatchNorm2d` that keeps its scale and shift until weights are loaded or moved."""

    _folded: dict[torch.dtype, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, float [N, C, H, W], scaled and shifted by channel, in its own type and memory format."""
        if torch.compiler.is_compiling():  # the compiler makes one kernel of it all
            scale, shift = self._fold(x.dtype)
        else:
            if x.dtype not in self._folded:
                # An evaluation may come first; training cannot use tensors that were made in inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    self._folded[x.dtype] = self._fold(x.dtype)
            scale, shift = self._folded[x.dtype]
        if x.dtype == self.weight.dtype:
            return x * scale + shift  # rounded twice, as torchvision's
        return torch.addcmul(shift, x, scale)  # one kernel, rounded once

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scale and shift, ``dtype`` [1, C, 1, 1] each, by the operations of `FrozenBatchNorm2d.forward`."""
        weight, bias, var, mean = (
            values.reshape(1, -1, 1, 1) for values in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = weight * (var + self.eps).rsqrt()
        shift = bias - mean * scale
        return scale.to(dtype), shift.to(dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._folded = {}
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "FoldedNorm":
        self._folded = {}
        return super()._apply(*args, **kwargs)
