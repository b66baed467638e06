"""Detections as COCO results files: each process streams its shard, the first one joins them."""

import contextlib
import heapq
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch

from annotations.arrays import Annotations
from annotations.findings import BadDataError, Finding, Findings
from annotations.foreign_files import describe_json
from annotations.forms import short
from annotations.meant_ids import explain_file, ids_by_file
from annotations.record_reader import Notes, Record, RecordReader
from annotations.segmentations import check_segmentations, rle_of
from coco_utils import read_json
from evaluation.coco_metrics import SCORE_KINDS
from evaluation.detections import Detections
from files import naming, write_aside
from pixels.masks import MaskBlock, counts_of_block
from utils import all_reduce_max, barrier, describe_error, rank, world_size

logger = logging.getLogger(__name__)

# What others call a detection's score.
_NAMES_OF_SCORES = ("confidence", "conf", "probability", "prob")


def rle_of_block(block: MaskBlock, height: int, width: int) -> dict[str, Any]:
    """Return COCO's compressed run lengths of a mask block, ready for json."""
    return {"size": [height, width], "counts": counts_of_block(block, height, width).decode()}


def results_of(
    image_id: int | str,
    size: tuple[int, int],
    detections: Detections,
    iou_type: str,
    category_texts: Mapping[int, str] = MappingProxyType({}),
) -> list[Record]:
    """Return one image's detections as records of a COCO results file.

    Args:
        image_id: The image's id in its file.
        size: (height, width) of the image.
        detections: What was found in it; detections without keypoints are left out for "keypoints".
        iou_type: "bbox", "segm" or "keypoints".
        category_texts: The ids of categories that are text in their file, by the number that stands for them.
    """
    records: list[Record] = []
    for n in range(len(detections)):
        category = int(detections.category_ids[n])
        record: Record = {"image_id": image_id, "category_id": category_texts.get(category, category)}
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

    Where that fails none is left, not even that of an evaluation before: it would pass for this one's.

    Args:
        folder: Where to; all processes must see the same one.
        iou_types: Kinds to write.
        sizes: (height, width) of every image by id, in the order in which images are to stand in the file.
        id_texts: (number, text) of ids that are text in the dataset: the file gets the text.
    """

    def __init__(
        self,
        folder: Path,
        iou_types: Sequence[str],
        sizes: dict[int, tuple[int, int]],
        id_texts: Sequence[tuple[int, str]] = (),
    ) -> None:
        self.folder, self.sizes, self.id_texts = folder, sizes, dict(id_texts)
        self.order = {image_id: position for position, image_id in enumerate(sizes)}
        self.iou_types, self.shards = iou_types, dict[str, IO[str]]()
        self.has_failed = False
        with self._disk_error_noted():
            folder.mkdir(parents=True, exist_ok=True)
            for iou_type in iou_types:
                self.shards[iou_type] = self._shard(iou_type, rank()).open("w")

    def _path(self, iou_type: str) -> Path:
        return self.folder / f"predictions_{iou_type}.json"

    def _shard(self, iou_type: str, of_rank: int) -> Path:
        return self.folder / f"predictions_{iou_type}.{of_rank}.tmp"

    def add(self, image_ids: Sequence[int], batch: Sequence[Detections]) -> None:
        """Append a batch to this process's shards; a full disk costs the predictions, not the evaluation."""
        with self._disk_error_noted():
            for image_id, detections in zip(image_ids, batch):
                for iou_type, shard in self.shards.items() if not self.has_failed else ():
                    own_id = self.id_texts.get(image_id, image_id)
                    records = results_of(own_id, self.sizes[image_id], detections, iou_type, self.id_texts)
                    shard.write(json.dumps([self.order[image_id], records]) + "\n")

    @contextlib.contextmanager
    def _disk_error_noted(self) -> Iterator[None]:
        try:
            with naming(self.folder):
                yield
        except OSError as error:
            if not self.has_failed:
                logger.error("no predictions are written: %s", describe_error(error))
            self.has_failed = True

    def abandon(self) -> None:
        """Throw this process's shards away, whatever the others do: an error ends the evaluation."""
        for iou_type, shard in self.shards.items():
            with contextlib.suppress(OSError):
                shard.close()
            self._shard(iou_type, rank()).unlink(missing_ok=True)

    def close(self, keep: bool = True) -> None:
        """Join all shards on the first process, or throw them away; all processes must call it."""
        for shard in self.shards.values():
            with self._disk_error_noted():
                shard.close()
        has_failed = bool(all_reduce_max(torch.tensor([float(self.has_failed)])))
        if rank() == 0 and keep:
            with self._disk_error_noted():
                has_failed = has_failed or not all(self._join(iou_type) for iou_type in self.iou_types)
            for iou_type in self.iou_types if has_failed or self.has_failed else ():
                with self._disk_error_noted():
                    self._path(iou_type).unlink(missing_ok=True)
        barrier()
        for iou_type in self.shards:
            self._shard(iou_type, rank()).unlink(missing_ok=True)
        barrier()

    def _join(self, iou_type: str) -> bool:
        """Write the file; returns whether all shards are there."""
        paths = [self._shard(iou_type, r) for r in range(world_size())]
        missing = [path for path in paths if not path.exists()]
        if missing:
            logger.error("no predictions written: %s is missing; do all machines share the folder?", missing[0])
            return False
        with write_aside(self._path(iou_type)) as temporary, temporary.open("w") as file:
            separator = "["
            for _, records in heapq.merge(*map(_read_lines, paths), key=lambda line: line[0]):
                for record in records:
                    file.write(separator + json.dumps(record))
                    separator = ",\n"
            file.write("]\n" if separator != "[" else "[]\n")
        return True


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def read_results_of_images(path: Path, image_ids: Collection[int | str]) -> dict[int | str, list[Record]]:
    """Return the records of some images from a file that `PredictionWriter` wrote, one per line, parsing only those."""
    found: dict[int | str, list[Record]] = {image_id: [] for image_id in image_ids}
    starts = tuple(f'{{"image_id": {json.dumps(image_id)},' for image_id in found)
    with path.open() as file:
        for line in file:
            text = line.lstrip("[")
            if text.startswith(starts):
                record = json.loads(text.rstrip(",]\n"))
                found[record["image_id"]].append(record)
    return found


