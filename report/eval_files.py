"""The files of one evaluation: tables as csv, plots and pictures, and the matches that runs are compared by.

Everything comes from what the evaluator has already; nothing is evaluated twice. A folder is written aside and then
renamed, so that its files always belong to one evaluation.
"""

import csv
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coco_eval import CocoEvaluator
from evaluation.analysis import Analysis, ImageScores, score_images
from evaluation.coco_metrics import SCORE_KINDS
from loading.split import Split
from report import plots
from report.eval_pictures import Example, draw_examples
from runtime.run_folder import BEST_EVAL, NEWEST_EVAL, SUMMARY, is_installed
from training.evaluate_model import Evaluation

logger = logging.getLogger(__name__)

CLASS_COLUMNS = ("AP", "AP50", "AP75", "AR", "AP_small", "AP_medium", "AP_large")
F1_COLUMNS = {"best_f1": "f1", "precision": "precision", "recall": "recall", "score_threshold": "score"}


def write_evaluation(
    run_dir: Path,
    evaluator: CocoEvaluator,
    evaluation: Evaluation,
    split: Split,
    *,
    epoch: int | None,
    predictions_dir: Path | None = None,
) -> None:
    """Write the folder ``eval`` of the newest evaluation; on the first process.

    Args:
        run_dir: The run's folder.
        evaluator: That gave the figures.
        evaluation: With its analysis.
        split: The evaluated images.
        epoch: Epoch of the evaluated model, from 0; None outside training.
        predictions_dir: With ``predictions_<kind>.json`` of this evaluation, for the pictures; None leaves them out.
    """
    result, analysis = evaluation.result, evaluation.analysis
    assert analysis is not None
    with _folder_aside(run_dir / NEWEST_EVAL) as folder:
        images = score_images(result, analysis.score_threshold)
        _write_tables(folder, evaluation, analysis)
        _write_images(folder / "images.csv", evaluator, images)
        for kind, saved in result.saved.items():
            saved.save(folder / f"matches_{kind}.npz")
        if is_installed("matplotlib"):
            _write_plots(folder, analysis)
        examples: list[Example] = []
        if predictions_dir is not None:
            examples = draw_examples(folder, evaluator, images, split, predictions_dir, analysis.score_threshold)
        summary = {"epoch": epoch, **evaluation.to_plain()}
        summary["objects"] = {
            kind: dict(zip(analysis.class_names, counts[:, 0].tolist())) for kind, counts in result.num_truths.items()
        }
        summary["examples"] = [vars(example) for example in examples]
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1))


def main_figure(scores: dict[str, Any]) -> tuple[str, float | None]:
    """Return the name and value of the figure to show first: AP of what the model is made for."""
    kind = next(kind for kind in reversed(SCORE_KINDS) if kind in scores)
    return f"{kind} AP", scores[kind]["AP"]


def keep_best(run_dir: Path, kinds: Sequence[str], predictions_dir: Path | None) -> None:
    """Copy the newest evaluation's files and predictions to the folder ``best``.

    Args:
        run_dir: Folder of the run.
        kinds: Kinds of score that have predictions.
        predictions_dir: With ``predictions_<kind>.json`` of the newest evaluation; None keeps none.
    """
    with _folder_aside(run_dir / BEST_EVAL) as folder:
        shutil.copytree(run_dir / NEWEST_EVAL, folder, dirs_exist_ok=True)
        for kind in kinds if predictions_dir is not None else ():
            assert predictions_dir is not None
            shutil.copy2(predictions_dir / f"predictions_{kind}.json", folder)


@contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """Let the block fill an empty folder, which takes the place of ``target`` when the block is done."""
    folder = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; numbers in full precision, nothing for None and NaN."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(["" if isinstance(v, float) and np.isnan(v) else v for v in row])


def _write_tables(folder: Path, evaluation: Evaluation, analysis: Analysis) -> None:
    """Write figures, classes, curves, confusions and keypoint errors."""
    result, names = evaluation.result, analysis.class_names
    rows = []
    for kind, figures in result.metrics.items():
        for name, value in figures.items():
            rows.append([kind, name, value, *(evaluation.intervals.get(kind, {}).get(name) or (None, None))])
    _write_csv(folder / "figures.csv", ["kind", "figure", "value", "low", "high"], rows)
    for kind, per_class in result.per_class.items():
        header = ["class", "objects", *(c for c in CLASS_COLUMNS if c in result.metrics[kind]), *F1_COLUMNS]
        rows = []
        for k, name in enumerate(names):
            best = analysis.best_f1[kind][name]
            values = [per_class[name][column] for column in CLASS_COLUMNS if column in result.metrics[kind]]
            rows.append([name, int(result.num_truths[kind][k, 0]), *values, *map(best.get, F1_COLUMNS.values())])
        _write_csv(folder / f"classes_{kind}.csv", header, rows)
        known = np.isfinite(analysis.precision[kind]).all(axis=0)
        mean = analysis.precision[kind][:, known].mean(axis=1) if known.any() else np.full(len(analysis.recall), np.nan)
        columns = np.column_stack([analysis.recall, mean, analysis.precision[kind]])
        _write_csv(folder / f"pr_{kind}.csv", ["recall", "(mean)", *names], columns.tolist())
    counts = analysis.confusion.tolist()
    rows = [[name, *row] for name, row in zip([*names, "(no object)"], counts)]
    _write_csv(folder / "confusion.csv", ["object \\ detected as", *names, "(missed)"], rows)
    if result.keypoint_errors:
        header = list(next(iter(result.keypoint_errors.values())))
        rows = [[name, *map(row.get, header)] for name, row in result.keypoint_errors.items()]
        _write_csv(folder / "keypoints.csv", ["keypoint", *header], rows)


def _write_images(path: Path, evaluator: CocoEvaluator, images: ImageScores) -> None:
    """Write hits and mistakes of every image, worst first; those with nothing to judge at the end."""
    annotations = evaluator.annotations
    ranked = images.ranked()
    order = np.r_[ranked, np.setdiff1d(np.arange(len(images.f1)), ranked)]
    rows = []
    for n in order.tolist():
        i = int(images.positions[n])
        counts = [int(column[n]) for column in (images.objects, images.detections, images.hits)]
        own_id = annotations.own_id(int(annotations.image_ids[i]))
        rows.append([own_id, annotations.file_name(i), *counts, float(images.f1[n])])
    _write_csv(path, ["image_id", "file_name", "objects", "detections", "hits", "f1"], rows)


def _write_plots(folder: Path, analysis: Analysis) -> None:
    """Draw curves and confusion matrix."""
    for kind, precision in analysis.precision.items():
        names, overlap = analysis.class_names, SCORE_KINDS[kind].overlap
        png = plots.plot_precision_recall(analysis.recall, precision, names, overlap)
        (folder / f"pr_{kind}.png").write_bytes(png)
    (folder / "confusion.png").write_bytes(plots.plot_confusion(analysis.confusion, analysis.class_names))
