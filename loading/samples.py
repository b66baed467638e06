"""The dataset behind every ``--dataset``: annotations, a source of images, and labels for the model.

Formats of files and drawn shapes differ only in how their `Annotations` are made and where pixels come from.
A sample is produced lean: the image stays uint8 as it was decoded, masks stay blocks inside their boxes, and only
what the model needs is made at all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset
from torchvision.transforms import v2

from annotations.arrays import Annotations
from annotations.labels import LabelMap
from annotations.object_masks import mask_block
from pixels.geometry import Placement, xywh_to_xyxy
from pixels.images import read_image
from pixels.lazy_image import MAX_DEVICE_SHRINK, LazyImage, render
from pixels.masks import MaskBlock
from pixels.value_range import ValueRange
from utils import seeded_cpu_rng

# Boxes thinner than this many pixels can collapse to nothing when float32 coordinates are rescaled, and
# torchvision's models end with an assertion. COCO's thinnest real box is wider.
MIN_BOX_SIDE = 1 / 64


class ImageSource(Protocol):
    """Where pixels come from."""

    def read(self, annotations: Annotations, index: int) -> np.ndarray:
        """Return image ``index``, uint8 [H, W, 3]."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """Images on disk below one folder.

    Attributes:
        root: The folder that file names are relative to.
        apply_exif: Whether annotations were made on EXIF-rotated pictures; if False, on those that fit their size.
        value_range: Which values are black and white, where a channel has more than 8 bits.
    """

    root: Path
    apply_exif: bool = False
    value_range: ValueRange = ValueRange()

    def read(self, annotations: Annotations, index: int) -> np.ndarray:
        """Decode image ``index``; raises `BadImageError` naming the file."""
        size = int(annotations.heights[index]), int(annotations.widths[index])
        return read_image(self.root / annotations.file_name(index), size, self.apply_exif, self.value_range)


@dataclass
class Sample:
    """One image on its way to the model.

    Attributes:
        pixels: uint8 [h, w, 3].
        placement: What is left to do with pixels and masks on the device, or None.
        target: ``image_id`` (int) and per object, in canvas pixels: ``boxes`` float32 [N, 4] xyxy, ``labels``
            int64 [N], and where needed ``keypoints`` float32 [N, K, 3].
        blocks: One mask per object inside ``pixels``, where needed.
    """

    pixels: np.ndarray
    placement: Placement | None
    target: dict[str, np.ndarray | int]
    blocks: list[MaskBlock] | None = None


class DetectionDataset(Dataset[Sample]):
    """Images and targets of one split.

    An item is asked for as (epoch, index), or (epoch, index, k) where an epoch has it for the k-th time again; its
    augmentation is a function of these and the seed alone, whatever worker or process makes it.

    Args:
        annotations: All images of the split with their objects, whether they belong to the dataset or not.
        images: Where their pixels come from.
        label_map: Labels of the categories; objects of others are left out.
        indices: Which images belong to the dataset, int64; all by default.
        transforms: Training pipeline for a `LazyImage`; None shows every image as it is.
        needs_masks: Whether targets carry masks.
        needs_keypoints: Whether targets carry keypoints.
        flip_order: int [K], see `Placement.move_keypoints`.
        seed: The run's random seed, for augmentation.
        with_targets: Whether a sample has boxes and labels, or only its image id as scoring needs.
        resize_on_device: Leave resizing, placing and mirroring to the device, see `finish_pictures`.
    """

    def __init__(
        self,
        annotations: Annotations,
        images: ImageSource,
        label_map: LabelMap,
        *,
        indices: np.ndarray | None = None,
        transforms: v2.Compose | None = None,
        needs_masks: bool = False,
        needs_keypoints: bool = False,
        flip_order: np.ndarray | None = None,
        seed: int = 0,
        with_targets: bool = True,
        resize_on_device: bool = False,
    ) -> None:
        self.annotations, self.images, self.label_map = annotations, images, label_map
        self.indices = np.arange(len(annotations)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.transforms, self.seed = transforms, seed
        self.needs_masks, self.needs_keypoints, self.flip_order = needs_masks, needs_keypoints, flip_order
        self.with_targets, self.resize_on_device = with_targets, resize_on_device
        self.has_unknown_categories = not {id_ for id_, _ in annotations.categories} <= set(label_map.category_ids)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    @property
    def heights(self) -> np.ndarray:
        """Height of every image, int32 [len]."""
        return self.annotations.heights[self.indices]

    @property
    def widths(self) -> np.ndarray:
        """Width of every image, int32 [len]."""
        return self.annotations.widths[self.indices]

    def __getitem__(self, item: tuple[int, ...] | int) -> Sample:
        """Return a sample; a plain index means epoch 0.

        Raises:
            BadImageError: The image cannot be decoded; the text names the file.
        """
        epoch, index, *again = item if isinstance(item, tuple) else (0, item)
        i = int(self.indices[index])
        pixels = self.images.read(self.annotations, i)
        image_id = int(self.annotations.image_ids[i])
        if not self.with_targets:
            return Sample(pixels, None, {"image_id": image_id})
        with seeded_cpu_rng(self.seed, "sample", epoch, image_id, *again):
            return self._make_sample(pixels, i, image_id)

    def _make_sample(self, pixels: np.ndarray, i: int, image_id: int) -> Sample:
        """Augment one image with its objects; every per-object field is filtered by the same ``keep``."""
        annotations = self.annotations
        objects, boxes = trainable_objects(annotations, i)
        if self.has_unknown_categories:
            is_known = np.isin(annotations.category_ids[objects], self.label_map.category_ids)
            objects, boxes = objects[is_known], boxes[is_known]
        image = LazyImage.of(pixels, boxes)
        if self.transforms is not None:
            image = self.transforms(image)
            if not isinstance(image, LazyImage):
                raise TypeError(f"the transforms turned a LazyImage into {type(image).__name__}; leave that step out")

        placement = image.shown.place()
        moved = placement.move_boxes(boxes)
        sides, old_sides = moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2]
        # What a crop or a shrink leaves less than a pixel of is no longer to be seen; a tiny object that was
        # annotated as such stays, whatever float32 coordinates lose where they are moved.
        lost = 4 * np.finfo(np.float32).eps * max(placement.height, placement.width)
        kept = image.is_kept & (sides >= np.minimum(1, old_sides) - lost).all(axis=1)
        objects = objects[kept]

        target: dict[str, np.ndarray | int] = {
            "image_id": image_id,
            "boxes": moved[kept],
            "labels": self.label_map.labels_of(annotations.category_ids[objects]),
        }
        if self.needs_keypoints:
            keypoints = annotations.keypoints[objects].astype(np.float32)
            target["keypoints"] = placement.move_keypoints(keypoints, self.flip_order)
        on_device = self.resize_on_device and placement.shrink <= MAX_DEVICE_SHRINK
        blocks = None
        if self.needs_masks:
            blocks = [placement.crop_block(mask_block(annotations, i, n)) for n in objects]
            if not on_device:
                blocks = [placement.resize_block(block) for block in blocks]
        pixels = render(image, placement, resize=not on_device)
        return Sample(pixels, placement if on_device else None, target, blocks)


def trainable_objects(annotations: Annotations, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the objects of image ``i`` that are trained on: no crowds, no boxes without an inside.

    Returns:
        Their numbers, int64 [N], and their boxes, float32 [N, 4] xyxy, cut to the image.
    """
    objects = annotations.objects(i)
    boxes = clipped_boxes(annotations, i, objects)
    chosen = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(axis=1) & ~annotations.is_crowd[objects]
    return np.flatnonzero(chosen) + objects.start, boxes[chosen]


def clipped_boxes(annotations: Annotations, i: int | np.ndarray, objects: slice | np.ndarray) -> np.ndarray:
    """Return boxes of image ``i`` as float32 [len(objects), 4] xyxy, cut to the image.

    ``i`` may also be the images of all objects, int64 [len(objects)].
    """
    boxes = xywh_to_xyxy(annotations.boxes_xywh[objects].astype(np.float32))
    sides = annotations.widths[i], annotations.heights[i]
    np.maximum(boxes, 0, out=boxes)
    np.minimum(boxes, np.stack([*sides, *sides], axis=-1), out=boxes, casting="same_kind")
    return boxes
