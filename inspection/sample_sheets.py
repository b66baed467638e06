"""Sheets of samples: as they are annotated, and as training sees them after augmentation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drawing.drawn_objects import caption_names, drawn_truth
from drawing.pictures import Drawn, contact_sheet, draw_objects, save_picture
from loading.collate import unpack
from loading.loaders import DeviceLoader
from loading.samples import DetectionDataset
from loading.split import Split
from pixels.images import BadImageError
from pixels.masks import MaskBlock, block_from_mask
from utils import seeded_numpy_rng

# Pictures per row, and the side of one in pixels.
MAX_COLUMNS = 4
CELL = 480

# Keypoint names are written into sheets of so few pictures only.
MAX_NAMED = 4


def choose_samples(dataset: DetectionDataset, number: int, seed: int) -> list[int]:
    """Return positions of up to ``number`` readable samples, drawn with ``seed``, in their order in the dataset."""
    order = seeded_numpy_rng(seed, "sheet").permutation(len(dataset)).tolist()
    chosen: list[int] = []
    for position in order:
        if len(chosen) == number:
            break
        try:
            dataset.images.read(dataset.annotations, int(dataset.indices[position]))
            chosen.append(position)
        except BadImageError:
            continue  # reported elsewhere
    return sorted(chosen)


def annotated_sheet(split: Split, dataset: DetectionDataset, samples: list[int]) -> Tensor:
    """Draw samples with everything the file says of them, crowds and objects that are not trained on included.

    Args:
        split: The training split.
        dataset: The training dataset.
        samples: Positions in it.

    Returns:
        uint8 [3, H, W].
    """
    pictures = []
    for position in samples:
        i = int(dataset.indices[position])
        pixels = dataset.images.read(split.annotations, i)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        drawn = drawn_truth(
            split.annotations,
            i,
            caption_names(split.annotations),
            with_masks=dataset.needs_masks,
            with_keypoints=dataset.needs_keypoints,
        )
        title = f"{split.annotations.file_name(i)}  {image.shape[2]} x {image.shape[1]}"
        pictures.append((title, _draw(image, drawn, split, len(samples))))
    return contact_sheet(pictures, columns=_columns(len(samples)), cell=CELL)


def augmented_sheet(split: Split, loader: DeviceLoader, samples: list[int], epoch: int = 0) -> Tensor:
    """Draw samples as the model gets them in training, through the loader's own dataset and collation.

    Args:
        split: The training split.
        loader: The training loader, on the CPU.
        samples: Positions in its dataset.
        epoch: From 0; augmentation differs between epochs.

    Returns:
        uint8 [3, H, W].
    """
    dataset = loader.dataset
    batch = loader.loader.collate_fn([dataset[epoch, position] for position in samples])
    images, targets = unpack(batch, torch.device("cpu"))
    names = caption_names(split.annotations)
    pictures = []
    for position, image, target in zip(samples, images, targets):
        ids = dataset.label_map.categories_of(target["labels"].numpy())
        drawn = Drawn(
            target["boxes"].numpy(),
            [names[id_] for id_ in ids.tolist()],
            ids,
            [block_from_mask(mask.numpy()) for mask in target["masks"]] if "masks" in target else None,
            target["keypoints"].numpy() if "keypoints" in target else None,
        )
        pixels = (image * 255).round().to(torch.uint8)
        title = f"{split.annotations.file_name(int(dataset.indices[position]))}  {pixels.shape[2]} x {pixels.shape[1]}"
        pictures.append((title, _draw(pixels, drawn, split, len(samples))))
    return contact_sheet(pictures, columns=_columns(len(samples)), cell=CELL)


def _draw(image: Tensor, drawn: Drawn, split: Split, num_pictures: int) -> Tensor:
    """Draw objects; a picture smaller than its cell is enlarged first, so that lines and text stay fine.

    Where there is one class only, every object has a colour of its own.
    """
    if len(split.annotations.categories) == 1:
        drawn = replace(drawn, colours=np.arange(len(drawn)))
    factor = math.ceil(CELL / max(image.shape[-2:]))
    if factor > 1:
        image = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        masks, points = drawn.masks, drawn.keypoints
        if masks is not None:
            square = np.ones((factor, factor), dtype=np.uint8)
            masks = [MaskBlock(m.left * factor, m.top * factor, np.kron(m.pixels, square)) for m in masks]
        if points is not None:
            points = points * [factor, factor, 1]
        drawn = replace(drawn, boxes=drawn.boxes * factor, masks=masks, keypoints=points)
    return draw_objects(image, drawn, split.skeleton, keypoint_names=num_pictures <= MAX_NAMED, shown_at=CELL)


def _columns(num_pictures: int) -> int:
    return min(MAX_COLUMNS, math.ceil(math.sqrt(num_pictures)))


def write_sheets(
    folder: Path, split: Split, loader: DeviceLoader, number: int, *, preset: str, seed: int
) -> list[Path]:
    """Write both sheets of the same samples; returns their paths.

    Args:
        folder: Where to; is made.
        split: The training split.
        loader: The training loader, on the CPU.
        number: How many samples to draw, at the most.
        preset: Name of the augmentation, for the file name.
        seed: Chooses the samples.
    """
    samples = choose_samples(loader.dataset, number, seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "annotated.jpg", folder / f"augmented_{preset}.jpg"]
    save_picture(annotated_sheet(split, loader.dataset, samples), paths[0])
    save_picture(augmented_sheet(split, loader, samples), paths[1])
    return paths
