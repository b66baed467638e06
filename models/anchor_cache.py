"""Anchors depend on the shapes of a batch alone: they are made once per shape and kept on the device."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

# Pictures are batched by shape, so that a run sees a few dozen; each takes 3 MB at 800 x 1333 with RetinaNet.
MOST_SHAPES = 32


class AnchorCache(OrderedDict[Any, Tensor]):
    """Anchors by shape, the last used at the end. A copy is empty, also one by pickle: models are copied and sent."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AnchorCache":
        return AnchorCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return AnchorCache, ()


def anchors_of(generator: nn.Module, images: ImageList, features: Sequence[Tensor]) -> Tensor:
    """Return the anchors of each picture of a batch: they are the same for all.

    The generator is fed with maps without content in float32, see `models.box_precision`.

    Args:
        generator: torchvision's `AnchorGenerator` or `DefaultBoxGenerator`; keeps what it made.
        images: The padded batch.
        features: The feature maps, [B, C, H, W] each.

    Returns:
        float32 [A, 4], xyxy in pixels of the padded batch; not to be changed.
    """
    cache = generator.__dict__.setdefault("_anchor_cache", AnchorCache())
    device = features[0].device
    key = (device, tuple(images.tensors.shape[-2:]), tuple(tuple(map_.shape[-2:]) for map_ in features))
    if key not in cache:
        with torch.inference_mode(False), torch.no_grad():
            maps = [torch.empty((0, 1, *map_.shape[-2:]), device=device) for map_ in features]
            one_picture = ImageList(images.tensors, images.image_sizes[:1])
            (cache[key],) = generator(one_picture, maps)
        if len(cache) > MOST_SHAPES:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
