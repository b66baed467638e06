"""One split of a dataset, whatever the format of its files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from annotations.arrays import Annotations
from annotations.findings import Finding, Findings
from annotations.image_checks import check_files, check_headers
from annotations.skeleton import Skeleton, infer_flip_pairs
from loading.samples import ImageFolder, ImageSource
from pixels.value_range import ValueRange

logger = logging.getLogger(__name__)


class NoSplitError(FileNotFoundError):
    """A dataset names no pictures for a role."""


@dataclass(frozen=True)
class Split:
    """One split of a dataset.

    Attributes:
        name: For messages.
        annotations: All images of the split with their objects, unusable images included.
        images: Where the pixels come from.
        indices: The usable images, int64.
        skeleton: Names, links and left-right partners of the keypoints; empty without keypoints.
        unused: Pictures below the image folder that no entry names.
        members: The images that belong to the split, usable or not, int64; None for all. Where one split is held out
            of another, both have the same annotations.
    """

    name: str
    annotations: Annotations
    images: ImageSource
    indices: np.ndarray
    skeleton: Skeleton = field(default_factory=Skeleton)
    unused: tuple[str, ...] = ()
    members: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """Number of images, unusable ones included."""
        return len(self.annotations) if self.members is None else len(self.members)

    def is_member(self) -> np.ndarray:
        """Return which images of the annotations belong to the split, bool [I]."""
        return (
            np.ones(len(self.annotations), dtype=bool)
            if self.members is None
            else np.isin(np.arange(len(self.annotations)), self.members)
        )

    def shown_in(self, value_range: ValueRange) -> "Split":
        """Return the split with these values as black and white, where its pictures are files."""
        images = replace(self.images, value_range=value_range) if isinstance(self.images, ImageFolder) else self.images
        return replace(self, images=images)


def checked_split(
    name: str,
    annotations: Annotations,
    images: ImageFolder,
    skeleton: Skeleton,
    findings: Findings,
    *,
    cache_dir: Path | None = None,
) -> Split:
    """Look for the image files of what was read, log all warnings, and return the split.

    Args:
        name: For messages.
        annotations: What the files say.
        images: The folder of the pictures.
        skeleton: Names, links, mirror pairs and sigmas of the keypoints; empty without any.
        findings: What is known already of files; collects what is wrong with images.
        cache_dir: Remembers which images are good.

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    files = check_files(annotations, images.root, findings)
    annotations = annotations.with_file_names(files.respelled)
    present = np.setdiff1d(np.arange(len(annotations)), sorted(findings.dropped_images))
    check_headers(annotations, images.root, findings, cache_dir=cache_dir, indices=present)
    findings.raise_errors()
    log_warnings((*annotations.warnings, *findings.warnings()))
    indices = np.setdiff1d(np.arange(len(annotations)), sorted(findings.dropped_images))
    return Split(name, annotations, images, indices, skeleton, files.unused)


def implied_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Return `infer_flip_pairs`; None with a warning where a name that seems to have a side stands alone."""
    try:
        return infer_flip_pairs(names)
    except ValueError as error:
        logger.warning("%s; if the keypoints are trained on, pictures are not mirrored", error)
        return None


def log_warnings(warnings: Sequence[Finding]) -> None:
    """Log what was repaired, left out or is suspicious, one line each."""
    for finding in warnings:
        logger.warning("%s", finding)
