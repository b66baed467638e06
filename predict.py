"""Find objects in pictures with a trained model.

    python predict.py --checkpoint runs/first/weights/best.pth photos/ more/*.jpg
    python predict.py --checkpoint best.pth "albums/**/*.png" --score-threshold 0.3 --output-dir found

The checkpoint knows model, classes, keypoints and sizes. Written are pictures with what was found in them,
``index.html`` (a page to look at it), ``predictions.json`` (COCO results), ``images.json`` (which image id is which
file) and ``predictions.csv``.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import csv
import datetime
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from PIL import Image
from tqdm import tqdm

from annotations.record_reader import Record
from files import write_aside
from inference.detector import Detector
from inference.found import Found
from inference.picture_files import BadFile, format_left_out, search_images
from inference.picture_ids import ids_from_file
from inference.result_pictures import make_folders, name_files, save_result, write_page
from inference.tiles import DEFAULT_OVERLAP, Tiling
from inference.trained_model import (
    DEFAULT_SCORE_THRESHOLD,
    TrainedModel,
    choose_threshold,
    load_trained_model,
    settle_brightness,
)
from pixels.images import is_text
from pixels.masks import MaskBlock
from process.device import choose_device, use_device
from process.waiting import EXIT_SIGNAL
from runtime.signals import StopRequest
from utils import HelpFormatter, describe_error, run_command, versions

logger = logging.getLogger("predict")

# Everything readable was predicted, but some files were not readable.
EXIT_SOME_SKIPPED = 4


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(description="Find objects in pictures", formatter_class=HelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="search these image files, folders and globs")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="use the model in this file of train.py")
    parser.add_argument("--output-dir", metavar="DIR", help="write to this new folder; default: runs/predict-<time>")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="S",
        help="leave out detections below this score, 0 to 1; default: the one with the best F1 in the checkpoint's "
        f"evaluation, else {DEFAULT_SCORE_THRESHOLD}",
    )
    parser.add_argument(
        "--ids-from",
        metavar="FILE",
        help="take the ids of pictures from this COCO file, by their names; default: 1, 2, ... in the order given",
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="take up to N pictures at a time, N >= 1"
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS",
        help="cut pictures that are larger into tiles of this size and join what is found in them"
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, metavar="SHARE",
        help=f"let neighbouring tiles share this part of their sides, 0 to 0.9; default: {DEFAULT_OVERLAP}"
    )  # fmt: skip
    parser.add_argument(
        "-j",
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="load pictures in N more processes; 0: none",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="compute on this torch device, such as cuda or cpu; default: cuda if any"
    )
    parser.add_argument(
        "--overlays",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw what was found into pictures, and write index.html to look at it",
    )
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values out of range."""
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: expected a number from 0 to 1")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1")
    if args.workers < 0:
        parser.error(f"--workers {args.workers}: expected 0 or more")
    try:
        Tiling.of_flags(args.tile, args.overlap, args.batch_size)
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def new_output_dir(given: str | None) -> Iterator[Path]:
    """Create the folder for results; it goes when nothing comes into it.

    Raises:
        ValueError: It holds something already: results of two runs are never mixed.
    """
    folder = Path(given or f"runs/predict-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output-dir {folder}: expected a new or empty folder, it is not; choose another")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # removes an empty one only


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file for writing that takes its name only when everything is in it."""
    with write_aside(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        yield file


def csv_header(trained: TrainedModel) -> list[str]:
    """Return the names of the csv's columns."""
    header = ["file_name", "image_id", "category_id", "class", "score", "x1", "y1", "x2", "y2"]
    if "segm" in trained.spec.iou_types:
        header.append("mask_area")
    if "keypoints" in trained.spec.iou_types:
        header += [f"{name}_{axis}" for name in trained.keypoint_names for axis in "xy"]
    return header


