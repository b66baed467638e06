"""The two splits of a run checked against each other, and against the labels of the model."""

import logging
import os
from collections.abc import Sequence

from annotations.image_checks import find_shared_files
from annotations.labels import alike_names
from loading.samples import ImageFolder
from loading.split import Split
from pixels.image_files import examples

logger = logging.getLogger(__name__)


def check_names(split: Split, ids: Sequence[int], names: Sequence[str], where: str) -> None:
    """Refuse a split that calls a category by another name than the labels' origin does.

    Raises:
        ValueError: Both names, and where they stand.
    """
    known = dict(zip(ids, names))
    for id_, name in split.annotations.categories:
        if known.get(id_, name) != name:
            raise ValueError(
                f"{split.name}: category {id_} is {name!r}, but {known[id_]!r} in {where}; labels go by the id, so "
                "one class would be taken for the other: give both the same ids and names"
            )


def warn_of_unused(train: Split, val: Split) -> None:
    """Say which pictures in the image folders no entry of either split names; both may share one folder."""
    for split, other in ((train, val), (val, train)):
        if not split.unused or not isinstance(split.images, ImageFolder) or not isinstance(other.images, ImageFolder):
            continue
        root = split.images.root.resolve()
        names, other_root = other.annotations.file_name, other.images.root.resolve()
        of_other = {os.path.join(other_root, names(i)) for i in range(len(other.annotations))}  # noqa: PTH118 - fast
        unused = [name for name in split.unused if os.path.join(root, name) not in of_other]  # noqa: PTH118
        if unused:
            logger.warning(
                "%s: %d picture(s) that no entry of %s names are not used: %s",
                split.images.root,
                len(unused),
                split.name,
                examples(unused),
            )
            if root == other_root:
                return


def warn_of_overlap(train: Split, val: Split) -> None:
    """Warn of pictures that are trained on and scored on."""
    paths = []
    for split in (train, val):
        if not isinstance(split.images, ImageFolder):
            return
        paths.append([split.images.root / split.annotations.file_name(i) for i in split.indices.tolist()])
    pairs = find_shared_files(*paths)
    if pairs:
        example = f"{pairs[0][1]} is {pairs[0][0]}"
        logger.warning(
            "%d of %d pictures to evaluate on are also trained on (%s): scores will be too good; "
            "check_dataset.py lists them",
            len(pairs),
            len(val.indices),
            example,
        )


def warn_of_alike_names(splits: Sequence[Split]) -> None:
    """Warn of classes that may be one, by their names: they are learnt and scored as different ones."""
    groups = alike_names(name for split in splits for _, name in split.annotations.categories)
    if groups:
        logger.warning(
            "%s: %d group(s) of classes have names that differ in case, blanks or dashes only: %s; if they are one "
            "class, write one name for it: they are learnt and scored as different classes",
            splits[0].name,
            len(groups),
            examples([" and ".join(map(repr, group)) for group in groups]),
        )
