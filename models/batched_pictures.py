"""Pictures of several sizes as one normalised batch, with their objects: torchvision's transform, for training."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.batched_boxes import constant, to_device
from models.object_block import ObjectBlock


class PictureBatch(ImageList):
    """A padded batch, float [B, 3, H, W], and the sizes of its pictures.

    Attributes:
        sizes: float32 [B, 2] on the device: height and width of each picture, which ``image_sizes`` has on the host.
    """

    def __init__(self, tensors: Tensor, image_sizes: list[tuple[int, int]], sizes: Tensor) -> None:
        super().__init__(tensors, image_sizes)
        self.sizes = sizes


class BatchedTransform(GeneralizedRCNNTransform):
    """torchvision's transform with a way of its own for training batches; its ``forward`` is torchvision's."""

    def batch(self, images: Sequence[Tensor], objects: ObjectBlock) -> tuple[PictureBatch, ObjectBlock]:
        """Resize, normalise and pad pictures, and move their objects along: `GeneralizedRCNNTransform.forward`.

        torchvision normalises each picture before the resize, with numbers that it copies to the device for it; here it
        is done on the way into the batch. Pictures differ from torchvision's by rounding.

        Args:
            images: float [3, H, W] each, in 0..1.
            objects: In pixels of ``images``; not changed.

        Returns:
            The batch, and the objects in pixels of its pictures; masks stay as they are, `mask_targets` resizes them.
        """
        device = images[0].device
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = self._sizes_after(given)
        mean, std = (constant(tuple(values), device)[:, None, None] for values in (self.image_mean, self.image_std))
        padded = [math.ceil(max(sides) / self.size_divisible) * self.size_divisible for sides in zip(*sizes)]
        tensors = images[0].new_zeros((len(images), 3, *padded))
        for picture, image, size in zip(tensors, images, sizes):
            if image.shape[-2:] != size:
                image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
            torch.sub(image, mean, out=picture[:, : size[0], : size[1]])
        tensors.div_(std)

        # All that the device has to know of sizes: height and width, and by what x, y, x, y of boxes are multiplied.
        after = np.array(sizes, dtype=np.float32)
        ratios = after / np.array(given, dtype=np.float32)
        numbers = np.concatenate([after, ratios[:, ::-1], ratios[:, ::-1]], axis=1)
        on_device = to_device(torch.from_numpy(numbers), device)
        return PictureBatch(tensors, sizes, on_device[:, :2]), self._moved(objects, on_device[:, 2:])

    def _sizes_after(self, given: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return height and width of each picture after the resize, by the arithmetic of torchvision's `resize`.

        In training one of the short sides is drawn for each picture, from the same numbers as in `torch_choice`.
        """
        if self.training and self._skip_resize:
            return given
        short_sides = [self.min_size[-1]] * len(given)
        if self.training:
            draws = torch.empty(len(given)).uniform_(0.0, float(len(self.min_size))).tolist()
            short_sides = [self.min_size[int(draw)] for draw in draws]
        if self.fixed_size is not None:
            return [(self.fixed_size[1], self.fixed_size[0])] * len(given)
        sizes = []
        for (height, width), short_side in zip(given, short_sides):
            scale = min(short_side / min(height, width), self.max_size / max(height, width))
            sizes.append((int(height * scale), int(width * scale)))
        return sizes

    def _moved(self, objects: ObjectBlock, ratios: Tensor) -> ObjectBlock:
        """Return objects in pixels of the resized pictures; ``ratios``, float32 [B, 4], are those of boxes."""
        keypoints = objects.keypoints
        if keypoints is not None:
            moved = keypoints[..., :2] * ratios[:, None, None, :2]
            keypoints = torch.cat([moved, keypoints[..., 2:]], dim=-1)
        boxes = objects.boxes * ratios[:, None]
        return dataclasses.replace(objects, boxes=boxes, keypoints=keypoints)
