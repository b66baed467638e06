"""Evaluations with detections near the ground truth."""

import numpy as np

from annotations.object_masks import mask_block
from coco_eval import CocoEvaluator
from evaluation.analysis import build_analysis
from evaluation.bootstrap import metric_intervals
from evaluation.detections import Detections
from evaluation.results_files import PredictionWriter
from pixels.masks import EMPTY_BLOCK
from report.page import publish
from runtime.trackers import append_metrics
from training.evaluate_model import Evaluation

KINDS = {"mask": ["bbox", "segm"], "keypoint": ["bbox", "keypoints"]}


def near_truth(annotations, i, rng, noise):
    """Return detections of image ``i`` that are its objects, moved, some of another class, and things that are none."""
    span = annotations.objects(i)
    classes = np.array([id_ for id_, _ in annotations.categories])
    ids = annotations.category_ids[span].copy()
    ids[rng.random(len(ids)) < 0.15] = classes[0]
    boxes = annotations.boxes_xywh[span] + rng.normal(0, noise, (len(ids), 4))
    boxes[:, 2:] = boxes[:, 2:].clip(2)
    points = annotations.keypoints[span].copy()
    points[:, :, :2] += rng.normal(0, noise, points[:, :, :2].shape)
    masks = [mask_block(annotations, i, n) for n in range(span.start, span.stop)]
    scores = rng.beta(4, 2, len(ids))
    if rng.random() < 0.8:
        ids = np.r_[ids, rng.choice(classes)]
        boxes = np.r_[boxes, [[3.0, 4.0, 15.0, 9.0]]]
        points = np.r_[points, np.full((1, *points.shape[1:]), 5.0)]
        masks = [*masks, mask_block(annotations, i, span.start)] if len(masks) else [EMPTY_BLOCK]
        scores = np.r_[scores, rng.beta(2, 4)]
    return Detections(ids, scores, boxes, masks, points).take(np.argsort(-scores, kind="stable"))


def evaluate_once(data, run_dir, task, *, epoch, noise, seed=0, with_predictions=True, is_best=True):
    """Do what a run does after an epoch, with detections near the ground truth; returns (evaluator, evaluation)."""
    annotations, rng = data.val.annotations, np.random.default_rng(seed)
    evaluator = CocoEvaluator(annotations, KINDS[task], sigmas=data.sigmas)
    sizes = {
        int(id_): (int(h), int(w)) for id_, h, w in zip(annotations.image_ids, annotations.heights, annotations.widths)
    }
    writer = PredictionWriter(run_dir, KINDS[task], sizes, annotations.id_texts)
    for i, image_id in enumerate(sizes):
        detections = near_truth(annotations, i, rng, noise)
        evaluator.add(image_id, detections)
        writer.add([image_id], [detections])
    writer.close()
    result = evaluator.compute()
    evaluation = Evaluation(result, build_analysis(result), metric_intervals(result))
    scores = evaluation.to_plain()
    append_metrics(run_dir, epoch, {"loss": 1.0, "lr": 0.1, "seconds": 1.0}, scores)
    predictions_dir = run_dir if with_predictions else None
    publish(run_dir, evaluator, evaluation, data.val, epoch, predictions_dir, is_best)
    return evaluator, evaluation
