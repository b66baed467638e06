"""A checkpoint's model run over image files that no dataset describes: finding, loading, batching, detecting."""

import contextlib
import glob
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from annotations.labels import LabelMap
from annotations.skeleton import Skeleton
from annotations.value_ranges import look_at_values, settle_value_range
from evaluation.detections import Detections, detections_from_output
from evaluation.postprocess import fast_scoring
from loading.collate import PackedBatch, collate_fn, unpack
from loading.samples import Sample
from models.architectures import ModelSpec
from models.folded_norm import fold_frozen_norms
from models.resize import describe_vanishing, leaves_nothing
from pixels.image_files import examples, is_picture_name, list_folder, result_folder
from pixels.images import BadImageError, is_text, read_header, read_image
from pixels.value_range import ValueRange
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model
from runtime.signals import leave_stopping_to_parent

# Pixels of a batch: large pictures come in smaller batches, down to one alone.
MAX_BATCH_PIXELS = 24_000_000


@dataclass(frozen=True)
class Detector:
    """A model and what its outputs mean.

    Attributes:
        model: On the CPU, in evaluation mode.
        spec: What the model was built from.
        label_map: Classes, and the dataset's category ids.
        skeleton: Names, links and left-right partners of the keypoints; empty without keypoints.
        score_threshold: That of the best F1 in the evaluation that the checkpoint holds; None without one.
        value_range: Which values were black and white in training, where a channel has more than 8 bits.
        flags: Those of the training, by name.
    """

    model: nn.Module
    spec: ModelSpec
    label_map: LabelMap
    skeleton: Skeleton
    score_threshold: float | None = None
    value_range: ValueRange = ValueRange()
    flags: Mapping[str, Any] = field(default_factory=dict)

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
    label_map = LabelMap.from_plain(known)
    # An evaluation in which nothing was found leaves 0, which says nothing.
    threshold = content.get("metrics", {}).get("score_threshold") or None
    value_range = ValueRange.from_plain(known.get("value_range"))
    return Detector(model.eval(), spec, label_map, skeleton, threshold, value_range, content.get("args", {}))


def settle_brightness(detector: Detector, paths: Sequence[Path], workers: int | None = None) -> Detector:
    """Return the detector with a rule for the brightness of these files, where its checkpoint has none.

    Warns of files that do not fit the rule. One rule holds for all of them.
    """
    seen = look_at_values(len(paths), paths.__getitem__, workers=workers)
    return replace(detector, value_range=settle_value_range(seen, detector.value_range, "files"))


@dataclass(frozen=True)
class ImageFiles:
    """What `search_images` found.

    Attributes:
        paths: Pictures by their names, and files named outright, each once.
        left_out: {path: why} of everything else in the folders that were searched.
    """

    paths: list[Path]
    left_out: dict[Path, str]


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the paths of `search_images`."""
    return search_images(paths).paths


def search_images(paths: Sequence[str]) -> ImageFiles:
    """Return the image files behind files, folders and glob patterns, in the order given.

    Folders are searched as `list_folder` does, sorted by name; a file named outright is taken whatever its suffix.
    A pattern does not reach into folders of results unless it names them.

    Raises:
        FileNotFoundError: A path or pattern matches nothing.
    """
    found: dict[Path, Path] = {}
    left_out: dict[Path, str] = {}
    for text in paths:
        path = Path(text)
        matches, others = ([path], {}) if path.exists() else _expand(text)
        files = [match for match in matches if match.is_file()]
        for folder in (match for match in matches if match.is_dir()):
            content = list_folder(folder)
            files += sorted(folder / name for name in content.files if is_picture_name(name))
            others |= {folder / name: "no picture by its name" for name in content.files if not is_picture_name(name)}
            others |= {folder / name: reason for name, reason in content.left_out}
        if not files:
            what = (
                "no images in it"
                if matches or others
                else "no such file or folder, and no file matches it as a pattern"
            )
            raise FileNotFoundError("; ".join(filter(None, [f"{text}: {what}", format_left_out(others)])))
        for file in files:
            found.setdefault(file.resolve(), file)
        left_out |= others
    return ImageFiles(
        list(found.values()), {path: why for path, why in left_out.items() if path.resolve() not in found}
    )


def _expand(pattern: str) -> tuple[list[Path], dict[Path, str]]:
    """Return (what matches a glob pattern, {folder of results that the pattern does not name: why it is left out})."""
    named = list(itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    matches, results = [], {}
    origin_of: dict[Path, str | None] = {}
    for match in sorted(Path(m) for m in glob.glob(pattern, recursive=True)):  # noqa: PTH207 - takes absolute patterns
        for folder in (*reversed(match.parents), match):
            if len(folder.parts) <= len(named):
                continue
            if folder not in origin_of:
                origin_of[folder] = result_folder(os.listdir(folder)) if folder.is_dir() else None  # noqa: PTH208
            if origin_of[folder] is not None:
                results[folder] = f"results of {origin_of[folder]}"
                break
        else:
            matches.append(match)
    return matches, results


def format_left_out(left_out: Mapping[Path, str]) -> str:
    """Return how many files and folders were left out for which reason, with examples, as one line."""
    of_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        of_reason.setdefault(reason, []).append(str(path))
    return "; ".join(f"{reason} ({len(names)}): {examples(names)}" for reason, names in of_reason.items())


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

    def __init__(self, paths: Sequence[Path], value_range: ValueRange) -> None:
        self.paths, self.value_range = paths, value_range

    def __getitem__(self, index: int) -> Sample | BadFile:
        try:
            pixels = read_image(self.paths[index], value_range=self.value_range)
            return Sample(pixels, None, {"image_id": index})
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


def reject_or_batch(paths: Sequence[Path], batch_size: int, spec: ModelSpec) -> tuple[list[list[int]], list[BadFile]]:
    """Reject files that the model cannot use and batch the others: (positions of each batch, rejected files).

    Rejected are what is no readable picture, and pictures of which the model's resize leaves nothing. A batch has
    ``batch_size`` pictures, or fewer where they have more than `MAX_BATCH_PIXELS` together.
    """
    batches: list[list[int]] = []
    bad: list[BadFile] = []
    pixels = 0
    for index, path in enumerate(paths):
        if not is_text(str(path)):
            bad.append(BadFile(index, "the file's name is not UTF-8"))
            continue
        try:
            height, width = read_header(path).shown_size
        except BadImageError as error:
            bad.append(BadFile(index, error.problem))
            continue
        if leaves_nothing(np.array(height), np.array(width), spec):
            bad.append(BadFile(index, describe_vanishing(height, width)))
            continue
        size = height * width
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
    batches, bad = reject_or_batch(paths, batch_size, detector.spec)
    if bad:
        yield list(bad)
    loader = DataLoader(
        _Files(paths, detector.value_range),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    model = detector.model.to(device)
    fold_frozen_norms(model)
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


def _start_worker(_: int) -> None:
    """Let Ctrl-C reach the process that writes the results, which then ends this one."""
    leave_stopping_to_parent()


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