def csv_rows(file_name: str, image_id: int | str, found: Found) -> list[list[Any]]:
    """Return a row per object; lengths in pixels from the top left corner of the upright picture."""
    rows: list[list[Any]] = []
    texts = dict(found.trained.label_map.id_texts)
    boxes, keypoints, masks = found.boxes, found.keypoints, found.detections.masks
    for n, (category, name, score) in enumerate(zip(found.category_ids.tolist(), found.class_names, found.scores)):
        row: list[Any] = [file_name, image_id, texts.get(category, category), name]
        row += [f"{score:.6f}", *(f"{v:.2f}" for v in boxes[n])]
        if masks is not None:
            mask = masks[n]
            assert isinstance(mask, MaskBlock)
            row.append(int(mask.pixels.sum()))
        if keypoints is not None:
            row += [f"{v:.2f}" for v in keypoints[n].reshape(-1)]
        rows.append(row)
    return rows


def finish_drawing(drawing: list[tuple[Record, Future[str]]], parts: list[str]) -> OSError | None:
    """Wait for pictures to be written, and add their parts of the page to ``parts``.

    Returns the first error; the files of pictures with one are taken from their entries.
    """
    failure = None
    for entry, future in drawing:
        error = future.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        if error is not None:
            failure = failure or error
            del entry["overlay"], entry["picture"]
        else:
            parts.append(future.result())
    return failure


def run_to_plain(
    args: argparse.Namespace,
    trained: TrainedModel,
    threshold: float,
    tiling: Tiling | None,
    images: list[Record],
    bad: list[Record],
    not_reached: list[Record],
    left_out: dict[Path, str],
) -> dict[str, Any]:
    """Return the content of ``images.json``: what became of every file."""
    texts = dict(trained.label_map.id_texts)
    return {
        "checkpoint": args.checkpoint,
        "model": trained.spec.name,
        "score_threshold": threshold,
        "value_range": trained.value_range.to_plain(),
        **(tiling.to_plain() if tiling is not None else {}),
        "versions": versions(),
        "categories": [{"id": texts.get(id_, id_), "name": name} for id_, name in trained.class_names.items()],
        "images": images,
        "skipped": bad,
        "not_reached": not_reached,
        "left_out": [{"file_name": str(path), "reason": reason} for path, reason in left_out.items()],
    }


def write_index(
    args: argparse.Namespace,
    output_dir: Path,
    trained: TrainedModel,
    threshold: float,
    parts: list[str],
    bad: int,
    left: int,
) -> OSError | None:
    """Write the page of what was found; returns the error where it cannot be written, since results are there."""
    facts = [args.checkpoint, f"score threshold {threshold:.4g}"]
    facts += [f"{bad} files were skipped, see images.json"] if bad else []
    facts += [f"stopped before {left} more files"] if left else []
    try:
        write_page(output_dir, trained, threshold, parts, " · ".join(facts))
    except OSError as error:
        return error
    return None


