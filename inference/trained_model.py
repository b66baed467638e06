"""What a checkpoint holds for use: the model, and what its outputs mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from annotations.labels import LabelMap
from annotations.skeleton import Skeleton
from annotations.value_ranges import look_at_values, settle_value_range, warn_of_pages
from models.architectures import ModelSpec
from pixels.value_range import ValueRange
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model

# Where the checkpoint was never evaluated.
DEFAULT_SCORE_THRESHOLD = 0.5


@dataclass(frozen=True)
class TrainedModel:
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


def load_trained_model(path: Path) -> TrainedModel:
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
    return TrainedModel(model.eval(), spec, label_map, skeleton, threshold, value_range, content.get("args", {}))


def settle_brightness(trained: TrainedModel, paths: Sequence[Path], workers: int | None = None) -> TrainedModel:
    """Return the model with a rule for the brightness of these files, where its checkpoint has none.

    Warns of files that do not fit the rule, and of those with several pages. One rule holds for all of them.
    """
    seen = look_at_values(len(paths), paths.__getitem__, workers=workers)
    warn_of_pages(seen, "files")
    return replace(trained, value_range=settle_value_range(seen.values, trained.value_range, "files"))


def choose_threshold(given: float | None, trained: TrainedModel) -> tuple[float, str]:
    """Return (score below which detections are left out, where it comes from)."""
    if given is not None:
        return given, "as given"
    if trained.score_threshold is not None:
        return trained.score_threshold, "best F1 in the checkpoint's evaluation"
    return DEFAULT_SCORE_THRESHOLD, "the default: no evaluation of the checkpoint has found an object"
