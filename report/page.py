"""``report.html``: one page with all of a run, made from the files of its folder; readable on a phone, without network.

The page shows the best evaluation where one is kept, else the newest. Pictures and plots are embedded.
"""

import base64
import datetime
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coco_eval import CocoEvaluator
from evaluation.coco_metrics import SCORE_KINDS
from files import write_aside
from loading.split import Split
from report import plots
from report.eval_files import CLASS_COLUMNS, F1_COLUMNS, keep_best, main_figure, write_evaluation
from report.eval_viewer import read_viewer
from runtime.run_folder import BEST_EVAL, NEWEST_EVAL, is_installed, read_summary
from runtime.trackers import read_metrics
from training.evaluate_model import Evaluation

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("page.html.jinja")
# What `EpochLog.finish` and `TrainingState.end_epoch` note beside the losses.
NO_LOSSES = ("seconds", "img_per_s", "data_wait", "max_mem_mb", "bad_batches", "lr")


def publish(
    run_dir: Path,
    evaluator: CocoEvaluator,
    evaluation: Evaluation,
    split: Split,
    epoch: int | None,
    predictions_dir: Path | None = None,
    is_best: bool = False,
) -> None:
    """Write all that a person reads about an evaluation: its folder, the best one's, and the page.

    What goes wrong becomes a warning: a run does not end because a picture could not be drawn. On the first process.

    Args:
        run_dir: The run's folder.
        evaluator: That gave the figures.
        evaluation: With its analysis.
        split: The evaluated images.
        epoch: Epoch of the evaluated model, from 0; None outside training.
        predictions_dir: With ``predictions_<kind>.json`` of this evaluation, or None.
        is_best: Whether it is the best epoch so far: its files are kept in ``best``.
    """
    started = time.perf_counter()
    names = [f"predictions_{kind}.json" for kind in evaluator.iou_types]
    if predictions_dir is not None and not all((predictions_dir / name).is_file() for name in names):
        predictions_dir = None  # they could not be written, as the log says
    try:
        write_evaluation(run_dir, evaluator, evaluation, split, epoch=epoch, predictions_dir=predictions_dir)
        if is_best:
            keep_best(run_dir, evaluator.iou_types, predictions_dir)
        write_page(run_dir)
    except Exception as error:  # a page is never worth a training
        logger.warning("no complete report in %s: %s: %s", run_dir, type(error).__name__, error)
        logger.debug("", exc_info=True)
    else:
        logger.info("report: %s (%.1f s)", run_dir / "report.html", time.perf_counter() - started)


def write_page(run_dir: Path) -> None:
    """Write ``report.html`` from the run's other files; without jinja2 one line says so."""
    if not is_installed("jinja2"):
        return
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figure": _figure, "count": _count}
    text = environment.get_template(TEMPLATE.name).render(**page_content(run_dir))
    with write_aside(run_dir / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _title(kind: str) -> str:
    """Return what a kind of score is called at the head of a section."""
    return SCORE_KINDS[kind].title.capitalize()


def page_content(run_dir: Path) -> dict[str, Any]:
    """Return what the template shows, all of it from files."""
    newest, best = read_summary(run_dir / NEWEST_EVAL), read_summary(run_dir / BEST_EVAL)
    folder, summary = (run_dir / BEST_EVAL, best) if best else (run_dir / NEWEST_EVAL, newest)
    kinds = [kind for kind in SCORE_KINDS if kind in summary]
    return {
        "title": "/".join(run_dir.resolve().parts[-2:]),
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "run": _read_args(run_dir),
        "shown": _name_of(summary, "best" if best else "newest"),
        "headline": [_headline(kind, summary) for kind in kinds],
        "evaluations": _evaluations(newest, best),
        "curves": _learning_curves(read_metrics(run_dir)) if is_installed("matplotlib") else [],
        "kinds": [_kind(kind, summary, folder) for kind in kinds],
        "confusion": _embed(folder / "confusion.png"),
        "score_threshold": summary.get("score_threshold"),
        "false_alarms": summary.get("false_positives_per_background_image"),
        "background_images": summary.get("background_images"),
        "keypoints": _table_of_keypoints(summary.get("keypoint_errors", {})),
        "pictures": read_viewer(folder),
        "settings": summary.get("settings", {}),
    }


def _figure(value: float | None) -> str:
    """Return a figure as the log prints it."""
    return "n/a" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f}"


