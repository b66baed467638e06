"""Start-up and memory: annotations of COCO's size from their files and from the cache, and of Objects365's from the cache.

    python benchmarks/startup.py                  # about ten minutes; needs 4 GB of disk and 6 GB of memory
    python benchmarks/startup.py --images 10000   # a quick look

Every figure comes from a process of its own. "private" is memory that only one process holds, on top of the same
process without annotations. A worker's figure is after it has read the annotations of every image, in workers of a
DataLoader; pycocotools' dicts are touched in the same way.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import Measured, in_fresh_process, machine, private_mb, table  # isort: skip
import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from synthetic import CATEGORIES, coco_size_json
from torch.utils.data import DataLoader, Dataset, get_worker_info

from annotations.arrays import Annotations, cached_annotations, join_bytes, load_annotations, save_annotations
from coco_utils import read_coco
from group_by_aspect_ratio import GroupedBatchSampler
from loading.splits import CocoPaths, load_coco_split
from loading.voc_dataset import load_voc_split
from loading.yolo_dataset import load_yolo_split

WORKERS = 4


# Splits of the formats, from the folder that `write_formats` fills.
FORMATS = {
    "YOLO txt": lambda root, cache: load_yolo_split(root / "data.yaml", "train", cache_dir=cache),
    "COCO json": lambda root, cache: load_coco_split(
        CocoPaths(root / "images/train", root / "a.json"), cache_dir=cache
    ),
    "VOC xml": lambda root, cache: load_voc_split(root, "train", cache_dir=cache),
}


class Touched(Dataset):
    """Item i reads everything about every ``WORKERS``-th image and tells what memory the worker then holds."""

    def __init__(self, content, touch, num_images):
        self.content, self.touch, self.num_images = content, touch, num_images

    def __len__(self):
        return WORKERS

    def __getitem__(self, _):
        before = private_mb()
        total = sum(self.touch(self.content, i) for i in range(self.num_images)) if self.touch else 0
        time.sleep(1)  # so that every worker takes one item
        return get_worker_info().id, before, private_mb(), total


def touch_arrays(annotations, i):
    objects = annotations.objects(i)
    numbers = annotations.boxes_xywh[objects].sum() + annotations.category_ids[objects].sum()
    return numbers + sum(p.sum() for n in range(objects.start, objects.stop) for p in annotations.polygons(n))


def touch_dicts(coco, i):
    records = coco.imgToAnns[i + 1]
    return sum(sum(r["bbox"]) + r["category_id"] + sum(sum(p) for p in r["segmentation"]) for r in records)


def worker_memory(content, touch, num_images, method):
    """Largest private memory in MB of a worker after touching everything, less that of one without annotations."""
    found = []
    for data, function in ((None, None), (content, touch)):
        options = {"num_workers": WORKERS, "multiprocessing_context": method, "collate_fn": list}
        loader = DataLoader(Touched(data, function, num_images), batch_size=1, **options)
        found.append(max(memory for batch in loader for _, _, memory, _ in batch))
    return found[1] - found[0]


def load(way, path, cache):
    if way == "json.load alone":
        return json.loads(Path(path).read_text())
    if way == "COCO()":
        return COCO(path)
    if way in FORMATS:  # with all that a run does: pictures are looked for, and compared with their annotations
        return FORMATS[way](Path(path), Path(cache)).annotations
    return cached_annotations(Path(path), lambda: read_coco(Path(path), uses=("segm",)), Path(cache))


def run_way(way, path, cache, method):
    """Load in this process, then start workers; returns the figures."""
    torch.set_num_threads(1)
    before = private_mb()
    with Measured() as measured:
        content = load(way, path, cache)
        if isinstance(content, Annotations):  # what a run does before its first batch
            sampler = GroupedBatchSampler(content.heights, content.widths, group_factor=3, batch_size=2, seed=0)
            sampler.epoch_batches(0)
    figures = {"wall": measured.wall, "cpu": measured.cpu, "peak": measured.mb, "private": private_mb() - before}
    if method != "none":
        touch = touch_dicts if way == "COCO()" else touch_arrays
        num_images = len(content.imgs) if way == "COCO()" else len(content)
        figures["worker"] = worker_memory(content, touch, num_images, method)
    return figures


def objects365_arrays(images=1_700_000, objects=25_000_000):
    """Boxes of Objects365's size as flat arrays; no masks, as in Objects365."""
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(300, 1000, images, dtype=np.int32), rng.integers(300, 1400, images, dtype=np.int32)
    starts = np.zeros(images + 1, dtype=np.int64)
    starts[1:] = np.sort(rng.integers(0, objects + 1, images))
    starts[-1] = objects
    boxes = rng.uniform(0, 300, (objects, 4))
    name_bytes, name_starts = join_bytes([b"patch0/objects365_%08d.jpg" % i for i in range(images)])
    nothing = np.zeros(objects + 1, dtype=np.int64)
    return Annotations(
        image_ids=np.arange(images),
        heights=heights,
        widths=widths,
        name_bytes=name_bytes,
        name_starts=name_starts,
        object_starts=starts,
        boxes_xywh=boxes,
        category_ids=rng.integers(1, 366, objects),
        areas=boxes[:, 2] * boxes[:, 3],
        is_crowd=np.zeros(objects, dtype=bool),
        keypoints=np.zeros((objects, 0, 3)),
        polygon_points=np.zeros(0),
        polygon_starts=np.zeros(1, dtype=np.int64),
        object_polygons=nothing,
        rle_bytes=np.zeros(0, dtype=np.uint8),
        rle_starts=nothing,
        categories=tuple((c["id"], c["name"]) for c in CATEGORIES),
    )


