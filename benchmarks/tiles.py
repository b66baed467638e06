"""What tiles gain and cost on large pictures with small objects: AP, and seconds per megapixel.

    python benchmarks/tiles.py ../shared/data/glue_tubes     # half an hour of one core, most of it training

The folder has photographs in the custom format. SSDlite is trained on its ``train`` from random weights. Its ``test``
is put together to mosaics of 4 x 4 photographs, each squeezed to a square as SSDlite does with every picture, so that in
a tile of a cell's size the objects look as in training, and in the whole mosaic a quarter as large.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, machine, table  # isort: skip
import numpy as np
from PIL import Image, ImageOps

from inference.detector import Detector

CELLS, SIDE = 4, 480
RECIPE = ["--opt", "adamw", "--lr", 0.002, "--lr-scheduler", "cosineannealinglr", "--warmup-iters", 30]
RECIPE += ["--batch-size", 8, "--data-augmentation", "ssdlite", "--eval-every", 8]


def make_mosaics(source, out, count):
    """Write mosaics of the photographs in ``source``, in the custom format."""
    for name in ("images", "annotations"):
        (out / name).mkdir(parents=True)
    photographs = sorted((source / "images").iterdir())
    for n in range(count):
        canvas, boxes = Image.new("RGB", (CELLS * SIDE, CELLS * SIDE)), []
        for cell, k in enumerate(np.random.default_rng(n).permutation(len(photographs))[: CELLS**2]):
            with Image.open(photographs[k]) as stored:
                picture = ImageOps.exif_transpose(stored).convert("RGB")
            offset = np.array([cell % CELLS, cell // CELLS]) * SIDE
            canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), tuple(offset.tolist()))
            objects = json.loads((source / "annotations" / f"{photographs[k].stem}.json").read_text())
            scale = np.array([SIDE / picture.width, SIDE / picture.height])
            boxes += (np.array(objects["bboxes"]) * np.tile(scale, 2) + np.tile(offset, 2)).round(2).tolist()
        canvas.save(out / "images" / f"{n}.png")
        (out / "annotations" / f"{n}.json").write_text(json.dumps({"bboxes": boxes}))


def train(*flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", "--dataset", "custom", "--device", "cpu", "--workers", 0, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")


def score(data, checkpoint, out, *flags):
    """Return AP and the like from ``train.py --test-only``."""
    train("--data-path", data, "--test-only", "--resume", checkpoint, "--output-dir", out, *flags)
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["bbox"]


def seconds_per_megapixel(checkpoint, paths, **options):
    """Return CPU seconds of loading and looking at pictures, per million of their pixels."""
    detector = Detector.load(checkpoint, device="cpu", **options)
    detector(paths[0])
    before, pixels = time.process_time(), 0
    for path in paths:
        height, width = detector(path).size
        pixels += height * width
    return (time.process_time() - before) / pixels * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="a folder in the custom format")
    parser.add_argument("folder", nargs="?", default="runs/tiles", help="for data and runs; what is there is taken")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--mosaics", type=int, default=6)
    args = parser.parse_args()
    print(machine())
    folder, photographs = Path(args.folder), Path(args.photographs)
    data, checkpoint = folder / "photographs", folder / "run" / "weights" / "best.pth"
    if not data.exists():
        shutil.copytree(photographs, data)
        make_mosaics(photographs / "test", folder / "mosaics" / "test", args.mosaics)
    if not checkpoint.exists():
        flags = ["--model", "ssdlite320_mobilenet_v3_large", *RECIPE, "--epochs", args.epochs]
        train("--data-path", data, *flags, "--output-dir", folder / "run")
    cases = [("the photographs themselves", data, {})]
    cases += [("mosaics, whole", folder / "mosaics", {})]
    for tile, overlap in ((SIDE, 0.2), (SIDE, 0.4), (2 * SIDE, 0.2)):
        cases.append(
            (f"mosaics, --tile {tile} --overlap {overlap}", folder / "mosaics", {"tile": tile, "overlap": overlap})
        )
    rows = []
    for n, (name, root, options) in enumerate(cases):
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        found = score(root, checkpoint, folder / f"score{n}", *flags)
        paths = sorted((root / "test" / "images").iterdir())
        cost = seconds_per_megapixel(checkpoint, paths, **options)
        figures = {key: "" if found[key] is None else f"{found[key]:.3f}" for key in ("AP", "AP50", "AP75", "AR")}
        rows.append({"pictures": name, **figures, "CPU s per megapixel": f"{cost:.3f}"})
        print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(folder / f"score{n}")
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
