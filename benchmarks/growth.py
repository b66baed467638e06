"""What a larger dataset costs: CPU time and memory against pictures, objects, classes, keypoints and processes.

    python benchmarks/growth.py                                    # all of it, about half an hour; 10 GB of memory
    python benchmarks/growth.py --axes classes --parts scoring report --most 100000

One size grows at a time, from what `AXES` says of the others. Every figure comes from a fresh process: CPU seconds, of the
slowest process where there are several, and the most memory on top of what it had before. "power" is p where the cost
between the two largest sizes grows as the size to the power of p; "knee" is the first size at which the cost is twice
that of the smallest one: up to there it is hidden behind what every size pays. Parts:

first start: a COCO json is read and checked, and its pictures looked for.
next start: the same from the cache.
epoch order: groups, shuffling, repeat factors and batches of one epoch.
batch: two pictures of 640 x 480 decoded, mirrored at random, packed and unpacked, with boxes and keypoints.
masks: the same with a polygon for each object.
step: losses and gradients of RetinaNet for two pictures of noise, resized to 160 pixels.
scoring: 20 detections a picture matched as they come, and all figures.
same pictures: fingerprints compared, each with each, as --val-fraction and the doctor do.
report: intervals, tables, plots, pictures and the page, from a finished evaluation.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import Measured, cpu_seconds, machine, table  # isort: skip
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from synthetic import draw_annotations, draw_batch

from annotations.labels import LabelMap
from coco_eval import CocoEvaluator
from coco_utils import write_coco
from evaluation.analysis import build_analysis
from evaluation.bootstrap import metric_intervals
from evaluation.detections import Detections
from evaluation.results_files import PredictionWriter
from group_by_aspect_ratio import GroupedBatchSampler
from loading.collate import collate_fn, unpack
from loading.duplicates import HASH_SIDE, Fingerprints, find_equal_pairs
from loading.repeats import find_repeats
from loading.samples import DetectionDataset
from loading.splits import CocoPaths, load_coco_split
from models.architectures import ModelSpec, build_model
from models.batched_step import use_batched_step
from optimization.step import StepOptions, add_gradients
from presets import build_transforms
from report.page import publish
from training.evaluate_model import Evaluation

CPU = torch.device("cpu")
HEIGHT, WIDTH = 480, 640
LINKS = 25_000  # to one picture file; file systems have a limit


@dataclass(frozen=True)
class Size:
    """How large a dataset is, and on how many processes it is used; objects and detections are those of a picture."""

    pictures: int = 1000
    objects: int = 4
    classes: int = 20
    keypoints: int = 0
    detections: int = 20
    processes: int = 1


# What grows, what is held, and the parts that it could matter to.
AXES = {
    "pictures": (
        (1_000, 10_000, 100_000, 1_000_000),
        Size(objects=2, detections=2),
        ("first start", "next start", "epoch order", "batch", "same pictures", "scoring", "report"),
    ),
    "objects": (
        (1, 10, 100, 1_000, 10_000),
        Size(pictures=20, detections=100),
        ("first start", "next start", "epoch order", "batch", "masks", "step", "scoring", "report"),
    ),
    "classes": (
        (1, 10, 100, 1_200),
        Size(pictures=1200),
        ("first start", "next start", "epoch order", "batch", "step", "scoring", "report"),
    ),
    "keypoints": ((1, 17, 133), Size(pictures=500), ("first start", "next start", "batch", "scoring", "report")),
    "processes": ((1, 2, 4, 8), Size(pictures=4000), ("next start", "epoch order", "scoring")),
}
# Where a part ends: 10,000 masks of a picture are 3 GB of pixels, which torchvision's models want as such; a million
# pictures compared with each other take a hundred times as long as a tenth of them.
MOST = {"masks": 1_000, "same pictures": 100_000}

# A part that is quicker is repeated until this much CPU time is gone.
LEAST_SECONDS = 0.3


def prepare(folder, size):
    """Write pictures, a json and predictions of that size, and read them once, so that there is a cache."""
    annotations = draw_annotations(size.pictures, size.objects, size.classes, size.keypoints, HEIGHT, WIDTH)
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for first in range(0, size.pictures, LINKS):
        pixels = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(images / annotations.file_name(first), quality=90)
        for i in range(first + 1, min(first + LINKS, size.pictures)):
            os.link(images / annotations.file_name(first), images / annotations.file_name(i))
    write_coco(annotations, folder / "a.json")


def read(folder, size, cache="cache"):
    uses = ("keypoints",) if size.keypoints else ()
    return load_coco_split(CocoPaths(folder / "images", folder / "a.json"), uses=uses, cache_dir=folder / cache)


def detections_of(annotations, i, size):
    """Return detections of image ``i``: objects that are somewhat off, again and again, of one of two classes."""
    rng = np.random.default_rng(i)
    objects = annotations.objects(i)
    chosen = np.arange(size.detections) % (objects.stop - objects.start) + objects.start
    boxes = annotations.boxes_xywh[chosen] + rng.normal(0, 2, (size.detections, 4))
    boxes[:, 2:] = boxes[:, 2:].clip(1)
    points = annotations.keypoints[chosen]
    if size.keypoints:
        points = points + np.append(rng.normal(0, 2, 2), 0)
    labels = annotations.category_ids[chosen].copy()
    labels[rng.random(size.detections) < 0.3] = 1
    return Detections(labels, np.sort(rng.random(size.detections))[::-1], boxes, None, points)


def iou_types(size):
    return ("bbox", "keypoints") if size.keypoints else ("bbox",)


def new_evaluator(split, size):
    return CocoEvaluator(split.annotations, iou_types(size), sigmas=np.full(size.keypoints, 0.05))


def first_start(folder, size):
    counter = iter(range(1_000_000))
    return lambda: read(folder, size, f"cache{next(counter)}")


def next_start(folder, size):
    read(folder, size)
    return lambda: read(folder, size)


def epoch_order(folder, size):
    split = read(folder, size)
    labels = LabelMap.contiguous(split.annotations.categories)
    spec = ModelSpec("retinanet_resnet50_fpn", labels.num_classes)
    rank = dist.get_rank() if dist.is_initialized() else 0

    def run():
        repeats = find_repeats(split, labels, spec, split.indices, 0.01).of_picture
        options = {"group_factor": 3, "batch_size": 2, "seed": 0, "rank": rank, "world_size": size.processes}
        heights, widths = split.annotations.heights, split.annotations.widths
        for _ in GroupedBatchSampler(heights, widths, repeats=repeats, **options):
            pass

    return run


def batch(folder, size, *, masks=False):
    split = read(folder, size)
    if masks:  # not in the json, whose reading is measured without them
        annotations = draw_annotations(
            size.pictures, size.objects, size.classes, size.keypoints, HEIGHT, WIDTH, vertices=12
        )
        split = replace(split, annotations=annotations)
    dataset = DetectionDataset(
        split.annotations,
        split.images,
        LabelMap.contiguous(split.annotations.categories),
        transforms=build_transforms("hflip"),
        needs_masks=masks,
        needs_keypoints=size.keypoints > 0,
        flip_order=np.arange(size.keypoints),
    )
    counter = iter(range(1_000_000))

    def run():
        epoch = next(counter)
        unpack(collate_fn([dataset[epoch, 0], dataset[epoch, size.pictures // 2]]), CPU)

    return run


def masks(folder, size):
    return batch(folder, size, masks=True)


def step(folder, size):
    torch.manual_seed(0)
    spec = ModelSpec("retinanet_resnet50_fpn", size.classes + 1, min_size=(160,), max_size=224)
    model = build_model(spec).train()
    use_batched_step(model)
    drawn = draw_batch("box", 2, (160, 213), objects=size.objects, num_classes=size.classes + 1)

    def run():
        add_gradients(model, *drawn, StepOptions(), weight=1.0, is_update=True)
        model.zero_grad()

    run()  # the first one warms up
    return run


def same_pictures(folder, size):
    rng, number = np.random.default_rng(0), size.pictures
    thumbnails = rng.integers(0, 256, (number, HASH_SIDE, HASH_SIDE + 1), dtype=np.uint8)
    prints = Fingerprints(
        np.arange(number),
        [str(n) for n in range(number)],
        thumbnails,
        np.ones(number, dtype=np.int64),
        ["RGB"] * number,
        np.tile(np.array([0, 255], dtype=np.uint8), (number, 1)),
    )
    return lambda: sum(1 for _ in find_equal_pairs(prints))


def scoring(folder, size):
    split = read(folder, size)
    positions = range(
        *((dist.get_rank(), size.pictures, size.processes) if dist.is_initialized() else (size.pictures,))
    )
    found = [(int(split.annotations.image_ids[i]), detections_of(split.annotations, i, size)) for i in positions]

    def run():
        evaluator = new_evaluator(split, size)
        for image_id, detections in found:
            evaluator.add(image_id, detections)
        return evaluator.compute()

    return run


def report(folder, size):
    split = read(folder, size)
    annotations, evaluator = split.annotations, new_evaluator(split, size)
    sizes = dict.fromkeys(annotations.image_ids.tolist(), (HEIGHT, WIDTH))
    writer = PredictionWriter(folder / "run", iou_types(size), sizes)
    for i, image_id in enumerate(sizes):
        detections = detections_of(annotations, i, size)
        evaluator.add(image_id, detections)
        writer.add([image_id], [detections])
    writer.close()
    result = evaluator.compute()

    def run():
        evaluation = Evaluation(result, build_analysis(result), metric_intervals(result))
        publish(folder / "run", evaluator, evaluation, split, 0, folder / "run")

    return run


PARTS = {
    "first start": first_start,
    "next start": next_start,
    "epoch order": epoch_order,
    "batch": batch,
    "masks": masks,
    "step": step,
    "same pictures": same_pictures,
    "scoring": scoring,
    "report": report,
}


def run_cell(folder, part, size, rank):
    """Measure one part in this process, and print CPU seconds and megabytes as json."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if size.processes > 1:
        store = f"file://{folder}/store_{part.replace(' ', '_')}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size.processes)
    run = PARTS[part](folder, size)
    with Measured() as measured:
        run()
    seconds, times = measured.cpu, 1
    while seconds < LEAST_SECONDS and size.processes == 1:
        start = cpu_seconds()
        run()
        seconds, times = seconds + cpu_seconds() - start, times + 1
    print(json.dumps({"seconds": seconds / times, "mb": measured.mb}), flush=True)
    if size.processes > 1:
        dist.barrier()


