"""Maps of one column get a second one where a CPU computes in bfloat16: without it torch gives wrong gradients.

The weights of a strided convolution that see nothing but padding have the gradient 0. oneDNN, which computes bfloat16
on CPUs, leaves some of them out where the map has one column, and what the memory held before becomes their gradient:
any number, or none (torch 2.14.1). The coarsest maps of RetinaNet and FCOS are so narrow for pictures of 64 pixels.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def widen_narrow_maps(model: nn.Module) -> None:
    """Let strided convolutions see a map of one column with a second one of zeros, which changes nothing they give.

    Works through hooks on the model object; its state dict stays as it is.

    Args:
        model: Any, on a CPU; changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
            kernel, stride, padding = module.kernel_size[1], module.stride[1], module.padding[1]
            reach = 2 * padding - module.dilation[1] * (kernel - 1)  # output columns: (width - 1 + reach) // stride + 1
            if kernel > 1 and stride > 1 and 0 <= reach // stride == (1 + reach) // stride:
                module.register_forward_pre_hook(_with_second_column)


def _with_second_column(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    (maps,) = args
    return (F.pad(maps, (0, 1)),) if maps.shape[-1] == 1 else None
