"""A trained detector in use: pictures in, objects out.

from inference.detector import Detector

detector = Detector.load("runs/first/weights/best.pth")
found = detector("street.jpg")
found.boxes, found.class_names, found.scores
found.draw().show()
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaluation.detections import Detections, detections_from_output
from evaluation.postprocess import fast_scoring
from inference.found import Found
from inference.picture_files import BadFile, reject_or_batch
from inference.tiles import DEFAULT_OVERLAP, Tiling, outputs_in_tiles
from inference.trained_model import TrainedModel, choose_threshold, load_trained_model, settle_brightness
from loading.collate import PackedBatch, collate_fn, unpack
from loading.samples import Sample
from models.folded_norm import fold_frozen_norms
from models.resize import describe_vanishing, leaves_nothing
from pixels.images import BadImageError, pixels_of, read_image
from pixels.value_range import ValueRange
from process.device import choose_device
from runtime.signals import leave_stopping_to_parent

# A socket's address has 107 bytes on Linux, of which multiprocessing takes "/pymp-xxxxxxxx/listener-xxxxxxxx"; without
# this look a loading process would fail in silence and everything else wait for it.
LONGEST_TEMPORARY = 107 - 32

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


class Detector:
    """A trained model on its device, ready to find objects.

    Several threads may call one detector at the same time. Nothing outside it changes.

    Args:
        trained: The model is the detector's from now on: it is moved and changed for speed.
        device: Where to compute.
        score_threshold: Objects with a lower score are left out.
        tiling: How large pictures are cut into tiles; None looks at every picture as a whole.
    """

    def __init__(
        self, trained: TrainedModel, device: torch.device, score_threshold: float, tiling: Tiling | None = None
    ) -> None:
        self.trained, self.device, self.score_threshold, self.tiling = trained, device, score_threshold, tiling
        self._model = trained.model.eval().to(device)
        fold_frozen_norms(self._model)
        # For good, not call by call: threads would undo each other's changes.
        self._changes = contextlib.ExitStack()
        # Every detection has its keypoints: nothing is left to a limit per class.
        self._changes.enter_context(fast_scoring(self._model, max_keypoint_dets=sys.maxsize))
        # Before suppression, masks and keypoints instead of after. The others stay the same: a box is suppressed only
        # by boxes of higher score, and limits keep the best. Models ask for scores above, we for this one and above.
        owner: Any = getattr(self._model, "roi_heads", self._model)
        owner.score_thresh = max(owner.score_thresh, float(np.nextafter(np.float32(score_threshold), np.float32(-1))))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        score_threshold: float | None = None,
        tile: int | None = None,
        overlap: float = DEFAULT_OVERLAP,
    ) -> "Detector":
        """Read a checkpoint of train.py.

        Args:
            path: Such as ``runs/first/weights/best.pth``.
            device: Name of a torch device; None takes cuda where there is one, else the CPU.
            score_threshold: Objects with a lower score, in 0..1, are left out; None takes the one with the best F1 in
                the evaluation that the checkpoint holds, else 0.5.
            tile: Cut pictures that are larger than this, in pixels, into tiles of this size; None cuts none.
            overlap: What neighbouring tiles share at least, as a share of a tile's side.

        Raises:
            CheckpointError: The file cannot be used.
            ValueError: There is no such device, or a number is out of range.
        """
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold {score_threshold}: expected a number from 0 to 1")
        tiling = None if tile is None else Tiling(tile, overlap)
        chosen = choose_device(device)
        trained = load_trained_model(Path(path))
        return cls(trained, chosen, choose_threshold(score_threshold, trained)[0], tiling)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that the model knows."""
        return list(self.trained.class_names.values())

    def __repr__(self) -> str:
        """Return model, classes and threshold in one line."""
        name, classes = self.trained.spec.name, len(self.class_names)
        return f"<Detector: {name}, {classes} classes, scores from {self.score_threshold:.4g}, on {self.device}>"

    @overload
    def __call__(self, pictures: Picture, *, batch_size: int = 1) -> Found: ...

    @overload
    def __call__(self, pictures: list[Picture] | tuple[Picture, ...], *, batch_size: int = 1) -> list[Found]: ...

    def __call__(
        self, pictures: Picture | list[Picture] | tuple[Picture, ...], *, batch_size: int = 1
    ) -> Found | list[Found]:
        """Find the objects in one picture or in several.

        Args:
            pictures: A picture or a list of pictures, each the path of a file, a Pillow picture, an array uint8
                [H, W, 3] (RGB) or [H, W] (grey), or a tensor [3, H, W], uint8 or floating-point in 0..1.
            batch_size: Pictures, or tiles of one, that the model takes at a time. More than one pays on a GPU; boxes
                may then differ in the last digits, since pictures of a batch are padded to one size.

        Returns:
            What was found in the picture, or a list with one entry per picture.

        Raises:
            BadImageError: A file cannot be read as a picture.
            ValueError: Something else is no picture, or the model's resize leaves nothing of it.
        """
        if isinstance(pictures, (list, tuple)):
            return self._find(list(pictures), batch_size)
        return self._find([pictures], batch_size)[0]

    def _find(self, pictures: list[Picture], batch_size: int) -> list[Found]:
        """Return what was found in each picture."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        files = [Path(picture) for picture in pictures if isinstance(picture, (str, os.PathLike))]
        value_range = settle_brightness(self.trained, files).value_range if files else self.trained.value_range
        found: list[Found] = []
        for start in range(0, len(pictures), batch_size):
            indices = range(start, min(start + batch_size, len(pictures)))
            pixels = [self._pixels(pictures[i], i, value_range) for i in indices]
            images = [_to_floats(pictures[i], array).to(self.device) for i, array in zip(indices, pixels)]
            found += [
                Found(array, detections, self.trained, index)
                for index, array, detections in zip(indices, pixels, self.detect(images, batch_size))
            ]
        return found

    def _pixels(self, picture: Picture, index: int, value_range: ValueRange) -> np.ndarray:
        """Return a picture's pixels as they are drawn on, uint8 [H, W, 3]."""
        if isinstance(picture, (str, os.PathLike)):
            pixels = read_image(Path(picture), value_range=value_range)
        else:
            try:
                pixels = pixels_of(picture, value_range)
            except (ValueError, TypeError) as error:
                raise ValueError(f"picture {index}: {error}") from None
        height, width = pixels.shape[:2]
        if leaves_nothing(np.array(height), np.array(width), self.trained.spec):
            name = picture if isinstance(picture, (str, os.PathLike)) else f"picture {index}"
            raise ValueError(f"{name}: {describe_vanishing(height, width)}")
        return pixels

    @torch.inference_mode()
    def detect(self, images: list[Tensor], tiles_at_once: int = 1) -> list[Detections]:
        """Run the model on one batch.

        Args:
            images: float [3, H, W] in 0..1 each, on the detector's device.
            tiles_at_once: Tiles of a large picture that the model takes at a time.

        Returns:
            Per image what was found, in falling order of scores.
        """
        results = []
        tiling = None if self.tiling is None else replace(self.tiling, batch_size=tiles_at_once)
        for output in outputs_in_tiles(self._model, images, tiling):
            detections = detections_from_output(output, self.trained.label_map)
            order = np.argsort(-detections.scores, kind="stable")
            results.append(detections.take(order[detections.scores[order] >= self.score_threshold]))
        return results

    def over_files(
        self, paths: Sequence[Path], *, batch_size: int = 1, workers: int = 0
    ) -> Iterator[list[Found | BadFile]]:
        """Find the objects in many files; yields batch after batch, every file once, those that cannot be used first.

        Args:
            paths: Image files.
            batch_size: Pictures per batch, or tiles of one, at most.
            workers: Loading processes.

        Raises:
            ValueError: The folder for temporary files has too long a name for what loading processes send through it.
        """
        if workers > 0 and len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
            raise ValueError(
                f"{tempfile.gettempdir()}: expected at most {LONGEST_TEMPORARY} characters in the name of the folder "
                "for temporary files, where loading processes open sockets; set TMPDIR to a shorter one"
            )
        batches, bad = reject_or_batch(paths, batch_size, self.trained.spec)
        if bad:
            yield list(bad)
        loader = DataLoader(
            _Files(paths, self.trained.value_range),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        for loaded in loader:
            results: list[Found | BadFile] = list(loaded.bad)
            if loaded.batch is not None:
                images, targets = unpack(loaded.batch, self.device)
                pictures = loaded.batch.pictures(loaded.batch.buffer)
                for target, picture, detections in zip(targets, pictures, self.detect(images, batch_size)):
                    results.append(
                        Found(picture.permute(1, 2, 0).numpy(), detections, self.trained, target["image_id"])
                    )
            yield results


def _to_floats(picture: Picture, pixels: np.ndarray) -> Tensor:
    """Return a picture as models take it, float32 [3, H, W] in 0..1; floating-point tensors keep their values."""
    if isinstance(picture, Tensor) and picture.is_floating_point():
        return picture.to(torch.float32).expand(3, -1, -1)
    return unpack(collate_fn([Sample(pixels, None, {"image_id": 0})]), torch.device("cpu"))[0][0]


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


def _start_worker(_: int) -> None:
    """Let Ctrl-C reach the process that writes the results, which then ends this one."""
    leave_stopping_to_parent()
