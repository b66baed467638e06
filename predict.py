"""Find objects in pictures and videos with a trained model.

    python predict.py --checkpoint runs/first/weights/best.pth photos/ more/*.jpg
    python predict.py --checkpoint best.pth "albums/**/*.png" --score-threshold 0.3 --output-dir found
    python predict.py --checkpoint best.pth clip.mp4 --every 5

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
from concurrent.futures import ThreadPoolExecutor
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
from inference.result_pictures import PictureResults, short_stem, write_page
from inference.result_rows import JsonList, csv_header, csv_rows
from inference.tiles import DEFAULT_OVERLAP, Tiling
from inference.trained_model import (
    DEFAULT_SCORE_THRESHOLD,
    TrainedModel,
    choose_threshold,
    load_trained_model,
    settle_brightness,
)
from inference.video import Frame, is_video_name, load_av
from inference.video_results import VideoResults
from process.device import choose_device, use_device
from process.waiting import EXIT_SIGNAL
from runtime.signals import StopRequest
from utils import HelpFormatter, describe_error, run_command, versions

logger = logging.getLogger("predict")

# Everything readable was predicted, but some files were not readable.
EXIT_SOME_SKIPPED = 4


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(description="Find objects in pictures and videos", formatter_class=HelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="search these image files, videos, folders and globs")
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
    parser.add_argument("--every", type=int, metavar="N", help="take every N-th frame of videos; default: every one")
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
    if args.every is not None and args.every < 1:
        parser.error(f"--every {args.every}: expected at least 1")
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


def split_videos(files: list[Path], args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Return (pictures, videos) of the files.

    Raises:
        ValueError: There are videos, and what they need is not installed or they do not go with the flags.
    """
    videos = [path for path in files if is_video_name(path)]
    if videos:
        load_av()
    elif args.every is not None:
        logger.warning("--every has no effect: there is no video among the files")
    if videos and args.ids_from:
        raise ValueError(f"--ids-from has ids of pictures, not of frames: predict {videos[0]} without it")
    return [path for path in files if not is_video_name(path)], videos


def predict_pictures(
    detector: Detector,
    of_pictures: PictureResults,
    results: JsonList,
    table: Any,
    args: argparse.Namespace,
    stop: StopRequest,
    *,
    with_frames: bool,
) -> OSError | None:
    """Predict pictures until all are done or ``stop`` is set; returns the error that ended it."""
    paths, ids = of_pictures.paths, of_pictures.ids
    with (
        ThreadPoolExecutor(max(1, args.workers)) as pool,
        tqdm(total=len(paths), unit="image", disable=None if paths else True) as bar,
    ):
        for batch in detector.over_files(paths, batch_size=args.batch_size, workers=args.workers):
            stop.install()  # before there is a result a signal ends the command at once
            failure = of_pictures.finish_drawing()  # of the batch before: no more than two batches are in memory
            if failure is not None:
                return failure
            for found in batch:
                bar.update()
                if isinstance(found, BadFile):
                    of_pictures.skip(found)
                    continue
                image_id = ids[found.index]
                of_pictures.add(found, pool)
                for record in found.to_coco(image_id):
                    results.add(record)
                table.writerows(csv_rows(str(paths[found.index]), image_id, found, with_frames=with_frames))
            if stop:
                break
        return of_pictures.finish_drawing()


def predict_videos(
    detector: Detector,
    videos: list[Path],
    of_videos: VideoResults,
    results: JsonList,
    table: Any,
    args: argparse.Namespace,
    stop: StopRequest,
) -> OSError | None:
    """Predict videos one after another until all are done or ``stop`` is set; returns the error that ended it."""

    def report(path: Path, image_id: int, frame: Frame, found: Found) -> None:
        for record in found.to_coco(image_id):
            results.add({**record, "frame": frame.number, "seconds": round(frame.seconds, 6)})
        table.writerows(csv_rows(str(path), image_id, found, with_frames=True, frame=frame))

    for n, path in enumerate(videos):
        if stop:
            break
        overlay = f"overlays/video{n + 1:0{len(str(len(videos)))}d}_{short_stem(path)}.mp4" if args.overlays else None
        options = {"every": args.every or 1, "batch_size": args.batch_size, "overlay": overlay}
        try:
            of_videos.add(detector, path, report, **options, stop=lambda: bool(stop))
        except OSError as error:
            return error
    return None


