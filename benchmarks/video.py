"""Memory and time of predict.py on a long video: resident memory must not grow with its length.

    python benchmarks/video.py --frames 10000     # two minutes of one core

The clip is drawn, 160 x 120 pixels. A model that gives five boxes per frame stands in, so that what is measured is
reading, drawing, encoding and writing.
"""

import argparse
import json
import shutil
import time
from fractions import Fraction
from pathlib import Path
from unittest import mock

from common import machine, resident_mb, table  # isort: skip
import numpy as np
import torch

import predict
from annotations.labels import LabelMap
from annotations.skeleton import Skeleton
from inference.trained_model import TrainedModel
from inference.video import VideoWriter
from inference.video_results import VideoResults
from models.architectures import ModelSpec

WIDTH, HEIGHT = 160, 120


class FiveBoxes(torch.nn.Module):
    """Finds five boxes anywhere."""

    score_thresh = 0.0

    def forward(self, images):
        corner = torch.tensor([[10.0, 10], [60, 20], [100, 70], [20, 60], [90, 10]])
        boxes = torch.cat([corner, corner + 35], dim=1)
        one = {"boxes": boxes, "labels": torch.ones(5, dtype=torch.int64), "scores": torch.linspace(0.9, 0.6, 5)}
        return [one for _ in images]


def stand_in(path):
    spec = ModelSpec("ssdlite320_mobilenet_v3_large", 2)
    return TrainedModel(
        FiveBoxes(), spec, LabelMap.from_plain({"label_categories": [1], "label_names": ["thing"]}), Skeleton((), ())
    )


def draw_clip(path, count):
    """Write a video in which a square wanders over noise."""
    noise = np.random.default_rng(0).integers(0, 120, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    with VideoWriter(path, Fraction(25)) as writer:
        for n in range(count):
            pixels = noise.copy()
            pixels[n % 80 : n % 80 + 30, n % 120 : n % 120 + 30] = 230
            writer.add(pixels, n / 25)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/video", help="new folder for the clip and the results")
    parser.add_argument("--frames", type=int, default=10_000)
    args = parser.parse_args()
    print(machine())
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    clip = folder / "clip.mp4"
    draw_clip(clip, args.frames)
    marks, started = [], time.perf_counter()
    add = VideoResults.add

    def watched(self, detector, path, report, **options):
        def report_and_measure(*values):
            report(*values)
            if (self.num_frames + 1) % (args.frames // 10) == 0:
                marks.append((self.num_frames + 1, resident_mb(), time.perf_counter() - started))

        add(self, detector, path, report_and_measure, **options)

    flags = ["--checkpoint", "none", clip, "--device", "cpu", "--workers", 0, "--output-dir", folder / "out"]
    with mock.patch.object(predict, "load_trained_model", stand_in), mock.patch.object(VideoResults, "add", watched):
        code = predict.run([*map(str, flags)])
    found = json.loads((folder / "out" / "images.json").read_text())
    assert code == 0 and len(found["frames"]) == args.frames == found["videos"][0]["num_frames"]
    rows = [{"frames": n, "resident MB": f"{mb:.0f}", "frames/s": f"{n / seconds:.0f}"} for n, mb, seconds in marks]
    print(table(rows, list(rows[0])))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
