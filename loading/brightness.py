"""The one rule for the brightness of all pictures of a dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from annotations.arrays import Annotations
from annotations.image_checks import FileMemory
from annotations.value_ranges import SeenPictures, look_at_values, settle_value_range, warn_of_pages
from loading.samples import ImageFolder, ImageSource
from pixels.value_range import ValueRange


def dataset_value_range(
    splits: Sequence[tuple[ImageSource, Annotations, np.ndarray]],
    known: ValueRange,
    name: str,
    cache_dir: Path | None = None,
) -> ValueRange:
    """Return which values are black and white in all pictures of all splits; the log says so where it matters.

    Files with several pages or frames are warned of.

    Args:
        splits: (where pixels come from, annotations, usable images int64) of each.
        known: The rule of a checkpoint, which stays; empty for a new run.
        name: What the pictures are called in messages.
        cache_dir: Remembers what was seen of each file; None for the default.
    """
    seen = SeenPictures()
    for images, annotations, indices in splits:
        if isinstance(images, ImageFolder):
            seen += _look_at_split(images, annotations, indices, cache_dir)
    warn_of_pages(seen, name)
    return settle_value_range(seen.values, known, name)


def _look_at_split(
    images: ImageFolder, annotations: Annotations, indices: np.ndarray, cache_dir: Path | None
) -> SeenPictures:
    return look_at_values(
        len(indices),
        lambda n: images.root / annotations.file_name(int(indices[n])),
        memory=FileMemory("pictures", images.root, cache_dir),
    )