def describe_count(count: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def describe_seen(num_pictures: int, num_frames: int) -> str:
    """Return how much was looked at in words."""
    pictures, frames = describe_count(num_pictures, "picture"), describe_count(num_frames, "frame")
    return pictures if not num_frames else frames if not num_pictures else f"{pictures} and {frames}"


def main(args: argparse.Namespace, stop: StopRequest) -> int:
    """Predict until all is done or ``stop`` is set; returns the exit code."""
    # Model and files
    device = choose_device(args.device)
    use_device(device)
    files = search_images(args.paths)
    paths, videos = split_videos(files.paths, args)
    # Image ids count from 1 in the order of the files, broken ones included; frames of videos come after them.
    ids = ids_from_file(paths, Path(args.ids_from)) if args.ids_from else list(range(1, len(paths) + 1))
    trained = load_trained_model(Path(args.checkpoint))
    threshold, origin = choose_threshold(args.score_threshold, trained)
    logger.info("%s, %d files, device %s", trained.spec.name, len(files.paths), device)
    if files.left_out:
        logger.warning("left out: %s", format_left_out(files.left_out))
    logger.info("score threshold %.4g (%s)", threshold, origin)
    trained = settle_brightness(trained, paths, args.workers or 1)
    tiling = Tiling.of_flags(args.tile, args.overlap, args.batch_size)
    if tiling is not None:
        logger.info("%s where pictures are larger", tiling)
    detector = Detector(trained, device, threshold, tiling)

    with (
        new_output_dir(args.output_dir) as output_dir,
        whole_file(output_dir / "predictions.json") as results_file,
        whole_file(output_dir / "predictions.csv") as csv_file,
    ):
        table, results = csv.writer(csv_file), JsonList(results_file)
        table.writerow(csv_header(trained, with_frames=bool(videos)))
        of_pictures = PictureResults(output_dir, paths, ids, args.overlays)
        of_videos = VideoResults(output_dir, len(paths) + 1)
        failure = predict_pictures(detector, of_pictures, results, table, args, stop, with_frames=bool(videos))
        if videos and failure is None and not stop:
            stop.install()
            failure = predict_videos(detector, videos, of_videos, results, table, args, stop)
        results.end()
    position = {id_: n for n, id_ in enumerate(ids)}
    images, bad = of_pictures.images, sorted(of_pictures.skipped, key=lambda entry: position[entry["id"]])
    not_reached = of_pictures.not_reached() + of_videos.not_reached(videos)
    bad += of_videos.skipped
    with whole_file(output_dir / "images.json") as file:
        content = run_to_plain(args, trained, threshold, tiling, images, bad, not_reached, files.left_out)
        if videos:
            of_videos.write(content, file)
        else:
            json.dump(content, file, indent=1)
    if args.overlays and images:
        error = write_index(args, output_dir, trained, threshold, of_pictures.page_parts, len(bad), len(not_reached))
        failure = failure or error
    found = f"{describe_count(results.count, 'object')} in {describe_seen(len(images), of_videos.num_frames)}"
    if failure is not None:
        raise ValueError(f"{describe_error(failure)}; {found}, found until then, are in {output_dir}")
    if stop.signal_name is not None:
        print(
            f"predict.py: stopped by {stop.signal_name}: {len(files.paths) - len(not_reached)} of {len(files.paths)} "
            f"files are done; {found} are in {output_dir}",
            file=sys.stderr,
        )
        return EXIT_SIGNAL + signal.Signals[stop.signal_name]
    logger.info("%s, in %s", found, output_dir)
    if not images and not of_videos.num_frames:
        raise ValueError(f"not one of the files could be read as a {'picture or video' if videos else 'picture'}")
    if bad:
        logger.warning(
            "%d of %d files were skipped; images.json lists them with the reason", len(bad), len(files.paths)
        )
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
