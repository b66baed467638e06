"""What an evaluation gives: the figures, and the matches that everything else is worked out from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.coco_matching import Curves, Matches
from evaluation.coco_metrics import Figures


@dataclass(frozen=True, eq=False)
class SavedMatches:
    """What one kind of score keeps of an evaluation: enough for its figures with other weights of the images.

    Attributes:
        matches: `Matches.sorted`; ``images`` are positions in ``image_ids``.
        truth_images: int32 [N], position of the image of every object that counts (in the area range "all").
        truth_categories: int16 [N], position of its class.
        image_ids: int64 [I], of the evaluated images, ascending.
        class_names: K names.
        thresholds: float64 [T], IoU or OKS.
        recall_grid: float64 [R].
        fingerprint: Hash of the objects to find, masks by box and area; must agree for a comparison.
        settings: `EvalResult.settings`: what two evaluations must share to be compared.
    """

    matches: Matches
    truth_images: np.ndarray
    truth_categories: np.ndarray
    image_ids: np.ndarray
    class_names: tuple[str, ...]
    thresholds: np.ndarray
    recall_grid: np.ndarray
    fingerprint: str
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write a file of plain arrays that `load` reads."""
        text = {"class_names": self.class_names, "fingerprint": self.fingerprint, "settings": self.settings}
        matches = dict(zip(Matches.__dataclass_fields__, self.matches.columns()))
        arrays = {name: getattr(self, name) for name in _ARRAYS} | {f"match_{k}": v for k, v in matches.items()}
        np.savez_compressed(path, text=np.frombuffer(json.dumps(text).encode(), dtype=np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> "SavedMatches":
        """Read what `save` wrote.

        Raises:
            ValueError: The file is not one of those.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                text = json.loads(file["text"].tobytes())
                matches = Matches(*(file[f"match_{name}"] for name in Matches.__dataclass_fields__))
                arrays = {name: file[name] for name in _ARRAYS}
            text["class_names"] = tuple(text["class_names"])
            return cls(matches, **arrays, **text)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the matches of an evaluation ({error})") from None


_ARRAYS = ("truth_images", "truth_categories", "image_ids", "thresholds", "recall_grid")


@dataclass
class EvalResult:
    """The metrics of one evaluation, the same on every rank.

    Attributes:
        metrics: Per kind of score COCO's figures by name; None where there is no object to find.
        per_class: The same per class name.
        settings: What the figures depend on: sigmas, area rule, max_dets, number of images, versions.
        keypoint_errors: Per keypoint name how far off it is, see `summarize_errors`; empty without keypoints.
        curves: Per kind of score COCOeval's arrays; on rank 0 only.
        saved: Per kind of score the matches; on rank 0 only.
        num_truths: Objects that count per category and area range, int64 [K, A]; on rank 0 only.
        positions: int64 [I], where the evaluated images stand in the annotations, by image id; on rank 0 only.
        is_background: bool [I], which of them have no object at all; on rank 0 only.
    """

    metrics: dict[str, Figures]
    per_class: dict[str, dict[str, Figures]]
    settings: dict[str, Any]
    keypoint_errors: dict[str, Figures] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    saved: dict[str, SavedMatches] = field(default_factory=dict)
    num_truths: dict[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    is_background: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
