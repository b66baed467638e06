"""The objects of a batch in one block, so that nothing needs to be done picture by picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ObjectBlock:
    """The objects of B pictures in G places each; G is the largest number of objects of a picture, and at least 1.

    Places beyond a picture's own number of objects are empty: their boxes, labels and keypoints are 0.

    Attributes:
        boxes: float32 [B, G, 4], xyxy in pixels of each picture.
        labels: int64 [B, G].
        is_object: bool [B, G], which places are filled.
        counts: Objects of each picture, on the host.
        keypoints: float32 [B, G, K, 3] as (x, y, visibility), or None.
        masks: uint8 [N, H, W] of each picture, or None: their sizes differ from picture to picture.
    """

    boxes: Tensor
    labels: Tensor
    is_object: Tensor
    counts: tuple[int, ...]
    keypoints: Tensor | None = None
    masks: list[Tensor] | None = None


class BatchTargets(list[dict[str, Any]]):
    """The targets of a batch as torchvision's models take them, and the same objects in one block.

    Args:
        targets: One dict per picture; their ``boxes``, ``labels`` and ``keypoints`` are views of the block.
        objects: The block.
    """

    def __init__(self, targets: Sequence[dict[str, Any]], objects: ObjectBlock) -> None:
        super().__init__(targets)
        self.objects = objects


def objects_of(targets: Sequence[dict[str, Any]]) -> ObjectBlock:
    """Return the objects of a batch in one block: the one they came in, or a new one."""
    if isinstance(targets, BatchTargets):
        return targets.objects
    counts = tuple(len(target["boxes"]) for target in targets)
    boxes = targets[0]["boxes"]
    places = torch.arange(max(1, *counts), device=boxes.device)
    is_object = places < torch.tensor(counts, device=boxes.device)[:, None]

    def padded(name: str) -> Tensor:
        """Return one field of all pictures, zeros in the empty places."""
        values = [target[name] for target in targets]
        at_least_one = values[0].new_zeros((1, *values[0].shape[1:]))
        return torch.nn.utils.rnn.pad_sequence([*values, at_least_one], batch_first=True)[:-1]

    return ObjectBlock(
        boxes=padded("boxes").float(),
        labels=padded("labels"),
        is_object=is_object,
        counts=counts,
        keypoints=padded("keypoints").float() if "keypoints" in targets[0] else None,
        masks=[target["masks"] for target in targets] if "masks" in targets[0] else None,
    )
