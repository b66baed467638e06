"""Boxes stay float32 in mixed precision, whatever the network computes in.

torchvision makes anchors and decodes boxes in the type of the feature maps. bfloat16 has 8 bits of precision: beyond
256 pixels it knows every second pixel only, beyond 1024 every eighth. At 800 x 1344 two thirds of RetinaNet's anchors
move by a pixel or more, and FCOS has points of no width at the right edge, which are never trained on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

# Where the network ends and the arithmetic of boxes begins; every model has some of these.
HEADS = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor", "head")


def keep_boxes_float32(model: nn.Module) -> None:
    """Make anchors in float32, and turn what the heads give to float32 before boxes are decoded and losses computed.

    Works through hooks on the model object; its state dict stays as it is. Without autocast nothing changes.

    Args:
        model: One of torchvision's detectors; changed in place.
    """
    for module in model.modules():
        if isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_pre_hook(_shapes_in_float32)
    for name in HEADS:
        parent, _, child = name.rpartition(".")
        head = getattr(getattr(model, parent, None) if parent else model, child, None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(_outputs_in_float32)


def _shapes_in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give an anchor generator maps without content: it reads their sizes, type and device alone."""
    images, maps = args
    return images, [map_.new_empty((0, *map_.shape[1:]), dtype=torch.float32) for map_ in maps]


def _outputs_in_float32(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
    """Turn a head's outputs, in whatever dicts and lists, to float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: _outputs_in_float32(module, args, value) for name, value in outputs.items()}
    return type(outputs)(_outputs_in_float32(module, args, value) for value in outputs)