def measure(folder, part, size):
    """Return the CPU seconds and megabytes of a part, of the process that has most."""
    command = [sys.executable, __file__, "--cell", str(folder), part, json.dumps(asdict(size))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, text=True)
        for rank in range(size.processes)
    ]
    texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{part}, {size}: {[process.returncode for process in processes]}")
    figures = [json.loads(text.splitlines()[-1]) for text in texts]
    return max(f["seconds"] for f in figures), max(f["mb"] for f in figures)


def format_row(axis, part, sizes, figures):
    """Return a row of the table: costs, how they grow at the end, and where they begin to."""
    seconds, mb = zip(*figures)
    power = knee = ""
    if len(sizes) > 1:
        power = f"{math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"
        knee = next((f"{size:,}" for size, cost in zip(sizes, seconds) if cost >= 2 * seconds[0]), "none")
    costs = ", ".join(f"{size:,}: {cost * 1e3:,.{1 if cost < 1 else 0}f}" for size, cost in zip(sizes, seconds))
    return {
        "grows": axis,
        "part": part,
        "CPU ms at each size": costs,
        "power": power,
        "knee": knee,
        "MB at the smallest and largest": f"{mb[0]:.0f}, {mb[-1]:.0f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help="in quotes")
    parser.add_argument("--most", type=int, default=10**9, help="leave out larger sizes")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        folder, part, size, rank = args.cell
        run_cell(Path(folder), part, Size(**json.loads(size)), int(rank))
        return
    figures = {}
    for axis in args.axes:
        sizes, base, parts = AXES[axis]
        for value in (size for size in sizes if size <= args.most):
            size = replace(base, **{axis: value})
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder), size)
                for part in (part for part in parts if part in args.parts):
                    if value > MOST.get(part, value):
                        continue
                    figures.setdefault((axis, part), {})[value] = measure(Path(folder), part, size)
                    seconds, mb = figures[axis, part][value]
                    print(f"{axis} {value:,}, {part}: {seconds * 1e3:.1f} ms, {mb:.0f} MB", file=sys.stderr, flush=True)
    rows = [format_row(axis, part, list(found), list(found.values())) for (axis, part), found in figures.items()]
    print(f"{machine()}\n\n{table(rows, list(rows[0]))}")


if __name__ == "__main__":
    main()