def read_results(path: Path, iou_types: Collection[str] | None = None) -> tuple[list[Record], dict[int, str]]:
    """Read a COCO results file and check its entries as far as that needs no ground truth.

    Ids of text become the numbers that stand for them (`number_of_id`); what is taken although it is in another form,
    or left out because it is not scored, is warned of.

    Args:
        path: The file.
        iou_types: What is scored, "bbox", "segm" or "keypoints": other parts may be broken; None for all.

    Returns:
        (the results, {number: text} of ids that are text).

    Raises:
        BadDataError: What is wrong, all findings at once.
    """
    content = read_json(path)
    findings, notes = Findings(), Notes()
    content = _unwrapped(content, str(path))
    if not isinstance(content, list):
        what, remedy = describe_json(content) or (short(content), "is this a COCO results file?")
        raise BadDataError([Finding("results", str(path), f"expected a list of results, got {what}", remedy)])
    for n, record in enumerate(content):
        if not isinstance(record, dict):
            problem = f"expected an object {{...}}, got {short(record)}"
            findings.error("results", f"{path}: [{n}]", problem, "fix or remove it")
    findings.raise_errors()
    if content and not any("score" in record for record in content):
        what = f"{len(content)} entries without a score, the first with {', '.join(map(short, content[0]))}"
        what, remedy = describe_json(content) or (what, "give the file that a detector wrote, with 'score'")
        if named := [key for key in _NAMES_OF_SCORES if key in content[0]]:
            remedy = f"call {named[0]!r} 'score' if it says how sure the detector is"
        raise BadDataError([Finding("results", str(path), f"expected a list of results, got {what}", remedy)])
    uses = SCORE_KINDS if iou_types is None else iou_types
    reader = RecordReader("result", content, lambda n: f"{path}: [{n}]", findings, notes, tuple(uses))
    columns: dict[str, Sequence[Any] | np.ndarray] = {name: reader.ids(name) for name in ("image_id", "category_id")}
    columns["score"] = reader.column("score")
    for kind in SCORE_KINDS.values():
        columns[kind.field] = (
            reader.column(kind.field) if any(kind.field in r for r in content) else [None] * len(content)
        )
    _log(findings, notes)
    names = list(columns)
    rows = zip(*(column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()))
    # Many tools write empty lists for what their detector does not find.
    records = [{name: value for name, value in zip(names, row) if value is not None and value != []} for row in rows]
    return records, notes.id_texts