def written_mb():
    """Memory that this process has written to: pages of a mapped file that were only read can be dropped at any time."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def run_objects365(path):
    """Map the cache, order an epoch, look at every box; print the figures as json."""
    torch.set_num_threads(1)
    before = written_mb()
    with Measured() as start:
        annotations = load_annotations(path)
    with Measured() as order:
        sampler = GroupedBatchSampler(annotations.heights, annotations.widths, group_factor=3, batch_size=16, seed=0)
        sampler.epoch_batches(0)
    for i in range(0, len(annotations), 100):
        touch_arrays(annotations, i)
    gc.collect()
    print(json.dumps({"start": start.wall, "order": order.wall, "private": written_mb() - before}))


def compare_coco_size(folder, images):
    path = folder / "instances_train2017.json"
    coco_size_json(path, images)
    os.sync()  # else the first start waits for the disk to take the json
    size = f"{images} images, {path.stat().st_size / 1e6:.0f} MB json"
    rows = []
    cases = [
        ("json.load alone", "json.load alone", "none"),
        ("COCO()", "COCO(), forked workers", "fork"),
        ("this suite", "this suite, first start", "none"),
        ("this suite", "this suite, second start, forked workers", "fork"),
        ("this suite", "this suite, second start, spawned workers", "spawn"),
    ]
    for way, label, method in cases:
        figures = in_fresh_process(__file__, "--way", way, path, folder / "cache", method)
        rows.append(
            {
                size: label,
                "s": f"{figures['wall']:.2f}",
                "CPU s": f"{figures['cpu']:.2f}",
                "peak MB": f"{figures['peak']:.0f}",
                "private MB": f"{figures['private']:.0f}",
                "private MB per worker": f"{figures['worker']:.1f}" if "worker" in figures else "",
            }
        )
        print(rows[-1], file=sys.stderr)
    print(table(rows, list(rows[0])))


def write_formats(root, images, objects=7):
    """Write the same boxes as one COCO json, as YOLO's txt files and as VOC's xml files; pictures are links to a few."""
    rng = np.random.default_rng(0)
    height, width = 48, 64
    for folder in ("images/train", "labels/train", "Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for k in range(images // 25_000 + 1):  # a file can have 65,000 links
        Image.new("RGB", (width, height), (40 * k, 90, 90)).save(root / f"{k}.jpg")
    records, annotations, stems = [], [], [f"{i:012d}" for i in range(images)]
    for i, stem in enumerate(stems):
        for folder in ("images/train", "JPEGImages"):
            (root / folder / f"{stem}.jpg").hardlink_to(root / f"{i // 25_000}.jpg")
        corners = np.sort(rng.integers(0, (width, height), (objects, 2, 2)), axis=1) + [[0, 0], [1, 1]]
        boxes, labels = corners.reshape(objects, 4).tolist(), rng.integers(80, size=objects).tolist()
        rows, xml = [], [f"<size><width>{width}</width><height>{height}</height></size>"]
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            rows.append(f"{label} " + " ".join(f"{share:.6f}" for share in shares))
            corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            name = f"<name>{CATEGORIES[label]['name']}</name><difficult>0</difficult>"
            xml.append(f"<object>{name}<bndbox>{corners}</bndbox></object>")
            record = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1}
            annotations.append(record | {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0})
        (root / "labels/train" / f"{stem}.txt").write_text("\n".join(rows))
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(xml)}</annotation>")
        records.append({"id": i + 1, "file_name": f"{stem}.jpg", "height": height, "width": width})
    (root / "ImageSets/Main/train.txt").write_text("\n".join(stems))
    names = json.dumps([category["name"] for category in CATEGORIES])
    (root / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames: {names}\n")
    (root / "a.json").write_text(json.dumps({"images": records, "annotations": annotations, "categories": CATEGORIES}))


def compare_formats(folder, images):
    write_formats(folder / "formats", images)
    os.sync()
    rows = []
    for way in FORMATS:
        for start in ("first start", "second start"):
            figures = in_fresh_process(__file__, "--way", way, folder / "formats", folder / "cache", "none")
            row = {f"{images} pictures, 7 boxes each": f"{way}, {start}"}
            row |= {
                "s": f"{figures['wall']:.2f}",
                "CPU s": f"{figures['cpu']:.2f}",
                "peak MB": f"{figures['peak']:.0f}",
            }
            rows.append(row | {"private MB": f"{figures['private']:.0f}"})
            print(rows[-1], file=sys.stderr)
    print("\n" + table(rows, list(rows[0])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--skip-objects365", action="store_true")
    parser.add_argument("--only-formats", action="store_true", help="only COCO, YOLO and VOC files beside each other")
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--objects365", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints while it loads
            figures = run_way(*args.way)
        print(json.dumps(figures))
        return
    if args.objects365:
        run_objects365(args.objects365)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        compare_formats(Path(folder), args.images)
        if args.only_formats:
            return
        compare_coco_size(Path(folder), args.images)
        if not args.skip_objects365:
            path = Path(folder) / "objects365.annotations"
            annotations = objects365_arrays()
            save_annotations(annotations, path)
            del annotations
            figures = in_fresh_process(__file__, "--objects365", path)
            row = {
                "1.7 M images, 25 M boxes": f"cache file of {path.stat().st_size / 1e9:.1f} GB",
                "cached start s": f"{figures['start']:.3f}",
                "epoch order and groups s": f"{figures['order']:.2f}",
                "private MB after reading boxes": f"{figures['private']:.0f}",
            }
            print("\n" + table([row], list(row)))


if __name__ == "__main__":
    sys.exit(main())
