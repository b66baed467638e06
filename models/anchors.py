"""Anchors of one's own: other sizes and shapes than torchvision's builders give a detector.

FCOS has none: its points have no size that one could choose.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

Sizes = tuple[tuple[float, ...], ...]


def anchor_owner(model: nn.Module) -> Any:
    """Return the part of a detector that has ``anchor_generator``, ``head`` and ``proposal_matcher``."""
    return model.get_submodule("rpn") if hasattr(model, "rpn") else model


def set_anchors(
    model: nn.Module, name: str, num_classes: int, sizes: Sizes | None, ratios: Sequence[float] | None
) -> None:
    """Give a detector other anchors, and a new head where it has another number of them at a place.

    Args:
        model: One of torchvision's detectors; changed in place.
        name: Its name, for messages.
        num_classes: Background included.
        sizes: See `build_generator`.
        ratios: See `build_generator`.

    Raises:
        ValueError: They do not go with this model; the text names the flags.
    """
    owner = anchor_owner(model)
    old, new = owner.anchor_generator, build_generator(model, name, sizes, ratios)
    owner.anchor_generator = new
    if new.num_anchors_per_location() != old.num_anchors_per_location():
        owner.head = _build_head(model, new.num_anchors_per_location(), num_classes)


def build_generator(
    model: nn.Module, name: str, sizes: Sizes | None, ratios: Sequence[float] | None
) -> AnchorGenerator | DefaultBoxGenerator:
    """Return a generator of other anchors for a detector, which stays as it is.

    Args:
        model: One of torchvision's detectors.
        name: Its name, for messages.
        sizes: Square roots of the anchors' areas in pixels of the resized picture, one tuple per feature map, or one
            for all of them; SSD has one size per feature map and one more. None for the model's own.
        ratios: Height over width, the same on all feature maps; SSD has 1 and every ratio's inverse too. None for the
            model's own.

    Raises:
        ValueError: They do not go with this model; the text names the flags.
    """
    old = anchor_owner(model).anchor_generator
    for flag, groups in (("--anchor-sizes", sizes or ()), ("--anchor-ratios", [(ratio,) for ratio in ratios or ()])):
        if not all(0 < value < math.inf for group in groups for value in group):
            raise ValueError(f"{flag} {anchor_words(groups)}: must be above 0")
    if isinstance(old, DefaultBoxGenerator):
        transform: Any = model.get_submodule("transform")
        return _default_boxes(old, transform.fixed_size[0], name, sizes, ratios)
    if hasattr(model, "center_sampling_radius"):
        flag = "--anchor-sizes" if sizes else "--anchor-ratios"
        raise ValueError(f"{flag}: {name} has points instead of anchors; R-CNNs, RetinaNets and SSDs have them")
    return _anchors(old, name, sizes, ratios)


def anchor_words(values: Sequence[float | Sequence[float]]) -> str:
    """Return sizes or ratios as a command line has them."""
    groups = (value if isinstance(value, Sequence) else [value] for value in values)
    return " ".join(",".join(f"{number:g}" for number in group) for group in groups)


def _anchors(old: AnchorGenerator, name: str, sizes: Sizes | None, ratios: Sequence[float] | None) -> AnchorGenerator:
    """Return a generator with sizes and ratios in the place of the old one's."""
    num_maps = len(old.sizes)
    sizes = sizes or old.sizes
    if len(sizes) == 1:
        sizes = sizes * num_maps
    if len(sizes) != num_maps:
        raise ValueError(
            f"--anchor-sizes: {name} has {num_maps} feature maps, got sizes for {len(sizes)}; give sizes for each, or "
            f"once for all, several with commas: {anchor_words(old.sizes)}"
        )
    if len({len(group) for group in sizes}) > 1:
        counts = ", ".join(str(len(group)) for group in sizes)
        raise ValueError(f"--anchor-sizes: {name} needs as many sizes on each feature map, got {counts}")
    per_map = tuple(ratios) if ratios else old.aspect_ratios[0]
    new = AnchorGenerator(sizes, (per_map,) * num_maps)
    for group, boxes in zip(sizes, new.cell_anchors):
        # torchvision rounds half a side to whole pixels: of a side of 1 nothing is left, and no box can be coded by it.
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            thin = min(size * min(ratio**0.5, ratio**-0.5) for size in group for ratio in per_map)
            raise ValueError(f"--anchor-sizes, --anchor-ratios: an anchor is {thin:.2g} pixels thin, expected over 1")
    return new


def _default_boxes(
    old: DefaultBoxGenerator, side: int, name: str, sizes: Sizes | None, ratios: Sequence[float] | None
) -> DefaultBoxGenerator:
    """Return SSD's generator with sizes and ratios in the place of the old one's."""
    num_maps = len(old.aspect_ratios)
    if sizes and (len(sizes) != num_maps + 1 or any(len(group) > 1 for group in sizes)):
        own = " ".join(f"{scale * side:.0f}" for scale in old.scales)
        raise ValueError(
            f"--anchor-sizes: {name} has {num_maps} feature maps with one size each: give these, and the size that "
            f"would follow, {num_maps + 1} numbers without commas, such as {own}"
        )
    scales = [group[0] / side for group in sizes] if sizes else old.scales
    beyond = sorted({max(ratio, 1 / ratio) for ratio in ratios or ()} - {1.0})
    return DefaultBoxGenerator(
        [beyond] * num_maps if ratios else old.aspect_ratios, scales=scales, steps=old.steps, clip=old.clip
    )


def _build_head(model: nn.Module, num_anchors: list[int], num_classes: int) -> nn.Module:
    """Return a head as the model has it, for another number of anchors at a place."""
    old: Any = anchor_owner(model).head
    if isinstance(old, RPNHead):
        return RPNHead(old.cls_logits.in_channels, num_anchors[0], conv_depth=len(old.conv))
    if isinstance(model, RetinaNet):
        has_norm = any(isinstance(module, nn.GroupNorm) for module in old.modules())
        norm = partial(nn.GroupNorm, 32) if has_norm else None  # of retinanet_resnet50_fpn_v2
        channels = old.regression_head.bbox_reg.in_channels
        head: Any = RetinaNetHead(channels, num_anchors[0], num_classes, norm_layer=norm)
        head.regression_head._loss_type = old.regression_head._loss_type
        return head
    size = model.get_submodule("transform").fixed_size
    channels = retrieve_out_channels(model.get_submodule("backbone"), size)
    if isinstance(old, SSDLiteHead):
        return SSDLiteHead(channels, num_anchors, num_classes, partial(nn.BatchNorm2d, eps=0.001, momentum=0.03))
    return SSDHead(channels, num_anchors, num_classes)
