"""Detections in the dataset's terms, whoever made them: category ids, xywh boxes, masks, keypoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from annotations.labels import LabelMap
from pixels.geometry import xyxy_to_xywh
from pixels.masks import MaskBlock, block_from_mask


@dataclass
class Detections:
    """One image's detections.

    Attributes:
        category_ids: int64 [D].
        scores: float64 [D].
        boxes_xywh: float64 [D, 4].
        masks: D mask blocks, or D of COCO's run-length dicts.
        keypoints: float64 [D, K, 3]; NaN for detections that are too far down the list to be scored.
    """

    category_ids: np.ndarray
    scores: np.ndarray
    boxes_xywh: np.ndarray | None = None
    masks: Sequence[MaskBlock] | Sequence[dict[str, Any]] | None = None
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.scores)

    def take(self, index: np.ndarray) -> "Detections":
        """Return the detections at the positions ``index``."""
        return Detections(
            self.category_ids[index],
            self.scores[index],
            None if self.boxes_xywh is None else self.boxes_xywh[index],
            None if self.masks is None else [self.masks[i] for i in index],
            None if self.keypoints is None else self.keypoints[index],
        )


def detections_from_output(output: Mapping[str, Any], label_map: LabelMap) -> Detections:
    """Convert one of a torchvision model's output dicts, plain, from `fast_scoring` or in ``blocks`` of masks.

    Boxes become xywh in float32 before they become float64, as in torchvision's scripts; detections whose label has no
    category are left out, which COCOeval does silently.
    """
    boxes = _to_numpy(output["boxes"])
    category_ids = label_map.categories_of(output["labels"].cpu().numpy())
    keypoints = output.get("keypoints")
    detections = Detections(
        category_ids,
        _to_numpy(output["scores"]).astype(np.float64),
        xyxy_to_xywh(boxes).astype(np.float64),
        blocks_of_output(output) if "masks" in output or "blocks" in output else None,
        None if keypoints is None else _to_numpy(keypoints).astype(np.float64),
    )
    known = category_ids >= 0
    return detections if known.all() else detections.take(np.flatnonzero(known))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu").float().numpy()


def blocks_of_output(output: Mapping[str, Any]) -> list[MaskBlock]:
    """Return the blocks of an output's masks: as they are, or of masks, float [D, 1, H, W], thresholded at 0.5.

    Small masks of `fast_scoring` are shown on their canvas first.
    """
    if "blocks" in output:
        return list(output["blocks"])
    if "canvas" in output:
        from evaluation.postprocess import blocks_of_masks  # loads torchvision, which scores of files do without

        return blocks_of_masks(output["masks"], output["boxes"], *output["canvas"])
    return [block_from_mask(mask) for mask in (output["masks"][:, 0] > 0.5).cpu().numpy()]
