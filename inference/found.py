"""What a detector found in one picture: arrays, a drawing, COCO's records."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from annotations.record_reader import Record
from drawing.drawn_objects import drawn_detections
from drawing.pictures import draw_objects, save_picture
from drawing.viewer import viewer_picture
from evaluation.detections import Detections
from evaluation.results_files import results_of
from inference.trained_model import TrainedModel
from pixels.geometry import xywh_to_xyxy
from pixels.masks import MaskBlock


@dataclass(frozen=True, repr=False, eq=False)
class Found:
    """The objects that were found in one picture, in falling order of scores.

    ``len(found)`` is their number. In a notebook it shows itself as the picture with the objects drawn into it.

    Attributes:
        picture: uint8 [H, W, 3], RGB, upright.
        detections: The objects in the dataset's terms, with finite keypoints.
        trained: The model that found them; it knows the classes' and keypoints' names.
        index: The picture's position among those that were given.
    """

    picture: np.ndarray
    detections: Detections
    trained: TrainedModel
    index: int = 0
    _names: Mapping[int, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", self.trained.class_names)

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.detections)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.picture.shape[0], self.picture.shape[1]

    @property
    def boxes(self) -> np.ndarray:
        """Boxes as x1, y1, x2, y2 in pixels from the picture's top left corner, float64 [N, 4]."""
        assert self.detections.boxes_xywh is not None
        return xywh_to_xyxy(self.detections.boxes_xywh)

    @property
    def scores(self) -> np.ndarray:
        """Scores in 0..1, float64 [N]."""
        return self.detections.scores

    @property
    def category_ids(self) -> np.ndarray:
        """The dataset's own numbers of the classes, int64 [N]."""
        return self.detections.category_ids

    @property
    def class_names(self) -> list[str]:
        """Name of each object's class."""
        return [self._names[id_] for id_ in self.category_ids.tolist()]

    @property
    def masks(self) -> np.ndarray | None:
        """Masks of the picture's size, bool [N, H, W]; None where the model has none."""
        if self.detections.masks is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for mask, block in zip(masks, self.detections.masks):
            assert isinstance(block, MaskBlock)
            height, width = block.pixels.shape
            mask[block.top : block.top + height, block.left : block.left + width] = block.pixels
        return masks

    @property
    def keypoints(self) -> np.ndarray | None:
        """Keypoints as x, y in pixels, float64 [N, K, 2]; None where the model has none."""
        return None if self.detections.keypoints is None else self.detections.keypoints[:, :, :2]

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Names of the K keypoints."""
        return self.trained.keypoint_names

    def draw(self) -> Image.Image:
        """Return the picture with boxes, names, scores, masks and keypoints drawn into it."""
        return Image.fromarray(self._drawn().permute(1, 2, 0).numpy())

    def save(self, path: str | Path) -> None:
        """Write what `draw` returns to a file, whole or not at all; its suffix says in which format.

        Raises:
            OSError: It cannot be written.
        """
        save_picture(self._drawn(), path)

    def to_viewer(self, source: str, name: str) -> str:
        """Return what `drawing.viewer` shows of the picture.

        Args:
            source: Path of the picture relative to the page.
            name: Its file, as users know it.
        """
        drawn = drawn_detections(self.detections, self._names)
        return viewer_picture(source, name, self.size, drawn, self.scores)

    def to_coco(self, image_id: int | str) -> list[Record]:
        """Return one record per object as in a COCO results file: its box and, where there are, mask and keypoints.

        Args:
            image_id: The picture's id in the file that the results are for.
        """
        texts = dict(self.trained.label_map.id_texts)
        iou_types = self.trained.spec.iou_types
        kinds = [results_of(image_id, self.size, self.detections, iou_type, texts) for iou_type in iou_types]
        assert all(len(kind) == len(self) for kind in kinds)
        return [{k: v for part in parts for k, v in part.items()} for parts in zip(*kinds)]

    def _drawn(self) -> torch.Tensor:
        picture = torch.from_numpy(np.ascontiguousarray(self.picture).copy()).permute(2, 0, 1)
        drawn = drawn_detections(self.detections, self._names)
        return draw_objects(picture, drawn, self.trained.skeleton, keypoint_names=True)

    def _repr_jpeg_(self) -> bytes:
        """Return what a notebook shows."""
        file = io.BytesIO()
        self.draw().save(file, "JPEG", quality=90)
        return file.getvalue()

    def __repr__(self) -> str:
        """Return what was found in one line."""
        height, width = self.size
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.class_names).most_common())
        return f"<Found: {counts or 'nothing'} in a picture of {width} x {height} pixels>"