def _embed(path: Path) -> str:
    """Return a PNG file as a data URI; empty where there is none."""
    if not path.is_file():
        return ""
    return _data_uri(path.read_bytes())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _name_of(summary: dict[str, Any], which: str) -> str:
    """Return how an evaluation is called on the page."""
    epoch = summary.get("epoch")
    return f"{which} evaluation" if epoch is None else f"{which} epoch, {epoch}"


def _read_args(run_dir: Path) -> dict[str, Any]:
    """Return what ``args.json`` says about the run, whatever of it is there."""
    path = run_dir / "args.json"
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        content = {}
    if not isinstance(content, dict):
        content = {}
    command, flags = content.get("command", ""), content.get("args", {})
    return {
        "command": str(command),
        "facts": {k: v for k, v in content.items() if isinstance(v, (str, int, float)) and k != "command"},
        "flags": {k: v for k, v in flags.items() if v is not None} if isinstance(flags, dict) else {},
    }


def _headline(kind: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the large figures of one kind of score."""
    figures = summary[kind]
    return {
        "name": _title(kind),
        "AP": figures["AP"],
        "interval": summary.get("intervals", {}).get(kind, {}).get("AP"),
        "others": {name: figures[name] for name in ("AP50", "AP75", "AR")},
    }


def _evaluations(newest: dict[str, Any], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for the best and one for the newest evaluation, where they are not the same."""
    rows = []
    pairs = [("best", best), ("newest", newest)]
    for which, summary in pairs if best and newest and best.get("epoch") != newest.get("epoch") else ():
        name, value = main_figure(summary)
        kind = name.split()[0]
        interval = summary.get("intervals", {}).get(kind, {}).get("AP")
        rows.append({"which": _name_of(summary, which), "name": name, "value": value, "interval": interval})
    return rows


def _learning_curves(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return plots of the epochs: AP, losses, learning rate."""
    lines = [line for line in lines if line.get("epoch") is not None]
    if not lines:
        return []
    epochs = [line["epoch"] for line in lines]
    kinds = [kind for kind in SCORE_KINDS if any(kind in line for line in lines)]
    figures = {_title(kind): [line.get(kind, {}).get("AP") for line in lines] for kind in kinds}
    bands = {_title(kind): [line.get("intervals", {}).get(kind, {}).get("AP") for line in lines] for kind in kinds}
    curves = [("AP over epochs", plots.plot_lines(epochs, figures, label="AP", bands=bands))]
    train = [line.get("train", {}) for line in lines]
    names = dict.fromkeys(name for averages in train for name in averages if name not in NO_LOSSES)
    losses = {name.removeprefix("loss_"): [averages.get(name) for averages in train] for name in names}
    if any("val_loss" in line for line in lines):
        losses["validation"] = [line.get("val_loss", {}).get("loss") for line in lines]
    if losses:
        curves.append(("Loss", plots.plot_lines(epochs, losses, label="loss")))
    if any("lr" in averages for averages in train):
        rates = {"lr": [averages.get("lr") for averages in train]}
        curves.append(("Learning rate", plots.plot_lines(epochs, rates, label="learning rate")))
    return [{"name": name, "source": _data_uri(png)} for name, png in curves]


def _kind(kind: str, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tables and the curve of one kind of score."""
    intervals = summary.get("intervals", {}).get(kind, {})
    columns = [column for column in CLASS_COLUMNS if column in summary[kind]]
    best_f1, objects = summary.get("best_f1", {}).get(kind, {}), summary.get("objects", {}).get(kind, {})
    classes = [
        {
            "name": name,
            "objects": objects.get(name),
            "figures": [figures[column] for column in columns],
            "f1": [best_f1.get(name, {}).get(key) for key in F1_COLUMNS.values()],
        }
        for name, figures in summary.get("per_class", {}).get(kind, {}).items()
    ]
    return {
        "name": _title(kind),
        "overlap": SCORE_KINDS[kind].overlap,
        "figures": [
            {"name": name, "value": value, "interval": intervals.get(name)} for name, value in summary[kind].items()
        ],
        "resamples": intervals.get("resamples"),
        "columns": [*columns, "best F1", "precision", "recall", "at score"],
        "classes": classes,
        "curve": _embed(folder / f"pr_{kind}.png"),
    }


def _table_of_keypoints(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return header and rows of the keypoint errors."""
    header = list(next(iter(rows.values()), {}))
    return {"header": header, "rows": [(name, [row.get(column) for column in header]) for name, row in rows.items()]}
