"""Compare two runs on the same images: the difference, its interval, and how sure it is.

    python compare.py runs/first runs/second
    python compare.py runs/first runs/second --evaluation newest --json difference.json

A paired bootstrap over images from the matches that a run keeps of its best and of its newest evaluation
(matches_<kind>.npz); no model, image or annotation file is read.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bootstrap import LEVEL, RESAMPLED, RESAMPLES, SEED, Difference, compare_figure, draw_weights, resample
from evaluation.coco_metrics import SCORE_KINDS
from evaluation.eval_result import SavedMatches
from files import why_no_folder, write_aside
from runtime.run_folder import BEST_EVAL, NEWEST_EVAL, read_summary
from utils import HelpFormatter, run_command

logger = logging.getLogger("compare")

_MATCHES = "matches_*.npz"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description="Compare two runs on the same images",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("first", metavar="FIRST", help="compare the run in this folder")
    parser.add_argument("second", metavar="SECOND", help="compare it with the run in this folder")
    parser.add_argument(
        "--evaluation", default="best", choices=("best", "newest"), help="compare the best or the newest evaluations"
    )
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, metavar="N", help="draw N random sets of images, at least 2"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="draw the sets of images from this number, 0 or more")
    parser.add_argument("--json", metavar="FILE", help="also write the differences to FILE")
    return parser


def find_evaluation(run_dir: Path, which: str) -> Path:
    """Return the folder with the matches of a run's best or newest evaluation.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = run_dir / (BEST_EVAL if which == "best" else NEWEST_EVAL)
    if not run_dir.is_dir():
        above = next((path for path in run_dir.absolute().parents[:2] if any(path.glob(f"*/{_MATCHES}"))), None)
        hint = "; score.py compares a file of results with the truth" if run_dir.suffix == ".json" else ""
        hint = f"; is its run, {above}, meant?" if above is not None else hint
        raise FileNotFoundError(f"{run_dir}: {why_no_folder(run_dir)}; give the folder of a run{hint}")
    if not any(folder.glob(_MATCHES)):
        raise FileNotFoundError(f"{folder}: no {_MATCHES}; is {run_dir} the folder of a run that was evaluated?")
    return folder


def read_matches(folder: Path) -> dict[str, SavedMatches]:
    """Return the matches of every kind of score that an evaluation has."""
    paths = {kind: folder / f"matches_{kind}.npz" for kind in SCORE_KINDS}
    return {kind: SavedMatches.load(path) for kind, path in paths.items() if path.is_file()}


def check_comparable(first: SavedMatches, second: SavedMatches, kind: str) -> None:
    """Raise ValueError where figures of two evaluations cannot be compared, with the first reason found."""
    if not np.array_equal(first.image_ids, second.image_ids):
        common = len(np.intersect1d(first.image_ids, second.image_ids))
        counts = f"{len(first.image_ids)} and {len(second.image_ids)} images, {common} in common"
        raise ValueError(f"the runs were evaluated on different images ({counts}); compare runs on the same ones")
    if first.class_names != second.class_names:
        different = sorted(set(first.class_names) ^ set(second.class_names)) or ["their order"]
        raise ValueError(f"the runs were evaluated with different classes ({', '.join(different[:5])})")
    if first.fingerprint != second.fingerprint:
        counts = f"{len(first.truth_images)} and {len(second.truth_images)} objects"
        raise ValueError(
            f"the annotations differ between the runs ({SCORE_KINDS[kind].title}: {counts}); evaluate both again"
        )
    names = [f"max_dets_{kind}", *(("kpt_oks_sigmas", "oks_area") if kind == "keypoints" else ())]
    for name in names:
        a, b = first.settings.get(name), second.settings.get(name)
        if a != b:
            raise ValueError(f"{name} differs between the runs: {a} and {b}; evaluate both with the same")
    if first.settings.get("pycocotools") != second.settings.get("pycocotools"):
        logger.warning("the runs were evaluated with different versions of pycocotools")


def compare_matches(
    first: SavedMatches, second: SavedMatches, num_resamples: int, seed: int
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Return the differences of all figures, and of AP per class."""
    num_images = len(first.image_ids)
    weights = np.concatenate([np.ones((1, num_images), np.int32), draw_weights(num_images, num_resamples, seed)])
    a, b = resample(first, weights), resample(second, weights)
    figures = {name: compare_figure(a.figure(name), b.figure(name)) for name in RESAMPLED}
    per_class = {name: compare_figure(a.figure("AP", k), b.figure("AP", k)) for k, name in enumerate(first.class_names)}
    return figures, per_class


def format_differences(title: str, rows: dict[str, Difference]) -> str:
    """Return a table with one line per figure or class."""
    width = max([len(name) for name in rows] + [len(title)])
    head = f"{'first':>8} {'second':>8} {'change':>8}   {f'{LEVEL:.0%} interval':<18} second better"
    lines = [f"  {title:<{width}} {head}"]
    for name, row in rows.items():
        if row.first is None or row.second is None:
            lines.append(f"  {name:<{width}} {'n/a':>8} {'n/a':>8}")
            continue
        text = f"  {name:<{width}} {row.first:>8.4f} {row.second:>8.4f} {row.second - row.first:>+8.4f}"
        if row.probability is not None:
            text += f"   {row.low:+.4f} to {row.high:+.4f} {row.probability:>13.0%}{'  *' if row.is_clear else ''}"
        lines.append(text)
    return "\n".join(lines)


def format_evaluation(path: Path) -> str:
    """Return an evaluation's folder and epoch."""
    epoch = read_summary(path).get("epoch")
    return f"{path}" if epoch is None else f"{path}, epoch {epoch}"


def main(args: argparse.Namespace) -> int:
    """Compare and print."""
    folders = [find_evaluation(Path(run), args.evaluation) for run in (args.first, args.second)]
    first, second = (read_matches(folder) for folder in folders)
    kinds = [kind for kind in first if kind in second]
    if not kinds:
        raise ValueError(f"the runs have no kind of score in common: {', '.join(first)} and {', '.join(second)}")
    for kind in kinds:
        check_comparable(first[kind], second[kind], kind)
    lines = [f"first:  {format_evaluation(folders[0])}\nsecond: {format_evaluation(folders[1])}"]
    content: dict[str, Any] = {}
    for kind in kinds:
        figures, per_class = compare_matches(first[kind], second[kind], args.resamples, args.seed)
        lines.append(
            f"\n{SCORE_KINDS[kind].title}, {len(first[kind].image_ids)} images, resampled {args.resamples} times"
        )
        lines.append(format_differences("figure", figures))
        if len(per_class) > 1:
            lines.append(format_differences("AP of class", per_class))
        plain = {name: dataclasses.asdict(row) for name, row in figures.items()}
        content[kind] = {**plain, "per_class": {name: dataclasses.asdict(row) for name, row in per_class.items()}}
    lines.append(
        f"\n* the interval leaves out 0: more than the choice of images explains (with {LEVEL:.0%} confidence)"
    )
    if args.json:  # before anything is printed: a closed pipe ends the command there
        with write_aside(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    print("\n".join(lines))
    return 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must not be negative")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    if args.resamples < 2:
        parser.error(f"--resamples must be at least 2, got {args.resamples}")
    return run_command("compare.py", main, args)


if __name__ == "__main__":
    sys.exit(run())
