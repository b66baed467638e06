"""Does anything grow in a long run? Memory, open files, threads, shared memory, files of the run, seconds per update.

    python benchmarks/soak.py                                       # 2,000 updates and 20,000 pictures; 25 minutes of one core
    python benchmarks/soak.py --updates 300 --pictures 2000

Training has an evaluation, a report and checkpoints every 50 updates and two loading processes. Both are looked at from
outside, over all of their processes: training after each evaluation, prediction every second. The figures are medians of the second and of the last quarter of
the looks: the first quarter is start-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, machine, table
from PIL import Image

from coco_utils import write_coco
from loading.shapes_dataset import ShapeDrawer, shapes_annotations

COLUMNS = ("command", "figure", "second quarter", "last quarter", "ratio")


def write_pictures(root, num_train, num_val):
    """Write drawn shapes in COCO's layout."""
    for role, number in (("train", num_train), ("val", num_val)):
        annotations, drawer = shapes_annotations(role, number), ShapeDrawer(role)
        folder = root / f"{role}2017"
        folder.mkdir(parents=True)
        names = {i: f"{i}.jpg" for i in range(number)}
        for i, name in names.items():
            Image.fromarray(drawer.read(annotations, i)).save(folder / name, quality=90)
        (root / "annotations").mkdir(exist_ok=True)
        path = root / "annotations" / f"instances_{role}2017.json"
        write_coco(annotations.with_file_names(names), path, np.arange(number))


def processes_below(pid):
    """Return a process and all that it has started, by number."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


def look(pid, folder):
    """Return what a run holds now, over all of its processes; those that end meanwhile are left out."""
    figures = dict.fromkeys(("memory, MB", "shared memory, MB", "open files", "threads", "processes"), 0)
    for process in processes_below(pid):
        proc = Path(f"/proc/{process}")
        try:
            rollup = dict(line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            figures["memory, MB"] += int(rollup["Pss"].split()[0]) / 1024
            figures["shared memory, MB"] += int(status["RssShmem"].split()[0]) / 1024
            figures["open files"] += sum(1 for _ in (proc / "fd").iterdir())
            figures["threads"] += int(status["Threads"])
            figures["processes"] += 1
        except (OSError, KeyError):
            continue
    figures["files of the run"] = sum(1 for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return figures


def start(script, flags, log):
    """Start a command of the suite."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], stdout=log, stderr=log, env=env)


def watch(process, folder, ticks, log):
    """Return a look at a process after each tick, until it ends."""
    looks, seen = [], 0
    while process.poll() is None:
        time.sleep(0.1)
        if (now := ticks()) > seen:
            seen = now
            looks.append(look(process.pid, folder))
    if process.returncode:
        raise RuntimeError(f"it ended with {process.returncode}:\n{Path(log.name).read_text()[-3000:]}")
    return [figures for figures in looks if figures["processes"]]


def quarters(command, looks):
    """Return the rows of a table: medians of the second and of the last quarter."""
    size = max(1, len(looks) // 4)
    rows = []
    for name in looks[0]:
        early, late = (
            statistics.median(figures[name] for figures in part) for part in (looks[size : 2 * size], looks[-size:])
        )
        ratio = late / early if early else 1.0
        rows.append({"command": command, "figure": name, "second quarter": early, "last quarter": late, "ratio": ratio})
    return rows


def train(root, run_dir, epochs, every):
    """Train with an evaluation every so many updates, and watch; returns rows of the table."""
    flags = ["--data-path", root, "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu", "--workers", 2]
    flags += ["--batch-size", 2, "--epochs", epochs, "--lr", 0.001, "--warmup-iters", 20, "--checkpoint-every", every]
    flags += ["--keep-negatives", "--keep-checkpoints", 2, "--output-dir", run_dir, "--cache-dir", root / "cache"]
    flags += ["--aspect-ratio-group-factor", -1]
    metrics = run_dir / "metrics.jsonl"

    def evaluations():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    with (root / "train.log").open("w") as log:
        looks = watch(start("train.py", flags, log), run_dir, evaluations, log)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for figures, line in zip(looks, lines):
        figures["s per update"] = line["train"]["seconds"] / every
    return quarters("train.py", looks[: len(lines)])


def predict(root, checkpoint, num_pictures):
    """Predict pictures that are links to a few, and watch; returns rows of the table."""
    folder, output_dir = root / "many", root / "found"
    folder.mkdir()
    pictures = sorted((root / "val2017").iterdir())
    for n in range(num_pictures):
        os.link(pictures[n % len(pictures)], folder / f"{n:06d}.jpg")
    flags = [folder, "--checkpoint", checkpoint, "--output-dir", output_dir, "--device", "cpu", "--workers", 1]
    with (root / "predict.log").open("w") as log:
        looks = watch(start("predict.py", flags, log), output_dir, lambda: int(time.monotonic()), log)
    files = [figures.pop("files of the run") for figures in looks]
    first = next(n for n, number in enumerate(files) if number > 10)  # of start-up nothing is asked
    return quarters("predict.py", looks[first:])


def main(args):
    """Run both and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root, 2 * args.every, args.val_pictures)
        rows = train(root, root / "run", max(4, args.updates // args.every), args.every)
        rows += predict(root, root / "run" / "weights" / "best.pth", args.pictures)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    rows = [{name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows]
    print(f"{machine()}\n\n{table(rows, COLUMNS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=20000, help="to predict")
    parser.add_argument("--every", type=int, default=50, help="updates from one evaluation to the next")
    parser.add_argument("--val-pictures", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    main(parser.parse_args())
