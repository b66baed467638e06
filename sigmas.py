"""The sigma workbench: where OKS sigmas come from and what they mean.

From images annotated twice or more (COCO jsons, or folders with one json per image), one sigma per keypoint:
    python sigmas.py estimate first/annotations second/annotations
What sigmas mean on a dataset, in pixels:
    python sigmas.py card --ground-truth custom/train/annotations --kpt-oks-sigmas 0.05
After a run, keypoint AP against sigmas times 0.25 to 4, from saved detections:
    python sigmas.py curve --ground-truth truth.json --predictions predictions_keypoints.json --kpt-oks-sigmas 0.05
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from annotations.findings import Findings
from annotations.record_reader import Record
from annotations.skeleton import Skeleton, choose_sigmas
from coco_eval import OKS_AREAS, CocoEvaluator
from coco_utils import read_coco
from custom_dataset import check_point_counts, read_dataset_info
from evaluation.results_files import (
    check_keypoints_of_results,
    detections_of_results,
    of_known_images,
    read_results,
)
from evaluation.sigma_estimation import (
    FEW_OBJECTS,
    check_independent,
    estimate_sigmas,
    format_card,
    read_annotator,
    read_annotators,
)
from utils import HelpFormatter, run_command

logger = logging.getLogger("sigmas")

CURVE_FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser with its three commands."""
    parser = argparse.ArgumentParser(
        description="Estimate and explain OKS sigmas", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    estimate = commands.add_parser(
        "estimate", formatter_class=HelpFormatter, help="estimate sigmas from repeated annotations"
    )
    estimate.add_argument(
        "annotators",
        nargs="+",
        metavar="PATH",
        help="read each annotator's COCO json, or folder with one json per image; at least two",
    )
    estimate.add_argument(
        "--oks-area",
        default="box",
        choices=("box", "box53"),
        help="divide errors by the area of the object's box, or by 0.53 of it (box53)",
    )
    card = commands.add_parser("card", formatter_class=HelpFormatter, help="show what sigmas mean on a dataset")
    curve = commands.add_parser(
        "curve", formatter_class=HelpFormatter, help="show AP against sigma, from saved detections"
    )
    for command in (card, curve):
        what = "this COCO json or folder of jsons" if command is card else "this COCO json"
        command.add_argument("--ground-truth", required=True, metavar="PATH", help=f"read the objects from {what}")
        command.add_argument(
            "--kpt-oks-sigmas",
            type=float,
            nargs="+",
            metavar="SIGMA",
            help="allow keypoints this error, one for all or one each; default: the dataset's, COCO's or 0.1",
        )
    curve.add_argument(
        "--predictions", required=True, metavar="FILE", help="score the keypoints in this COCO results file"
    )
    curve.add_argument(
        "--oks-area",
        default="annotation",
        choices=OKS_AREAS,
        help="divide keypoint errors by the annotated area, the box's, or 0.53 of the box's (box53)",
    )
    return parser


def print_estimate(args: argparse.Namespace) -> None:
    """Estimate sigmas and print them with their intervals, and a card."""
    annotators = read_annotators([Path(path) for path in args.annotators])
    check_independent(annotators, args.annotators)
    factor = 0.53 if args.oks_area == "box53" else 1.0
    estimate = estimate_sigmas(annotators, area_factor=factor)
    names = estimate.names or tuple(map(str, range(len(estimate.sigmas))))
    width = max(len(name) for name in [*names, "keypoint"])
    print(f"  {'keypoint':<{width}} {'sigma':>7}   95 % interval     objects")
    for name, sigma, low, high, count in zip(names, estimate.sigmas, estimate.low, estimate.high, estimate.num_objects):
        print(f"  {name:<{width}} {sigma:>7.4f}   {low:.4f} to {high:.4f} {count:>9}")
    unseen = [name for name, count in zip(names, estimate.num_objects) if not count]
    agreed = [name for name, sigma in zip(names, estimate.sigmas) if f"{sigma:.4f}" == "0.0000"]
    if unseen:
        logger.warning("no object has %s labelled by two annotators: there is no sigma for it", ", ".join(unseen))
    if agreed:
        logger.warning(
            "nobody differs on %s: a sigma of 0 allows no error at all, give a larger one", ", ".join(agreed)
        )
    few = int(estimate.num_objects[estimate.num_objects > 0].min())
    if few < FEW_OBJECTS:
        logger.warning("only %d objects were annotated twice; below %d an estimate says little", few, FEW_OBJECTS)
    areas = np.concatenate([boxes[:, 2] * boxes[:, 3] for boxes, _ in annotators[0].images.values()]) * factor
    print(format_card(estimate.sigmas, names, areas))
    if unseen or agreed:
        print("no line with --kpt-oks-sigmas: it needs a sigma above 0 for every keypoint")
    else:
        print("--kpt-oks-sigmas " + " ".join(f"{sigma:.4f}" for sigma in estimate.sigmas))


def print_card(args: argparse.Namespace) -> None:
    """Print what sigmas mean in pixels."""
    path = Path(args.ground_truth)
    annotator = read_annotator(path)
    num_keypoints = next(points.shape[1] for _, points in annotator.images.values() if points.size)
    skeleton = Skeleton(annotator.names)
    folders = (path, *path.absolute().parents[:2])
    if root := next((folder for folder in folders if (folder / "dataset.json").is_file()), None):
        findings = Findings()
        info = read_dataset_info(root, findings)
        check_point_counts(info, num_keypoints, findings)
        findings.raise_errors()
        skeleton = info.skeleton
    sigmas, source = choose_sigmas(args.kpt_oks_sigmas, skeleton, num_keypoints)
    print(f"sigmas from {source}")
    areas = np.concatenate([boxes[:, 2] * boxes[:, 3] for boxes, _ in annotator.images.values()])
    print(format_card(sigmas, skeleton.names, areas))


def print_curve(args: argparse.Namespace) -> None:
    """Print AP with all sigmas made smaller and larger."""
    annotations = read_coco(Path(args.ground_truth), uses=["keypoints"])
    records, id_texts = read_results(Path(args.predictions), ["keypoints"])
    records = of_known_images(records, annotations, args.predictions, id_texts)
    check_keypoints_of_results(records, annotations, args.predictions)
    if not any("keypoints" in record for record in records):
        raise ValueError(f"{args.predictions}: no result has 'keypoints', which the curve needs")
    sigmas, source = choose_sigmas(args.kpt_oks_sigmas, Skeleton(annotations.keypoint_names), annotations.num_keypoints)
    by_image: dict[int, list[Record]] = {image_id: [] for image_id in annotations.image_ids.tolist()}
    for record in records:
        if "keypoints" in record:
            by_image[record["image_id"]].append(record)
    print(f"keypoint AP against sigmas (from {source}) times a factor:")
    print(f"  {'factor':>6} {'AP':>8} {'AP50':>8} {'AP75':>8}")
    for factor in CURVE_FACTORS:
        evaluator = CocoEvaluator(annotations, ["keypoints"], sigmas=sigmas * factor, oks_area=args.oks_area)
        for image_id, of_image in by_image.items():
            evaluator.add(image_id, detections_of_results(of_image, "keypoints"))
        figures = evaluator.compute().metrics["keypoints"]
        cells = " ".join(
            f"{'n/a' if figures[f] is None else format(figures[f], '.4f'):>8}" for f in ("AP", "AP50", "AP75")
        )
        print(f"  {factor:>6g} {cells}")


def main(args: argparse.Namespace) -> int:
    """Run one of the three commands."""
    {"estimate": print_estimate, "card": print_card, "curve": print_curve}[args.command](args)
    return 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    return run_command("sigmas.py", main, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(run())
