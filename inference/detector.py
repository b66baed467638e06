"""A checkpoint's model run over image files that no dataset describes: finding, loading, batching, detecting."""

import contextlib
import glob
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from annotations.labels import LabelMap
from annotations.skeleton import Skeleton
from custom_dataset import IMAGE_SUFFIXES
from evaluation.detections import Detections, detections_from_output
from evaluation.postprocess import fast_scoring
from loading.collate import PackedBatch, collate_fn, unpack
from loading.samples import Sample
from models.architectures import ModelSpec
from pixels.images import BadImageError, is_text, read_header, read_image
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model

# Pixels of a batch: large pictures come in smaller batches, down to one alone.
MAX_BATCH_PIXELS = 24_000_000


@dataclass(frozen=True)
class Detector:
    """A model and what its outputs mean.

    Attributes:
        model: On the CPU, in evaluation mode.
        spec: Of the model.
        label_map: Classes, and the dataset's category ids.
        skeleton: Of its keypoints.
        score_threshold: That of the best F1 in the evaluation that the checkpoint holds; None without one.
    """

    model: nn.Module
    spec: ModelSpec
    label_map: LabelMap
    skeleton: Skeleton
    score_threshold: float | None = None

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the categories by id."""
        return {id_: name for id_, name in zip(self.label_map.category_ids, self.label_map.names) if id_ >= 0}

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """One name per keypoint; numbers from 0 where the dataset has none."""
        return self.skeleton.names or tuple(map(str, range(self.spec.num_keypoints)))


def load_detector(path: Path) -> Detector:
    """Read a checkpoint of this suite.

    Raises:
        CheckpointError: It cannot be used.
    """
    content = load_checkpoint(path)
    model, spec = rebuild_model(content)
    known = content["dataset"]
    skeleton = Skeleton(tuple(known["keypoint_names"]), tuple((a, b) for a, b in known["skeleton"]))
    label_map = LabelMap(tuple(known["label_categories"]), tuple(known["label_names"]))
    # An evaluation in which nothing was found leaves 0, which says nothing.
    threshold = content.get("metrics", {}).get("score_threshold") or None
    return Detector(model.eval(), spec, label_map, skeleton, threshold)


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the image files behind files, folders and glob patterns, in the order given, each once.

    Folders are searched to any depth for files with an image's suffix, sorted by name; a file named outright is
    taken whatever its suffix.

    Raises:
        FileNotFoundError: A path or pattern matches nothing.
    """
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        # Path.glob takes no absolute patterns.
        matches = [path] if path.exists() else sorted(Path(m) for m in glob.glob(text, recursive=True))  # noqa: PTH207
        files = [match for match in matches if match.is_file()]
        for folder in (match for match in matches if match.is_dir()):
            files += [file for file in sorted(folder.rglob("*")) if _looks_like_image(file)]
        if not files:
            what = "no images in it" if matches else "no such file or folder, and no file matches it as a pattern"
            raise FileNotFoundError(f"{text}: {what}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        index: Its position in the list of files.
        reason: Why, without the file's name.
    """

    index: int
    reason: str


@dataclass
class _Loaded:
    """A batch as it comes out of a loading process."""

    batch: PackedBatch | None
    bad: list[BadFile]

    def pin_memory(self) -> "_Loaded":
        if self.batch is not None:
            self.batch.pin_memory()
        return self


class _Files(Dataset[Sample | BadFile]):
    """Image files by position; one that cannot be decoded gives its reason."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Sample | BadFile:
        try:
            return Sample(read_image(self.paths[index]), None, {"image_id": index})
        except BadImageError as error:
            return BadFile(index, error.problem)


def _collate(items: list[Sample | BadFile]) -> _Loaded:
    samples = [item for item in items if isinstance(item, Sample)]
    bad = [item for item in items if isinstance(item, BadFile)]
    return _Loaded(collate_fn(samples) if samples else None, bad)


@dataclass(frozen=True)
class Prediction:
    """What was found in one picture.

    Attributes:
        index: Position of its file in the list of files.
        image: uint8 [3, H, W] on the CPU, after EXIF rotation.
        detections: In falling order of scores, with finite keypoints.
    """

    index: int
    image: Tensor
    detections: Detections


def reject_or_batch(paths: Sequence[Path], batch_size: int) -> tuple[list[list[int]], list[BadFile]]:
    """Reject files that are no readable pictures and batch the others: (positions of each batch, rejected files).

    A batch has ``batch_size`` pictures, or fewer where they have more than `MAX_BATCH_PIXELS` together.
    """
    batches: list[list[int]] = []
    bad: list[BadFile] = []
    pixels = 0
    for index, path in enumerate(paths):
        if not is_text(str(path)):
            bad.append(BadFile(index, "the file's name is not UTF-8"))
            continue
        try:
            size = math.prod(read_header(path).shown_size)
        except BadImageError as error:
            bad.append(BadFile(index, error.problem))
            continue
        if not batches or len(batches[-1]) == batch_size or pixels + size > MAX_BATCH_PIXELS:
            batches.append([])
            pixels = 0
        batches[-1].append(index)
        pixels += size
    return batches, bad


@torch.inference_mode()
def predict_files(
    detector: Detector,
    paths: Sequence[Path],
    *,
    device: torch.device,
    score_threshold: float,
    batch_size: int = 1,
    workers: int = 0,
) -> Iterator[list[Prediction | BadFile]]:
    """Run a detector over image files; yields batch after batch, every file once.

    Args:
        detector: Its model is moved to ``device``.
        paths: Image files.
        device: Where to compute.
        score_threshold: Detections below it are left out.
        batch_size: Pictures per batch, at most.
        workers: Loading processes.
    """
    batches, bad = reject_or_batch(paths, batch_size)
    if bad:
        yield list(bad)
    loader = DataLoader(
        _Files(paths),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    model = detector.model.to(device)
    # Every detection has its keypoints: nothing is left to a limit per class.
    with fast_scoring(model, max_keypoint_dets=sys.maxsize), _no_lower_than(model, score_threshold):
        for loaded in loader:
            results: list[Prediction | BadFile] = list(loaded.bad)
            if loaded.batch is not None:
                images, targets = unpack(loaded.batch, device)
                for target, picture, output in zip(targets, _pictures(loaded.batch), model(images)):
                    detections = detections_from_output(output, detector.label_map)
                    order = np.argsort(-detections.scores, kind="stable")
                    kept = order[detections.scores[order] >= score_threshold]
                    results.append(Prediction(target["image_id"], picture, detections.take(kept)))
            yield results


def _pictures(batch: PackedBatch) -> list[Tensor]:
    """Return the batch's pictures as they were decoded, uint8 [3, H, W]."""
    sizes = [height * width * 3 for height, width in batch.image_sizes]
    parts = batch.buffer.split(sizes)
    return [part.view(*size, 3).permute(2, 0, 1) for part, size in zip(parts, batch.image_sizes)]


@contextlib.contextmanager
def _no_lower_than(model: nn.Module, score_threshold: float) -> Iterator[None]:
    """Let a model give up detections below a score before suppression, masks and keypoints instead of after.

    The others stay the same: a box is suppressed only by boxes of higher score, and limits keep the best.
    """
    owner: Any = getattr(model, "roi_heads", model)
    own = owner.score_thresh
    # Models ask for scores above their threshold, we for this score and above.
    owner.score_thresh = max(own, float(np.nextafter(np.float32(score_threshold), np.float32(-1))))
    try:
        yield
    finally:
        owner.score_thresh = own
