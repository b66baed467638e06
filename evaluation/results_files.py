"""Detections as COCO results files: each process streams its shard, the first one joins them."""

import heapq
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from annotations.findings import BadDataError, Findings
from annotations.record_checks import Record
from coco_utils import read_json
from evaluation.coco_metrics import SCORE_KINDS
from evaluation.detections import Detections
from files import write_aside
from pixels.masks import MaskBlock, counts_of_block
from utils import barrier, rank, world_size

logger = logging.getLogger(__name__)


def rle_of_block(block: MaskBlock, height: int, width: int) -> dict[str, Any]:
    """Return COCO's compressed run lengths of a mask block, ready for json."""
    return {"size": [height, width], "counts": counts_of_block(block, height, width).decode()}


def results_of(image_id: int, size: tuple[int, int], detections: Detections, iou_type: str) -> list[Record]:
    """Return one image's detections as records of a COCO results file.

    Args:
        image_id: Of the image.
        size: (height, width) of the image.
        detections: Of the image; those without keypoints are left out for "keypoints".
        iou_type: "bbox", "segm" or "keypoints".
    """
    records: list[Record] = []
    for n in range(len(detections)):
        record: Record = {"image_id": image_id, "category_id": int(detections.category_ids[n])}
        if iou_type == "bbox":
            assert detections.boxes_xywh is not None
            record["bbox"] = detections.boxes_xywh[n].tolist()
        elif iou_type == "segm":
            assert detections.masks is not None
            mask = detections.masks[n]
            record["segmentation"] = rle_of_block(mask, *size) if isinstance(mask, MaskBlock) else mask
        else:
            assert detections.keypoints is not None
            if not np.isfinite(detections.keypoints[n]).all():
                continue
            record["keypoints"] = detections.keypoints[n].reshape(-1).tolist()
        records.append({**record, "score": float(detections.scores[n])})
    return records


class PredictionWriter:
    """Writes ``predictions_<kind>.json`` for each kind of score, the same file at any number of processes.

    Args:
        folder: Where to; all processes must see the same one.
        iou_types: Kinds to write.
        sizes: (height, width) of every image by id, in the order in which images are to stand in the file.
    """

    def __init__(self, folder: Path, iou_types: Sequence[str], sizes: dict[int, tuple[int, int]]) -> None:
        self.folder, self.sizes = folder, sizes
        self.order = {image_id: position for position, image_id in enumerate(sizes)}
        folder.mkdir(parents=True, exist_ok=True)
        self.shards = {t: self._shard(t, rank()).open("w") for t in iou_types}

    def _shard(self, iou_type: str, of_rank: int) -> Path:
        return self.folder / f"predictions_{iou_type}.{of_rank}.tmp"

    def add(self, image_ids: Sequence[int], batch: Sequence[Detections]) -> None:
        """Append a batch to this process's shards."""
        for image_id, detections in zip(image_ids, batch):
            for iou_type, shard in self.shards.items():
                records = results_of(image_id, self.sizes[image_id], detections, iou_type)
                shard.write(json.dumps([self.order[image_id], records]) + "\n")

    def close(self, keep: bool = True) -> None:
        """Join all shards on the first process, or throw them away; all processes must call it."""
        for iou_type, shard in self.shards.items():
            shard.close()
            if not keep:
                self._shard(iou_type, rank()).unlink()
        barrier()
        if rank() == 0 and keep:
            for iou_type in self.shards:
                self._join(iou_type)
        barrier()

    def _join(self, iou_type: str) -> None:
        paths = [self._shard(iou_type, r) for r in range(world_size())]
        missing = [path for path in paths if not path.exists()]
        if missing:
            logger.error("no predictions written: %s is missing; do all machines share the folder?", missing[0])
            return
        with write_aside(self.folder / f"predictions_{iou_type}.json") as temporary, temporary.open("w") as file:
            separator = "["
            for _, records in heapq.merge(*map(_read_lines, paths), key=lambda line: line[0]):
                for record in records:
                    file.write(separator + json.dumps(record))
                    separator = ",\n"
            file.write("]\n" if separator != "[" else "[]\n")
        for path in paths:
            path.unlink()


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def read_results_of_images(path: Path, image_ids: Collection[int]) -> dict[int, list[Record]]:
    """Return the records of some images from a file that `PredictionWriter` wrote, one per line, parsing only those."""
    found: dict[int, list[Record]] = {image_id: [] for image_id in image_ids}
    starts = tuple(f'{{"image_id": {image_id},' for image_id in found)
    with path.open() as file:
        for line in file:
            text = line.lstrip("[")
            if text.startswith(starts):
                record = json.loads(text.rstrip(",]\n"))
                found[record["image_id"]].append(record)
    return found


def read_results(path: Path) -> list[Record]:
    """Read a COCO results file and check its entries as far as that needs no ground truth.

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    content = read_json(path)
    findings = Findings()
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        findings.error("results", str(path), "expected a list of results", "is this a COCO results file?")
        raise BadDataError(findings.found)
    for n, record in enumerate(content):
        score = record.get("score")
        for name in ("image_id", "category_id"):
            if not isinstance(record.get(name), int):
                findings.error("results", f"{path}: [{n}]", f"{name} is {record.get(name)!r}", "give an integer")
        if not isinstance(score, (int, float)) or not np.isfinite(score):
            findings.error("results", f"{path}: [{n}]", f"score is {score!r}", "give a finite number")
        for name, length in (("bbox", 4), ("keypoints", None)):
            values = record.get(name)
            if values is not None and not _are_finite(values, length):
                findings.error("results", f"{path}: [{n}]", f"{name} is {str(values)[:60]}", "give finite numbers")
        mask = record.get("segmentation")
        if mask is not None and not (isinstance(mask, dict) and {"size", "counts"} <= set(mask)):
            remedy = "give run lengths, {size, counts}, as pycocotools writes them"
            findings.error("results", f"{path}: [{n}]", f"segmentation is {str(mask)[:60]}", remedy)
    findings.raise_errors()
    return content


def _are_finite(values: Any, length: int | None) -> bool:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        return False
    return all(isinstance(v, (int, float)) for v in values) and bool(np.isfinite(np.array(values, float)).all())


def detections_of_results(records: Sequence[Record], iou_type: str) -> Detections:
    """Return results of one image as detections, in their order."""
    detections = Detections(
        np.array([record["category_id"] for record in records], dtype=np.int64),
        np.array([record["score"] for record in records], dtype=np.float64),
    )
    values = [record[SCORE_KINDS[iou_type].field] for record in records]
    if iou_type == "bbox":
        detections.boxes_xywh = np.array(values, dtype=np.float64).reshape(-1, 4)
    elif iou_type == "segm":
        detections.masks = values
    else:
        points = np.array(values, dtype=np.float64)
        detections.keypoints = points.reshape(len(records), -1, 3) if len(records) else np.zeros((0, 1, 3))
    return detections
