"""Score a COCO results file, without a model; the numbers are pycocotools' own.

    python score.py --ground-truth annotations/instances_val2017.json --predictions predictions_bbox.json
    python score.py --ground-truth people.json --predictions predictions_keypoints.json --kpt-oks-sigmas 0.05

Kinds of score are those that the results have entries for, unless --iou-types says otherwise.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from annotations.arrays import Annotations
from annotations.findings import ON_BAD_DATA
from annotations.meant_ids import explain_class, ids_by_class
from annotations.record_reader import Record
from annotations.skeleton import Skeleton, choose_sigmas
from coco_eval import OKS_AREAS, CocoEvaluator, EvalResult, format_summary
from coco_utils import read_coco
from evaluation.analysis import build_analysis, format_classes
from evaluation.bootstrap import format_intervals, metric_intervals
from evaluation.coco_metrics import SCORE_KINDS
from evaluation.foreign_ids import find_foreign_ids, find_other_form, find_shifted_categories
from evaluation.results_files import (
    check_keypoints_of_results,
    detections_of_results,
    encode_masks,
    of_known_images,
    read_results,
)
from files import write_aside
from utils import HelpFormatter, run_command

logger = logging.getLogger("score")

# So many categories stand in a warning.
MAX_SHOWN = 5


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description="Score a COCO results file",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--ground-truth", required=True, metavar="FILE", help="score against this COCO annotation file")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="score this COCO results file")
    parser.add_argument(
        "--iou-types",
        nargs="+",
        choices=sorted(SCORE_KINDS),
        help="score these kinds only; default: what the results have",
    )
    parser.add_argument(
        "--kpt-oks-sigmas",
        type=float,
        nargs="+",
        metavar="SIGMA",
        help="allow keypoints this error, one for all or one each; default: COCO's for persons, else 0.1",
    )
    parser.add_argument(
        "--oks-area",
        default="annotation",
        choices=OKS_AREAS,
        help="divide keypoint errors by the annotated area, the box's, or 0.53 of the box's (box53)",
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="count the best N detections per image and category, at least 1; default: 100, keypoints 20",
    )
    parser.add_argument(
        "--on-bad-data",
        default="error",
        choices=ON_BAD_DATA,
        help="stop at objects and images of the ground truth with faults, or skip them",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    return parser


def score(
    annotations: Annotations,
    records: list[Record],
    iou_types: list[str],
    *,
    sigmas: list[float] | None = None,
    oks_area: str = "annotation",
    max_dets: int | None = None,
    name: str = "results",
    id_texts: Mapping[int, str] = MappingProxyType({}),
) -> tuple[CocoEvaluator, EvalResult]:
    """Score results against annotations.

    Args:
        annotations: The ground truth.
        records: COCO results of images in the ground truth, see `of_known_images`.
        iou_types: Kinds of score; each reads the results that have its field.
        sigmas: OKS sigmas, one or K.
        oks_area: See `CocoEvaluator`.
        max_dets: Detections per image and category that count.
        name: The results file, for messages.
        id_texts: {number: text} of ids that are text in the results, for messages.

    Raises:
        ValueError: A result does not fit the ground truth, or sigmas do not.
    """
    known_categories = {id_ for id_, _ in annotations.categories}
    strange = [record["category_id"] for record in records if record["category_id"] not in known_categories]
    if strange:
        texts = [str(id_texts.get(id_, id_)) for id_ in sorted(set(strange))]
        classes = ids_by_class((class_name, annotations.own_id(id_)) for id_, class_name in annotations.categories)
        meant = next((f"; {why}" for text in texts if (why := explain_class(text, classes))), "")
        text = "%s: %d result(s) of unknown categories do not count (%s)%s"
        logger.warning(text, name, len(strange), ", ".join(texts[:10]), meant)

    if "segm" in iou_types:
        encode_masks(records, annotations, name)
    values = None
    if "keypoints" in iou_types:
        check_keypoints_of_results(records, annotations, name)
        skeleton = Skeleton(annotations.keypoint_names)
        values, source = choose_sigmas(sigmas, skeleton, annotations.num_keypoints)
        logger.info("OKS sigmas from %s", source)
    evaluator = CocoEvaluator(annotations, iou_types, sigmas=values, oks_area=oks_area, max_dets=max_dets)
    by_image: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_image[record["image_id"]].append(record)
    for image_id in annotations.image_ids.tolist():
        of_image = by_image[image_id]
        detections = {}
        for t in iou_types:
            detections[t] = detections_of_results([r for r in of_image if SCORE_KINDS[t].field in r], t)
        evaluator.add_by_type(image_id, detections)
    return evaluator, evaluator.compute()


def _warn_of_misread_results(
    annotations: Annotations, records: list[Record], name: str, id_texts: Mapping[int, str]
) -> None:
    """Warn where figures near 0 have a cause outside the detector: other ids, or boxes in another form."""
    if not records:
        logger.warning("%s: no results at all; every figure is 0", name)
    boxes = [record["bbox"] for record in records if "bbox" in record]
    if empty := sum(min(box[2:]) <= 0 for box in boxes):
        text = "%s: %d of %d boxes have no inside (a width or height of 0 or less) and find nothing"
        logger.warning(text, name, empty, len(boxes))
    form = find_other_form(annotations, records)
    if form is not None:
        logger.warning(
            "%s: boxes barely overlap the objects of their picture, but would as %s; results have [x, y, width, "
            "height] in pixels from the top left corner: convert them",
            name,
            form,
        )
    shifted = find_shifted_categories(annotations, records)
    if shifted is not None:
        names = dict(annotations.categories)
        rows = [
            f"{id_texts.get(given, given)!r} on {names[found]!r} (id {annotations.own_id(found)!r})"
            for given, found in list(shifted.items())[:MAX_SHOWN]
        ]
        logger.warning(
            "%s: boxes lie on objects of other categories than their category_id says: %s%s; the ids seem to be of "
            "another numbering: give those of the ground truth",
            name,
            ", ".join(rows),
            " ..." if len(shifted) > MAX_SHOWN else "",
        )
    foreign = find_foreign_ids(annotations, records)
    if foreign is not None:
        logger.warning(
            "%s: boxes barely overlap the objects of their picture (mean IoU %.2f), but fit those of others (%.2f): "
            "those of image_id %s fit %s, whose id is %s; the ids seem to be of another numbering (predict.py "
            "--ids-from takes them from the ground truth)",
            name,
            foreign.own,
            foreign.other,
            annotations.own_id(foreign.image_id),
            annotations.file_name(foreign.fits),
            annotations.own_id(int(annotations.image_ids[foreign.fits])),
        )


def main(args: argparse.Namespace) -> int:
    """Score and print."""
    records, id_texts = read_results(Path(args.predictions), args.iou_types)
    fields = {field for record in records for field in record}
    iou_types = args.iou_types or [t for t, kind in SCORE_KINDS.items() if kind.field in fields] or ["bbox"]
    for t in iou_types:
        field = SCORE_KINDS[t].field
        if records and field not in fields:
            raise ValueError(f"{args.predictions}: no result has {field!r}, which a score of {t} needs")
        if without := sum(field not in record for record in records):
            text = "%s: %d of %d results have no %r and do not count in the score of %s"
            logger.warning(text, args.predictions, without, len(records), field, t)
    annotations = read_coco(Path(args.ground_truth), on_bad_data=args.on_bad_data, uses=iou_types)
    for finding in annotations.warnings:
        logger.warning("%s", finding)
    records = of_known_images(records, annotations, args.predictions, id_texts)
    evaluator, result = score(
        annotations,
        records,
        iou_types,
        sigmas=args.kpt_oks_sigmas,
        oks_area=args.oks_area,
        max_dets=args.max_dets,
        name=args.predictions,
        id_texts=id_texts,
    )
    _warn_of_misread_results(annotations, records, args.predictions, id_texts)
    report = build_analysis(result)
    intervals = metric_intervals(result)
    if args.json:  # before anything is printed: a closed pipe ends the command there
        content = {**result.metrics, "per_class": result.per_class, "intervals": intervals}
        content |= {"settings": result.settings, **report.to_plain()}
        with write_aside(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    print(format_summary(result))
    print(format_classes(result, report, iou_types[0]))
    print(format_intervals(intervals))
    return 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.max_dets is not None and args.max_dets < 1:
        parser.error(f"--max-dets {args.max_dets}: must be at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    np.seterr(all="ignore")
    return run_command("score.py", main, args)


if __name__ == "__main__":
    sys.exit(run())
