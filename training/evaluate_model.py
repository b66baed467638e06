"""One evaluation of a model, from images to figures, report and predictions on disk."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from annotations.labels import LabelMap
from coco_eval import CocoEvaluator, format_summary
from engine import evaluate, validation_loss
from evaluation.analysis import Analysis, build_analysis, format_classes
from evaluation.bootstrap import format_intervals, metric_intervals
from evaluation.eval_result import EvalResult
from evaluation.results_files import PredictionWriter
from inference.tiles import Tiling
from loading.loaders import DeviceLoader
from runtime.signals import StopRequest
from utils import broadcast_json, rank, versions

logger = logging.getLogger(__name__)

# The table of classes is printed up to so many of them; files have all.
MAX_PRINTED_CLASSES = 30


@dataclass(frozen=True)
class EvalSetup:
    """What models are scored on.

    Attributes:
        loader: Yields the images in the batches of an `EvalBatchSampler`.
        evaluator: Holds the ground truth of the same images.
        label_map: What the model's labels mean.
        loss_loader: Yields the same images with their objects, for the validation loss; None leaves it out.
        tiling: How large images are cut into tiles; None looks at every image as a whole.
    """

    loader: DeviceLoader
    evaluator: CocoEvaluator
    label_map: LabelMap
    loss_loader: DeviceLoader | None = None
    tiling: Tiling | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a model: COCO's figures, and what is worked out beside them.

    Attributes:
        result: COCO's figures, and on the first process the matches behind them.
        analysis: Best F1, confusions and the like, on the first process; None on the others.
        intervals: 95 % intervals by kind of score and figure, see `metric_intervals`, on every process.
        losses: ``loss`` and each of its terms from `validation_loss`, on every process; empty where not wanted.
    """

    result: EvalResult
    analysis: Analysis | None
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return the evaluation as plain values: every figure by name, and beside them what they depend on."""
        result = self.result
        plain: dict[str, Any] = {**result.metrics, "per_class": result.per_class, "intervals": self.intervals}
        plain |= {"keypoint_errors": result.keypoint_errors, "settings": {**result.settings, **versions()}}
        if self.losses:
            # What reads json strictly takes no NaN.
            plain["val_loss"] = {name: x if math.isfinite(x) else None for name, x in self.losses.items()}
        return plain | (self.analysis.to_plain() if self.analysis is not None else {})


def evaluate_model(
    model: nn.Module,
    setup: EvalSetup,
    *,
    stop: StopRequest | None = None,
    predictions_dir: Path | None = None,
) -> Evaluation | None:
    """Evaluate, print the figures, and write ``predictions_<kind>.json``; all processes must call it.

    Args:
        model: Bare.
        setup: On which images.
        stop: Ends the evaluation.
        predictions_dir: Where predictions go, the same on all processes; None writes none.

    Returns:
        The evaluation; None if a process was asked to stop.
    """
    loader, evaluator, label_map = setup.loader, setup.evaluator, setup.label_map
    writer = None
    if predictions_dir is not None:
        annotations, indices = evaluator.annotations, loader.dataset.indices
        ids = annotations.image_ids[indices].tolist()
        sizes = zip(annotations.heights[indices].tolist(), annotations.widths[indices].tolist())
        writer = PredictionWriter(predictions_dir, evaluator.iou_types, dict(zip(ids, sizes)), annotations.id_texts)
    if writer is None:
        result = evaluate(model, loader, evaluator, label_map, tiling=setup.tiling, stop=stop)
    else:
        try:
            result = evaluate(model, loader, evaluator, label_map, tiling=setup.tiling, stop=stop, on_batch=writer.add)
        except BaseException:
            writer.abandon()
            raise
        writer.close(keep=result is not None)
    if result is None:
        return None
    if setup.tiling is not None:
        result.settings |= setup.tiling.to_plain()
    logger.info("%s", format_summary(result))
    analysis = build_analysis(result) if rank() == 0 else None
    if analysis is not None and 1 < len(analysis.class_names) <= MAX_PRINTED_CLASSES:
        logger.info("%s", format_classes(result, analysis))
    intervals = broadcast_json(metric_intervals(result) if rank() == 0 else None)
    if text := format_intervals(intervals):
        logger.info("%s", text)
    losses = {}
    if setup.loss_loader is not None:
        losses = validation_loss(model, setup.loss_loader)
        logger.info("validation  %s", "  ".join(f"{name}: {value:.4f}" for name, value in losses.items()))
    return Evaluation(result, analysis, intervals, losses)
