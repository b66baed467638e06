"""Long thin objects with a model's own anchors and with those that the doctor suggests: AP of three seeds each.

    python benchmarks/long_objects.py     # about fifteen minutes of one core

Drawn bars of 1:8 to 1:12, half of them upright. SSDlite is trained from random weights, which other models do not learn
anything from in so short a time.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import ROOT, machine, table  # isort: skip
import numpy as np
from PIL import Image, ImageDraw

MODEL = "ssdlite320_mobilenet_v3_large"
SIDE = 160


def draw_bars(folder, role, count, seed):
    """Draw pictures of one to four bars that do not touch, and write their COCO file."""
    rng = np.random.default_rng(seed)
    images, objects = [], []
    (folder / role).mkdir(parents=True)
    for n in range(count):
        level = rng.uniform(20, 110, (2, 1, 3))
        ramp = np.linspace(0, 1, SIDE)[:, None, None]
        canvas = Image.fromarray(
            np.broadcast_to(level[0] * (1 - ramp) + level[1] * ramp, (SIDE, SIDE, 3)).astype(np.uint8)
        )
        draw = ImageDraw.Draw(canvas)
        taken = []
        for _ in range(int(rng.integers(1, 5))):
            long = rng.uniform(60, 150)
            w, h = (long, long / rng.uniform(8, 12))[:: 1 if rng.random() < 0.5 else -1]
            x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
            if any(x < a + c + 4 and a < x + w + 4 and y < b + d + 4 and b < y + h + 4 for a, b, c, d in taken):
                continue
            taken.append((x, y, w, h))
            draw.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(140, 256, 3).tolist()))
            objects.append({"id": len(objects) + 1, "image_id": n + 1, "category_id": 1, "bbox": [x, y, w, h]})
        name = f"{n:04d}.png"
        noise = rng.integers(-12, 13, (SIDE, SIDE, 1))
        Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)).save(folder / role / name)
        images.append({"id": n + 1, "file_name": name, "height": SIDE, "width": SIDE})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "bar"}]}
    (folder / f"{role}.json").write_text(json.dumps(content))


def run(script, *flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} {flags}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", default="runs/long_objects", help="for data and runs; what is there is taken"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    folder = Path(args.folder)
    if not folder.exists():
        draw_bars(folder, "train", 240, 0)
        draw_bars(folder, "val", 60, 1)
    data = ["--dataset", "coco", "--model", MODEL]
    for role in ("train", "val"):
        data += [f"--{role}-images", folder / role, f"--{role}-annotations", folder / f"{role}.json"]
    report = run("check_dataset.py", *data, "--no-images")
    suggested = re.search(r"^ {6,}(--anchor-.*)$", report, flags=re.M)[1]
    print(" ".join(line.strip() for line in report.splitlines() if "anchors" in line or "a place" in line))
    recipe = ["--device", "cpu", "--workers", 0, "--batch-size", 4, "--channels-last", "--opt", "adamw", "--lr", 0.002]
    recipe += ["--lr-scheduler", "cosineannealinglr", "--warmup-iters", 40, "--epochs", args.epochs, "--eval-every", 0]
    rows = []
    for seed in range(args.seeds):
        for name, flags in (("the model's own", ""), (suggested, suggested)):
            out = folder / f"seed{seed}{'-suggested' if flags else ''}"
            if not (out / "test" / "metrics.jsonl").exists():
                run("train.py", *data, *recipe, "--seed", seed, "--output-dir", out, *shlex.split(flags))
                checkpoint = out / "weights" / "checkpoint.pth"
                run(
                    "train.py",
                    *data,
                    "--device",
                    "cpu",
                    "--workers",
                    0,
                    "--test-only",
                    "--resume",
                    checkpoint,
                    "--output-dir",
                    out / "test",
                )
            found = json.loads((out / "test" / "metrics.jsonl").read_text().splitlines()[-1])["bbox"]
            rows.append({"seed": seed, "anchors": name, **{k: f"{found[k]:.3f}" for k in ("AP", "AP50", "AP75", "AR")}})
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
