"""What --repeat-threshold does for a rare class: SSDlite on drawn shapes, one triangle on fifty other objects.

    python benchmarks/rare_class.py                 # three seeds, with and without; 15 minutes of one core
    python benchmarks/rare_class.py --seeds 1 --epochs 16

Each seed chooses other pictures to train on. Both runs of a seed have the same pictures, first weights and rate, and about
the same number of updates: with repeats an epoch is longer, so there are fewer. The pictures to score have as many triangles
as discs and squares.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, cpu_seconds, machine, table
from PIL import Image

from coco_utils import write_coco
from loading.shapes_dataset import CATEGORIES, ShapeDrawer, shapes_annotations

RARE = "triangle"
COLUMNS = ("seed", "threshold", "epochs", "samples", "AP rare", "AP50 rare", "AP others", "AP50 others", "CPU s")


def choose(annotations, num_pictures, ratio, rng):
    """Return pictures of which one object in ``ratio`` others is rare, each on a picture of its own; int64, sorted."""
    rare = 1 + CATEGORIES.index(RARE)
    image_of = annotations.object_images()
    of_rare = np.bincount(image_of[annotations.category_ids == rare], minlength=len(annotations))
    of_others = np.bincount(image_of[annotations.category_ids != rare], minlength=len(annotations))
    without, single = (rng.permutation(np.flatnonzero((of_rare == n) & (of_others > 0))) for n in (0, 1))
    number = 1
    while number * ratio < of_others[single[:number]].sum() + of_others[without[: num_pictures - number]].sum():
        number += 1
    return np.sort(np.concatenate([single[:number], without[: num_pictures - number]]))


def write_split(root, role, annotations, indices):
    """Write pictures and their annotations in COCO's layout."""
    folder = root / f"{role}2017"
    folder.mkdir(parents=True)
    drawer = ShapeDrawer(role)
    names = {int(i): f"{i}.png" for i in range(len(annotations))}
    for i in indices.tolist():
        Image.fromarray(drawer.read(annotations, i)).save(folder / names[i])
    (root / "annotations").mkdir(exist_ok=True)
    write_coco(annotations.with_file_names(names), root / "annotations" / f"instances_{role}2017.json", indices)


def train(root, output_dir, seed, epochs, threshold):
    """Train and score; returns a row of the table."""
    before = cpu_seconds()
    flags = ["--data-path", root, "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu", "--keep-negatives"]
    flags += ["--batch-size", 4, "--workers", 0, "--channels-last", "--opt", "adamw", "--lr", 0.002]
    flags += ["--lr-scheduler", "cosineannealinglr", "--warmup-iters", 40, "--eval-every", epochs, "--epochs", epochs]
    flags += ["--no-save-predictions", "--seed", seed, "--output-dir", output_dir, "--cache-dir", root / "cache"]
    flags += [] if threshold is None else ["--repeat-threshold", threshold]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *flags]
    done = subprocess.run([str(part) for part in command], env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
    (plan,) = (line for line in done.stdout.splitlines() if line.startswith("  batches"))
    updates = int(plan.split(" updates per epoch, ")[1].split()[0])
    with (output_dir / "eval" / "classes_bbox.csv").open() as file:
        scores = {row["class"]: row for row in csv.DictReader(file)}
    row = {"seed": seed, "threshold": threshold or "none", "epochs": epochs, "samples": 4 * updates}
    for figure in ("AP", "AP50"):
        row[f"{figure} rare"] = float(scores[RARE][figure])
        row[f"{figure} others"] = np.mean([float(scores[name][figure]) for name in CATEGORIES if name != RARE])
    return {**row, "CPU s": cpu_seconds() - before}


def draw(root, seed, num_pictures, ratio):
    """Write the pictures of a seed; returns the share of them that shows the rare class."""
    annotations = shapes_annotations("train", 4 * num_pictures + 400)
    chosen = choose(annotations, num_pictures, ratio, np.random.default_rng(seed))
    write_split(root, "train", annotations, chosen)
    val = shapes_annotations("val", 80)
    write_split(root, "val", val, np.arange(len(val)))
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    ids = [record["category_id"] for record in content["annotations"]]
    num_rare = ids.count(1 + CATEGORIES.index(RARE))
    print(
        f"seed {seed}: {num_pictures} pictures, {num_rare} {RARE}s to {len(ids) - num_rare} other objects", flush=True
    )
    return num_rare / num_pictures


def main(args):
    """Train all runs and print the table."""
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            share = draw(root, seed, args.pictures, args.ratio)
            longer = 1 + share * (max(1, (args.threshold / share) ** 0.5) - 1)
            for threshold in (None, args.threshold):
                epochs = args.epochs if threshold is None else round(args.epochs / longer)
                rows.append(train(root, root / f"run-{threshold}", seed, epochs, threshold))
                print(table([shown(rows[-1])], COLUMNS).splitlines()[-1], flush=True)
    for threshold in ("none", args.threshold):
        of_kind = [row for row in rows if row["threshold"] == threshold]
        rows.append(
            {**{c: np.mean([row[c] for row in of_kind]) for c in COLUMNS[2:]}, "seed": "mean", "threshold": threshold}
        )
    print(f"{machine()}\n\n{table([shown(row) for row in rows], COLUMNS)}")


def shown(row):
    """Return a row with rounded figures."""
    digits = {"epochs": 0, "samples": 0, "CPU s": 0}
    return {
        name: v if isinstance(v, str) else f"{v:.{digits.get(name, 3)}f}" if isinstance(v, float) else v
        for name, v in row.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--ratio", type=int, default=50, help="other objects on each rare one")
    parser.add_argument("--threshold", type=float, default=0.5)
    main(parser.parse_args())