def main(args: argparse.Namespace, stop: StopRequest) -> int:
    """Predict until all is done or ``stop`` is set; returns the exit code."""
    # Model and files
    device = choose_device(args.device)
    use_device(device)
    files = search_images(args.paths)
    paths = files.paths
    # Image ids count from 1 in the order of the files, broken ones included.
    ids = ids_from_file(paths, Path(args.ids_from)) if args.ids_from else list(range(1, len(paths) + 1))
    trained = load_trained_model(Path(args.checkpoint))
    threshold, origin = choose_threshold(args.score_threshold, trained)
    logger.info("%s, %d files, device %s", trained.spec.name, len(paths), device)
    if files.left_out:
        logger.warning("left out: %s", format_left_out(files.left_out))
    logger.info("score threshold %.4g (%s)", threshold, origin)
    trained = settle_brightness(trained, paths, args.workers or 1)
    tiling = Tiling.of_flags(args.tile, args.overlap, args.batch_size)
    if tiling is not None:
        logger.info("%s where pictures are larger", tiling)
    detector = Detector(trained, device, threshold, tiling)

    digits = len(str(len(paths)))
    images: list[Record] = []
    bad: list[Record] = []
    parts: list[str] = []
    num_found, separator = 0, "["
    failure: OSError | None = None
    with (
        new_output_dir(args.output_dir) as output_dir,
        whole_file(output_dir / "predictions.json") as results_file,
        whole_file(output_dir / "predictions.csv") as csv_file,
        ThreadPoolExecutor(max(1, args.workers)) as pool,
        tqdm(total=len(paths), unit="image", disable=None) as bar,
    ):
        table = csv.writer(csv_file)
        table.writerow(csv_header(trained))
        drawing: list[tuple[Record, Future[str]]] = []
        for batch in detector.over_files(paths, batch_size=args.batch_size, workers=args.workers):
            if not images and not bad:
                stop.install()  # before there is a result a signal ends the command at once
                if args.overlays:
                    make_folders(output_dir)
            failure = finish_drawing(drawing, parts)  # of the batch before: no more than two batches are in memory
            if failure is not None:
                break
            drawing = []
            for result in batch:
                path, image_id = paths[result.index], ids[result.index]
                bar.update()
                if isinstance(result, BadFile):
                    shown = str(path) if is_text(str(path)) else ascii(str(path))
                    with suppress(BrokenPipeError):  # images.json says it too
                        bar.write(f"skipped: {shown}: {result.reason}", file=sys.stderr)
                    bad.append({"id": image_id, "file_name": str(path), "reason": result.reason})
                    continue
                height, width = result.size
                entry = {"id": image_id, "file_name": str(path), "height": height, "width": width}
                if args.overlays:
                    name_files(entry, f"{result.index + 1:0{digits}d}_{path.stem}")
                    drawing.append((entry, pool.submit(save_result, result, output_dir, entry)))
                images.append(entry)
                for record in result.to_coco(image_id):
                    results_file.write(separator + json.dumps(record))
                    separator = ",\n"
                table.writerows(csv_rows(str(path), image_id, result))
                num_found += len(result)
            if stop:
                break
        failure = failure or finish_drawing(drawing, parts)
        results_file.write("]\n" if separator != "[" else "[]\n")
    position = {id_: n for n, id_ in enumerate(ids)}
    bad.sort(key=lambda entry: position[entry["id"]])
    done = {entry["id"] for entry in images + bad}
    not_reached = [{"id": id_, "file_name": str(path)} for id_, path in zip(ids, paths) if id_ not in done]
    with whole_file(output_dir / "images.json") as file:
        content = run_to_plain(args, trained, threshold, tiling, images, bad, not_reached, files.left_out)
        json.dump(content, file, indent=1)
    if args.overlays and images:
        error = write_index(args, output_dir, trained, threshold, parts, len(bad), len(not_reached))
        failure = failure or error
    if failure is not None:
        found = f"{num_found} objects in {len(images)} pictures, found until then, are in {output_dir}"
        raise ValueError(f"{describe_error(failure)}; {found}")
    if stop.signal_name is not None:
        print(
            f"predict.py: stopped by {stop.signal_name}: {len(done)} of {len(paths)} files are done; "
            f"{num_found} objects in {len(images)} pictures are in {output_dir}",
            file=sys.stderr,
        )
        return EXIT_SIGNAL + signal.Signals[stop.signal_name]
    logger.info("%d objects in %d pictures, in %s", num_found, len(images), output_dir)
    if not images:
        raise ValueError("not one of the files could be read as a picture")
    if bad:
        logger.warning("%d of %d files were skipped; images.json lists them with the reason", len(bad), len(paths))
    return EXIT_SOME_SKIPPED if bad else 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such files are refused, with a line of ours
    stop = StopRequest()
    try:
        return run_command("predict.py", lambda args: main(args, stop), args, stopped=" before anything was found")
    finally:
        stop.remove()


if __name__ == "__main__":
    sys.exit(run())
