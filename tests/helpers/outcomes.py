"""Evaluations whose matches are at hand."""

import copy

import numpy as np

from coco_eval import CocoEvaluator
from evaluation.coco_matching import Matches
from evaluation.eval_result import SavedMatches
from helpers.coco_cases import to_annotations, to_detections


def evaluate(truth, results, iou_type, indices=None):
    annotations = to_annotations(copy.deepcopy(truth))
    evaluator = CocoEvaluator(annotations, [iou_type], indices=indices)
    for i in evaluator.indices.tolist():
        image_id = int(annotations.image_ids[i])
        evaluator.add(image_id, to_detections(results, image_id, iou_type))
    return evaluator, evaluator.compute()


def drawn_outcomes(rng, num_images=60, num_classes=6, quality=1.0):
    """Return outcomes of a detector that finds objects with noisy scores, and things that are none."""
    columns, truths = [], []
    for image in range(num_images):
        difficulty = rng.normal()
        for category in range(num_classes):
            for _ in range(rng.poisson(0.7)):
                truths.append((image, category))
                reached = int(np.clip(rng.normal(5 + difficulty, 3), 0, 10))
                columns.append((image, category, rng.normal(quality), (1 << reached) - 1))
            columns += [(image, category, rng.normal(), 0) for _ in range(rng.poisson(1.5))]
    images, categories, scores, bits = (np.array(column) for column in zip(*columns))
    zeros = np.zeros(len(images), np.int16)
    bits = bits.astype(np.uint64)
    matches = Matches(images.astype(np.int32), categories.astype(np.int16), zeros, zeros, scores, bits, 0 * bits)
    truth_images, truth_categories = (np.array(column) for column in zip(*truths))
    return SavedMatches(
        matches.sorted(),
        truth_images.astype(np.int32),
        truth_categories.astype(np.int16),
        np.arange(num_images),
        tuple("abcdef"[:num_classes]),
        np.linspace(0.5, 0.95, 10),
        np.linspace(0, 1, 101),
        "",
        {},
    )
