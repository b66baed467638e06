"""Pictures of the worst and the best images of an evaluation, ground truth and detections side by side."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from annotations.arrays import Annotations
from annotations.record_reader import Record
from coco_eval import CocoEvaluator
from drawing.drawn_objects import caption_names, drawn_detections, drawn_truth
from drawing.pictures import Drawn, contact_sheet, draw_objects, save_picture
from evaluation.analysis import ImageScores
from evaluation.detections import Detections
from evaluation.results_files import read_results_of_images
from loading.split import Split
from pixels.images import BadImageError
from pixels.masks import MaskBlock, block_from_rle

logger = logging.getLogger(__name__)

# Pictures of each sort, the longer side of each in pixels, and how many detections are drawn into one at most.
NUM_PICTURES = 6
LONG_SIDE = 560
MAX_DRAWN = 50


@dataclass(frozen=True)
class Example:
    """One picture in the folder of an evaluation, and what it shows.

    Attributes:
        picture: Name of the picture file.
        sort: "worst" or "best".
        image_id: The image's id in the annotations.
        file_name: The image's file as the annotations name it.
        objects: Number of objects.
        detections: Number of detections that count.
        hits: Objects found.
        f1: At IoU 0.5 and the score threshold.
    """

    picture: str
    sort: str
    image_id: int | str
    file_name: str
    objects: int
    detections: int
    hits: int
    f1: float


def draw_examples(
    folder: Path,
    evaluator: CocoEvaluator,
    images: ImageScores,
    split: Split,
    predictions_dir: Path,
    score_threshold: float,
) -> list[Example]:
    """Write ``worst_N.jpg`` and ``best_N.jpg``: portraits beside each other, others above each other.

    Args:
        folder: Where to.
        evaluator: Holds the ground truth of the evaluated images.
        images: Hits and mistakes of its images.
        split: Where pixels come from.
        predictions_dir: With ``predictions_<kind>.json`` of every kind of score.
        score_threshold: Detections below are not shown.

    Returns:
        What was drawn, worst first, then best first.
    """
    ranked, annotations = images.ranked(), evaluator.annotations
    number = min(NUM_PICTURES, -(-len(ranked) // 2))
    chosen = [("worst", n) for n in ranked[:number].tolist() if images.f1[n] < 1]
    shown = {n for _, n in chosen}
    chosen += [("best", n) for n in ranked[::-1][:number].tolist() if images.f1[n] > 0 and n not in shown]
    ids = [annotations.own_id(int(annotations.image_ids[images.positions[n]])) for _, n in chosen]
    records = {t: read_results_of_images(predictions_dir / f"predictions_{t}.json", ids) for t in evaluator.iou_types}
    examples: list[Example] = []
    numbers = {"worst": 0, "best": 0}
    for (sort, n), image_id in zip(chosen, ids):
        i = int(images.positions[n])
        try:
            pixels = torch.from_numpy(split.images.read(annotations, i).copy()).permute(2, 0, 1)
        except BadImageError as error:
            logger.warning("no picture: %s", error)
            continue
        numbers[sort] += 1
        name = f"{sort}_{numbers[sort]}.jpg"
        example = Example(
            name,
            sort,
            image_id,
            annotations.file_name(i),
            int(images.objects[n]),
            int(images.detections[n]),
            int(images.hits[n]),
            float(images.f1[n]),
        )
        of_image = {kind: records[kind][image_id] for kind in records}
        detections = drawn_results(of_image, annotations, i, score_threshold)
        truth = drawn_truth(
            annotations,
            i,
            caption_names(annotations),
            with_masks="segm" in evaluator.iou_types,
            with_keypoints=annotations.num_keypoints > 0,
        )
        sides = [
            (f"annotated: {example.objects} object(s)", truth),
            (f"detected at {score_threshold:.2f}: {len(detections)}, {example.hits} right", detections),
        ]
        pair = [(text, draw_objects(pixels, side, split.skeleton, shown_at=LONG_SIDE)) for text, side in sides]
        columns = 1 if pixels.shape[-1] >= pixels.shape[-2] else 2
        save_picture(contact_sheet(pair, columns=columns, cell=LONG_SIDE), folder / name)
        examples.append(example)
    return examples


def drawn_results(of_image: dict[str, list[Record]], annotations: Annotations, i: int, score_threshold: float) -> Drawn:
    """Return the detections of image ``i`` at the threshold or above, best first, `MAX_DRAWN` at most.

    Args:
        of_image: Records by kind of score in one order, those of keypoints perhaps fewer.
        annotations: Gives the size of the image, and the number of keypoints.
        i: Position of the image in ``annotations``.
        score_threshold: For the boxes.
    """
    boxes, masks, points = of_image["bbox"], of_image.get("segm"), of_image.get("keypoints")
    chosen = [n for n, record in enumerate(boxes) if record["score"] >= score_threshold]
    chosen = sorted(chosen, key=lambda n: -boxes[n]["score"])[:MAX_DRAWN]
    blocks: list[MaskBlock] | None = None
    if masks is not None:
        height, width = int(annotations.heights[i]), int(annotations.widths[i])
        blocks = [block_from_rle(masks[n]["segmentation"]["counts"].encode(), height, width) for n in chosen]
    keypoints = None
    if points is not None:
        aligned = np.zeros((len(boxes), annotations.num_keypoints, 3))
        rest = iter(points)
        record = next(rest, None)
        for n, box in enumerate(boxes):
            if record is not None and (record["score"], record["category_id"]) == (box["score"], box["category_id"]):
                aligned[n] = np.reshape(record["keypoints"], (-1, 3))
                record = next(rest, None)
        keypoints = aligned[chosen]
    detections = Detections(
        np.array([boxes[n]["category_id"] for n in chosen], dtype=np.int64),
        np.array([boxes[n]["score"] for n in chosen], dtype=np.float64),
        np.array([boxes[n]["bbox"] for n in chosen], dtype=np.float64).reshape(-1, 4),
        blocks,
        keypoints,
    )
    return drawn_detections(detections, caption_names(annotations))