def _unwrapped(content: Any, name: str) -> Any:
    """Return the list of results that a file holds under one key, with a warning; anything else as it is."""
    lists = (
        {key: value for key, value in content.items() if isinstance(value, list)} if isinstance(content, dict) else {}
    )
    scored = [
        key
        for key, value in lists.items()
        if value and isinstance(value[0], dict) and {"image_id", "score"} <= set(value[0])
    ]
    if len(scored) != 1:
        return content
    logger.warning("%s: the results stand under %r, expected a list of them alone; they are taken", name, scored[0])
    return content[scored[0]]


def of_known_images(
    records: list[Record], annotations: Annotations, name: str, id_texts: Mapping[int, str]
) -> list[Record]:
    """Return the results of images that the ground truth has; refuse others.

    Those of images that were left out while the ground truth was read are left out too, with a warning.

    Args:
        records: From `read_results`.
        annotations: The ground truth.
        name: The results file, for messages.
        id_texts: {number: text} of ids that are text in the results.

    Raises:
        ValueError: Ids of images that the ground truth does not have, and what they seem to be.
    """
    known, dropped = set(annotations.image_ids.tolist()), set(annotations.dropped_image_ids)
    unknown = sorted({record["image_id"] for record in records} - known - dropped)
    if unknown:
        texts = [str(id_texts.get(id_, id_)) for id_ in unknown]
        own_ids = map(annotations.own_id, annotations.image_ids.tolist())
        files = ids_by_file((annotations.file_name(i), own_id) for i, own_id in enumerate(own_ids))
        remedy = "give the ids of the ground truth (predict.py --ids-from takes them from it)"
        if meant := next(filter(None, (explain_file(text, files) for text in texts)), None):
            remedy = f"{meant}; give the ids of the ground truth"
        raise ValueError(
            f"{name}: {len(unknown)} image id(s) are not in the ground truth: {', '.join(texts[:10])}; {remedy}"
        )
    kept = [record for record in records if record["image_id"] in known]
    if len(kept) < len(records):
        images = len({record["image_id"] for record in records} - known)
        text = "%s: %d result(s) do not count: their %d image(s) are left out of the ground truth (--on-bad-data skip)"
        logger.warning(text, name, len(records) - len(kept), images)
    return kept


def check_keypoints_of_results(records: Sequence[Record], annotations: Annotations, name: str) -> None:
    """Refuse results with another number of keypoints than the ground truth has.

    Raises:
        ValueError: The first of them.
    """
    for n, record in enumerate(records):
        if len(record.get("keypoints", ())) not in (0, 3 * annotations.num_keypoints):
            found = f"{len(record['keypoints'])} numbers under 'keypoints'"
            raise ValueError(
                f"{name}: [{n}]: {found}, the ground truth has 3 x {annotations.num_keypoints}; give x, y, v for every "
                "point"
            )


def encode_masks(records: Sequence[Record], annotations: Annotations, name: str) -> None:
    """Turn the masks of results into compressed run lengths, in place; polygons fill pixels as in the ground truth.

    Args:
        records: From `read_results`; the images of all are in the ground truth.
        annotations: The ground truth, which has the pictures' sizes.
        name: The results file, for messages.

    Raises:
        BadDataError: Masks of another size, or invalid run lengths, all at once.
    """
    chosen = [n for n, record in enumerate(records) if "segmentation" in record]
    images = np.array([annotations.position_of[records[n]["image_id"]] for n in chosen], dtype=np.int64)
    findings, notes = Findings(), Notes()
    reader = RecordReader(
        "result", [records[n] for n in chosen], lambda k: f"{name}: [{chosen[k]}]", findings, notes, ("segm",)
    )
    shapes = check_segmentations(reader, images, annotations.heights, annotations.widths)
    _log(findings, notes)
    for n, i, polygons, counts in zip(chosen, images.tolist(), shapes.polygons, shapes.rles):
        size = int(annotations.heights[i]), int(annotations.widths[i])
        records[n]["segmentation"] = rle_of(polygons, counts, *size)


def _log(findings: Findings, notes: Notes) -> None:
    """Warn of what was noted; raise what is wrong."""
    notes.flush(findings)
    findings.raise_errors()
    for finding in findings.warnings():
        logger.warning("%s", finding)


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
