"""Joint transforms of image and boxes that ``torchvision.transforms.v2`` lacks, or has only slowly.

All of them draw from torch's default CPU generator, as v2's own do, and change nothing in place.
"""

from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from pixels.lazy_image import LazyImage


class FixedSizeCrop(v2.Transform):
    """Cut a random window of at most the given size; smaller images stay whole.

    One random number places the window on both axes, as in torchvision's detection scripts. Nothing is padded:
    torchvision's models pad every batch themselves.

    Args:
        height: Largest height of the window in pixels.
        width: Largest width of the window in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window inside the sample's canvas."""
        canvas_height, canvas_width = _canvas_size(flat_inputs)
        height, width = min(canvas_height, self.height), min(canvas_width, self.width)
        r = float(torch.rand(()))
        top, left = int((canvas_height - height) * r), int((canvas_width - width) * r)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input."""
        return self._call_kernel(tvf.crop, inpt, **params)


class RandomIoUCrop(v2.RandomIoUCrop):
    """v2's ``RandomIoUCrop``, with all trials of one overlap drawn and judged at once.

    The distribution is v2's; the order in which random numbers are used is not. Boxes whose centre is
    outside the crop are dropped: a `LazyImage` no longer keeps them, ``BoundingBoxes`` become zero as v2's do.
    """

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Accept any sample with boxes."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw an overlap and a crop that reaches it; an empty dict means "leave as is"."""
        height, width = _canvas_size(flat_inputs)
        boxes_xyxy = _canvas_boxes(flat_inputs).astype(np.float64)
        while True:
            min_overlap = self.options[int(torch.randint(len(self.options), ()))]
            if min_overlap >= 1.0 or len(boxes_xyxy) == 0:
                return {}
            crops = self._draw_crops(height, width)
            inside, reaches = _judge_crops(crops, boxes_xyxy, min_overlap)
            if reaches.any():
                first = int(reaches.argmax())
                left, top, right, bottom = (int(v) for v in crops[first])
                return {
                    "top": top,
                    "left": left,
                    "height": bottom - top,
                    "width": right - left,
                    "is_within_crop_area": torch.from_numpy(inside[first]),
                }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input and drop the boxes outside."""
        cropped = super().transform(inpt, params)
        if params and isinstance(inpt, LazyImage):
            return cropped.keeping(params["is_within_crop_area"].numpy())
        return cropped

    def _draw_crops(self, height: int, width: int) -> np.ndarray:
        """Return ``trials`` windows, int64 [T, 4] xyxy; windows of a forbidden aspect ratio are empty."""
        r = torch.rand(self.trials, 4).numpy().astype(np.float64)
        scale = self.min_scale + (self.max_scale - self.min_scale) * r[:, :2]
        widths, heights = (width * scale[:, 0]).astype(np.int64), (height * scale[:, 1]).astype(np.int64)
        aspect = widths / np.maximum(heights, 1)
        allowed = (self.min_aspect_ratio <= aspect) & (aspect <= self.max_aspect_ratio)
        left = ((width - widths) * r[:, 2]).astype(np.int64)
        top = ((height - heights) * r[:, 3]).astype(np.int64)
        return np.stack([left, top, left + widths * allowed, top + heights * allowed], axis=1)


def _judge_crops(crops: np.ndarray, boxes: np.ndarray, min_overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (which boxes have their centre in which crop [T, N], which crops are good enough [T])."""
    left, top, right, bottom = (crops[:, None, i] for i in range(4))
    x1, y1, x2, y2 = boxes.T
    centre_x, centre_y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
    inside = (left < centre_x) & (centre_x < right) & (top < centre_y) & (centre_y < bottom)
    overlap_width = (np.minimum(right, x2) - np.maximum(left, x1)).clip(min=0)
    overlap_height = (np.minimum(bottom, y2) - np.maximum(top, y1)).clip(min=0)
    overlap = overlap_width * overlap_height
    union = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap
    iou = np.where(inside, overlap / np.maximum(union, 1e-9), -1.0)
    return inside, inside.any(axis=1) & (iou.max(axis=1) >= min_overlap)


def _canvas_size(flat_inputs: list[Any]) -> tuple[int, int]:
    """Return (height, width) of the sample."""
    for x in flat_inputs:
        if isinstance(x, LazyImage):
            return x.shown.height, x.shown.width
    return next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes)).canvas_size


def _canvas_boxes(flat_inputs: list[Any]) -> np.ndarray:
    """Return the sample's boxes, float [N, 4] xyxy: those of v2, or those that a `LazyImage` carries."""
    for x in flat_inputs:
        if isinstance(x, tv_tensors.BoundingBoxes):
            return x.as_subclass(torch.Tensor).numpy()
    return next(x for x in flat_inputs if isinstance(x, LazyImage)).canvas_boxes()
