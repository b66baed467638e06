"""The masks of annotations and results in one of two forms: polygons, or COCO's compressed run lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from annotations.fields import FIELDS
from annotations.forms import COUNT, SEGMENTATION, SIDE, short
from annotations.normalised import MIN_SIDE
from annotations.record_reader import Record, RecordReader
from pixels.image_files import is_nearly_all
from pixels.masks import block_from_rle, check_run_lengths, compress_rle, rle_from_polygons


@dataclass
class Segmentations:
    """Polygons and compressed run lengths of every object, one of the two empty."""

    polygons: list[list[list[float]]]
    rles: list[bytes]


def check_segmentations(
    reader: RecordReader,
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> Segmentations:
    """Sort segmentations into polygons and run lengths; polygons of less than three points are dropped.

    An object without a segmentation is an error where masks are used.

    Args:
        reader: Reads the objects or results.
        image_of_object: int64 [N], position of each one's image.
        heights: int [I], of the images.
        widths: int [I].
    """
    findings, field = reader.findings, FIELDS[reader.record, "segmentation"]
    column = reader.column("segmentation")
    shapes = Segmentations([[] for _ in column], [b""] * len(column))
    texts: list[int] = []  # objects with a compressed string, which are checked together
    for n, segmentation in enumerate(column):
        i = int(image_of_object[n])
        if isinstance(segmentation, list):
            shapes.polygons[n] = segmentation
        elif isinstance(segmentation, dict) and n not in reader.dropped and i not in findings.dropped_images:
            try:
                shapes.rles[n], how = _read_rle(segmentation, int(heights[i]), int(widths[i]))
            except ValueError as error:
                reader.wrong(field, n, str(error))
                continue
            if how:
                reader.note(field, n, segmentation, how)
            if isinstance(segmentation["counts"], str):
                texts.append(n)
    of_image = image_of_object[texts]
    num_pixels = heights[of_image].astype(np.int64) * widths[of_image]
    for n, problem in zip(texts, check_run_lengths([shapes.rles[n] for n in texts], num_pixels)):
        if problem:
            shapes.rles[n] = b""
            reader.wrong(field, n, problem)
    given = [bool(value) for value in column]
    _drop_short_polygons(reader, shapes.polygons)
    _report_normalised(reader, shapes.polygons, image_of_object, heights, widths)
    if "segm" in reader.uses:
        _report_maskless(reader, [n for n in range(len(column)) if not (shapes.polygons[n] or shapes.rles[n])], given)
    return shapes


def _report_maskless(reader: RecordReader, maskless: Sequence[int], given: Sequence[bool]) -> None:
    """Report objects without a mask, all of them at once where nearly none has one; remark results without.

    Args:
        reader: Reads the objects or results.
        maskless: Their positions.
        given: Whether each object or result has something as its segmentation.
    """
    if reader.record != "object":
        for n in maskless:
            reader.notes.add(("empty",), "empty mask", reader.place(n), "a mask without a pixel", "it finds nothing")
        return
    field = FIELDS["object", "segmentation"]
    remedy = "add polygons, or learn boxes only (such as --model fasterrcnn_resnet50_fpn)"
    absent = [n for n in maskless if not given[n] and n not in reader.dropped]
    if is_nearly_all(len(absent), len(given)):
        problem = f"{len(absent)} of {len(given)} objects have no segmentation, but masks are used"
        reader.findings.error("segmentation", reader.place(absent[0]), problem, remedy, objects=absent)
        absent = []
    for n in absent:
        reader.wrong(field, n, "no segmentation, but masks are used", remedy=remedy)
    for n in maskless:
        if given[n]:
            problem = f"segmentation is {short(reader.rows[n].get('segmentation'))}, which has no inside"
            reader.wrong(field, n, problem, remedy="give polygons of three points or more")


def box_of_segmentation(segmentation: Any, height: int, width: int) -> list[float] | None:
    """Return x, y, width, height of the box around a mask as a file writes it; None where there is none to read."""
    try:
        value, _ = SEGMENTATION.read(segmentation)
        if isinstance(value, dict):
            counts, _ = _read_rle(value, height, width)
            if any(check_run_lengths([counts], np.array([height * width]))):
                return None
            block = block_from_rle(counts, height, width)
            rows, columns = block.pixels.shape
            box = [float(v) for v in (block.left, block.top, columns, rows)]
        else:
            points = np.array([v for polygon in value if len(polygon) >= 6 for v in polygon]).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            box = [*low.tolist(), *(high - low).tolist()]
    except ValueError:
        return None
    return box if box[2] > 0 and box[3] > 0 else None


def _report_normalised(
    reader: RecordReader,
    polygons: list[list[list[float]]],
    image_of_object: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> None:
    """Report outlines within one pixel, which are shares of the picture, and leave them out."""
    for n, rows in enumerate(polygons):
        # Most begin farther out: only few are looked at whole.
        if rows and rows[0][0] <= 1 and rows[0][1] <= 1 and all(0 <= v <= 1 for row in rows for v in row):
            i = int(image_of_object[n])
            if min(heights[i], widths[i]) >= MIN_SIDE:
                problem = f"the polygon {short(rows[0])} looks normalised to the picture's size (0 to 1)"
                remedy = "expected pixels: multiply x by the picture's width, y by its height"
                reader.wrong(FIELDS[reader.record, "segmentation"], n, problem, remedy=remedy)
                polygons[n] = []


def _drop_short_polygons(reader: RecordReader, polygons: list[list[list[float]]]) -> None:
    for n, rows in enumerate(polygons):
        if any(len(row) < 6 for row in rows):
            for row in rows:
                if len(row) < 6:
                    problem = f"a polygon of {len(row) // 2} point(s)"
                    reader.findings.warn(
                        "short polygon", reader.place(n), problem, "it is left out; an area needs three"
                    )
            polygons[n] = [row for row in rows if len(row) >= 6]


def _read_rle(segmentation: Record, height: int, width: int) -> tuple[bytes, str]:
    """Return (compressed run lengths, the other form that they were in or ""); a string is not looked into.

    Raises:
        ValueError: What is wrong, with what was expected.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    how = ""
    try:
        sides = [SIDE.read(side) for side in (size if isinstance(size, list) else ())]
    except ValueError:
        sides = []
    if [side for side, _ in sides] != [height, width]:
        swapped = ", which are width and height" if size == [width, height] else ""
        raise ValueError(f"the mask has size {short(size)}{swapped}, the image {[height, width]} (height, width)")
    how = next((strange for _, strange in sides if strange), "")
    if isinstance(counts, list):
        try:
            read = [COUNT.read(count) for count in counts]
        except ValueError:
            read = [(-1, "")]
        lengths = [count for count, _ in read]
        if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
            raise ValueError(f"the run lengths do not add up to the picture's {height} x {width} pixels")
        how = next((strange for _, strange in read if strange), how)
        return compress_rle({"size": [height, width], "counts": lengths}, height, width), how
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        raise ValueError(
            f"counts is {short(counts)}, the text of Python's bytes; write counts.decode(), not str(counts)"
        )
    if not isinstance(counts, str) or not counts or not counts.isascii():
        raise ValueError(f"counts is {short(counts)}, expected run lengths or COCO's compressed string")
    return counts.encode(), how


def rle_of(polygons: list[list[float]], counts: bytes, height: int, width: int) -> dict[str, Any]:
    """Return a mask as COCO's run lengths, as ``annToRLE`` of pycocotools."""
    if counts:
        return {"size": [height, width], "counts": counts}
    return rle_from_polygons([np.array(points) for points in polygons], height, width)
