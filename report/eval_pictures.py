"""The worst and the best images of an evaluation, ground truth and detections: as picture files and for the page."""

import logging
from pathlib import Path

import numpy as np
import torch

from annotations.arrays import Annotations
from annotations.record_reader import Record
from annotations.skeleton import Skeleton
from coco_eval import CocoEvaluator
from drawing.drawn_objects import caption_names, drawn_detections, drawn_truth
from drawing.pictures import Drawn, contact_sheet, draw_objects, save_picture
from evaluation.analysis import ImageScores
from evaluation.detections import Detections
from evaluation.results_files import read_results_of_images
from loading.split import Split
from pixels.images import BadImageError
from pixels.masks import MaskBlock, block_from_rle
from report.eval_viewer import LOWEST_SCORE, MAX_SHOWN, Example, viewer_example, write_viewer

logger = logging.getLogger(__name__)

# Pictures of each sort, the longer side of each file's in pixels, and how many detections are drawn into one at most.
NUM_PICTURES = 6
LONG_SIDE = 560
MAX_DRAWN = 50


def draw_examples(
    folder: Path,
    evaluator: CocoEvaluator,
    images: ImageScores,
    split: Split,
    predictions_dir: Path,
    score_threshold: float,
) -> list[Example]:
    """Write ``worst_N.jpg``, ``best_N.jpg``, and what the page shows of the same images.

    Args:
        folder: Where to.
        evaluator: Holds the ground truth of the evaluated images.
        images: Hits and mistakes of its images.
        split: Where pixels come from.
        predictions_dir: With ``predictions_<kind>.json`` of every kind of score.
        score_threshold: Detections below are not drawn; the page starts with it.

    Returns:
        What was drawn, worst first, then best first.
    """
    annotations, chosen = evaluator.annotations, _choose_images(images)
    ids = [annotations.own_id(int(annotations.image_ids[images.positions[n]])) for _, n in chosen]
    records = {t: read_results_of_images(predictions_dir / f"predictions_{t}.json", ids) for t in evaluator.iou_types}
    examples: list[Example] = []
    pictures: list[str] = []
    numbers = {"worst": 0, "best": 0}
    for (sort, n), image_id in zip(chosen, ids):
        i = int(images.positions[n])
        try:
            pixels = split.images.read(annotations, i)
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
        detections = detections_of(of_image, annotations, i, min(LOWEST_SCORE, score_threshold))
        truth = drawn_truth(
            annotations,
            i,
            caption_names(annotations),
            with_masks="segm" in evaluator.iou_types,
            with_keypoints=annotations.num_keypoints > 0,
        )
        found = drawn_detections(detections, caption_names(annotations))
        pictures.append(viewer_example(example, pixels, truth, found, detections.scores))
        counting = detections.take(np.flatnonzero(detections.scores >= score_threshold)[:MAX_DRAWN])
        sides = [
            (f"annotated: {example.objects} object(s)", truth),
            (
                f"detected at {score_threshold:.2f}: {len(counting)}, {example.hits} right",
                drawn_detections(counting, caption_names(annotations)),
            ),
        ]
        _draw_sheet(folder / name, pixels, sides, split.skeleton)
        examples.append(example)
    write_viewer(folder, annotations, split.skeleton, score_threshold, pictures)
    return examples


def _choose_images(images: ImageScores) -> list[tuple[str, int]]:
    """Return ("worst" or "best", position in ``images``) of what is drawn, an image once."""
    ranked = images.ranked()
    number = min(NUM_PICTURES, -(-len(ranked) // 2))
    worst = [n for n in ranked[:number].tolist() if images.f1[n] < 1]
    best = [n for n in ranked[::-1][:number].tolist() if images.f1[n] > 0 and n not in worst]
    return [*(("worst", n) for n in worst), *(("best", n) for n in best)]


def _draw_sheet(path: Path, pixels: np.ndarray, sides: list[tuple[str, Drawn]], skeleton: Skeleton) -> None:
    """Draw one image twice, as annotated and as detected: portraits beside each other, others above each other."""
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    pair = [(text, draw_objects(picture, side, skeleton, shown_at=LONG_SIDE)) for text, side in sides]
    columns = 1 if pixels.shape[1] >= pixels.shape[0] else 2
    save_picture(contact_sheet(pair, columns=columns, cell=LONG_SIDE), path)


def detections_of(
    of_image: dict[str, list[Record]], annotations: Annotations, i: int, lowest_score: float
) -> Detections:
    """Return the detections of image ``i`` of at least that score, best first, `MAX_SHOWN` at most.

    Args:
        of_image: Records by kind of score in one order, those of keypoints perhaps fewer; with the file's own ids.
        annotations: Gives the size of the image, and the number of keypoints.
        i: Position of the image in ``annotations``.
        lowest_score: For the boxes.
    """
    boxes, masks, points = of_image["bbox"], of_image.get("segm"), of_image.get("keypoints")
    number_of = {annotations.own_id(id_): id_ for id_, _ in annotations.categories}
    chosen = [n for n, record in enumerate(boxes) if record["score"] >= lowest_score]
    chosen = sorted(chosen, key=lambda n: -boxes[n]["score"])[:MAX_SHOWN]
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
    return Detections(
        np.array([number_of[boxes[n]["category_id"]] for n in chosen], dtype=np.int64),
        np.array([boxes[n]["score"] for n in chosen], dtype=np.float64),
        np.array([boxes[n]["bbox"] for n in chosen], dtype=np.float64).reshape(-1, 4),
        blocks,
        keypoints,
    )
