"""One evaluation of a model, from images to figures, report and predictions on disk."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from coco_eval import CocoEvaluator, EvalResult, format_summary
from engine import evaluate, validation_loss
from evaluation.analysis import Report, build_report, format_classes
from evaluation.bootstrap import format_intervals, metric_intervals
from evaluation.results_files import PredictionWriter
from loading.loaders import DeviceLoader
from loading.samples import LabelMap
from runtime.signals import StopRequest
from utils import broadcast_json, rank

logger = logging.getLogger(__name__)

# The table of classes is printed up to so many of them; files have all.
MAX_PRINTED_CLASSES = 30


@dataclass(frozen=True)
class Evaluation:
    """What models are scored on.

    Attributes:
        loader: Of the images, with an `EvalBatchSampler`.
        evaluator: Of the same images.
        label_map: What the model's labels mean.
        loss_loader: Of the same images with targets, for their loss; None leaves the loss out.
    """

    loader: DeviceLoader
    evaluator: CocoEvaluator
    label_map: LabelMap
    loss_loader: DeviceLoader | None = None


@dataclass(frozen=True)
class Scored:
    """What an evaluation gave.

    Attributes:
        result: COCO's figures, on every process.
        report: The rest, on the first process.
        intervals: `bootstrap.metric_intervals`, on every process.
        losses: Of the images, see `validation_loss`, on every process; empty where not wanted.
    """

    result: EvalResult
    report: Report | None
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def score_model(
    model: nn.Module,
    evaluation: Evaluation,
    *,
    stop: StopRequest | None = None,
    predictions_dir: Path | None = None,
) -> Scored | None:
    """Evaluate, print the figures, and write ``predictions_<kind>.json``; all processes must call it.

    Args:
        model: Bare.
        evaluation: On which images.
        stop: Ends the evaluation.
        predictions_dir: Where predictions go, the same on all processes; None writes none.

    Returns:
        The figures; None if a process was asked to stop.
    """
    loader, evaluator, label_map = evaluation.loader, evaluation.evaluator, evaluation.label_map
    writer = None
    if predictions_dir is not None:
        annotations, indices = evaluator.annotations, loader.dataset.indices
        ids = annotations.image_ids[indices].tolist()
        sizes = zip(annotations.heights[indices].tolist(), annotations.widths[indices].tolist())
        writer = PredictionWriter(predictions_dir, evaluator.iou_types, dict(zip(ids, sizes)))
    if writer is None:
        result = evaluate(model, loader, evaluator, label_map, stop=stop)
    else:
        result = evaluate(model, loader, evaluator, label_map, stop=stop, on_batch=writer.add)
        writer.close(keep=result is not None)
    if result is None:
        return None
    logger.info("%s", format_summary(result))
    report = build_report(evaluator, result) if rank() == 0 else None
    if report is not None and 1 < len(report.class_names) <= MAX_PRINTED_CLASSES:
        logger.info("%s", format_classes(result, report))
    intervals = broadcast_json(metric_intervals(evaluator, result) if rank() == 0 else None)
    if text := format_intervals(intervals):
        logger.info("%s", text)
    losses = {}
    if evaluation.loss_loader is not None:
        losses = validation_loss(model, evaluation.loss_loader)
        logger.info("validation  %s", "  ".join(f"{name}: {value:.4f}" for name, value in losses.items()))
    return Scored(result, report, intervals, losses)
