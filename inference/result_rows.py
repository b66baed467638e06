"""What was found as rows of a csv and as a list in a json file, written as it comes."""

import json
from typing import IO, Any

from annotations.record_reader import Record
from inference.found import Found
from inference.trained_model import TrainedModel
from inference.video import Frame
from pixels.masks import MaskBlock


class JsonList:
    """A list in a json file, an entry a line, of which nothing stays in memory.

    Attributes:
        count: Entries so far.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self.count = file, 0

    def add(self, entry: Record) -> None:
        """Write one more entry."""
        self._file.write(("[" if self.count == 0 else ",\n") + json.dumps(entry))
        self.count += 1

    def end(self) -> None:
        """Write the end of the list."""
        self._file.write("]\n" if self.count else "[]\n")


def csv_header(trained: TrainedModel, *, with_frames: bool) -> list[str]:
    """Return the names of the csv's columns, with those for the frames of videos or without."""
    header = ["file_name", "image_id", *(("frame", "seconds") if with_frames else ())]
    header += ["category_id", "class", "score", "x1", "y1", "x2", "y2"]
    if "segm" in trained.spec.iou_types:
        header.append("mask_area")
    if "keypoints" in trained.spec.iou_types:
        header += [f"{name}_{axis}" for name in trained.keypoint_names for axis in "xy"]
    return header


def csv_rows(
    file_name: str, image_id: int | str, found: Found, *, with_frames: bool, frame: Frame | None = None
) -> list[list[Any]]:
    """Return a row per object; lengths in pixels from the top left corner of the upright picture."""
    rows: list[list[Any]] = []
    texts = dict(found.trained.label_map.id_texts)
    start: list[Any] = [file_name, image_id]
    if with_frames:
        start += ["", ""] if frame is None else [frame.number, f"{frame.seconds:.6f}"]
    boxes, keypoints, masks = found.boxes, found.keypoints, found.detections.masks
    for n, (category, name, score) in enumerate(zip(found.category_ids.tolist(), found.class_names, found.scores)):
        row = [*start, texts.get(category, category), name]
        row += [f"{score:.6f}", *(f"{v:.2f}" for v in boxes[n])]
        if masks is not None:
            mask = masks[n]
            assert isinstance(mask, MaskBlock)
            row.append(int(mask.pixels.sum()))
        if keypoints is not None:
            row += [f"{v:.2f}" for v in keypoints[n].reshape(-1)]
        rows.append(row)
    return rows
