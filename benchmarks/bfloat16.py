"""Does training in bfloat16 reach the AP of float32? FCOS and RetinaNet on drawn shapes, by the real command line, on a CPU.

    python benchmarks/bfloat16.py                  # two models, three seeds, both types
    python benchmarks/bfloat16.py --models fcos_resnet50_fpn --seeds 1 --epochs 2

Pictures are resized to 400 to 640 pixels: bfloat16 has steps of 2 pixels from 256 on and of 4 from 512 on, so that anchors
and boxes in it would be off. A small backbone and head of 32 channels, with the model's own strides, anchors, losses and
decoding, stand for the ResNet-50, which a CPU cannot train often enough. Both runs of a seed have the same first weights,
order and augmentation. Each AP has the 95 % interval of a bootstrap over the pictures; the difference of the two types has
the paired one of `compare.py`, and over the seeds Student's, of the mean of their differences.
"""

import argparse
import math
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from common import cpu_seconds, machine, table
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import train
from compare import compare_matches
from evaluation.eval_result import SavedMatches
from models import weights
from runtime import saved_model
from runtime.run_folder import NEWEST_EVAL

MODELS = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn")
WIDTH = 32
COLUMNS = ("model", "seed", "AP float32", "AP bfloat16", "difference", "AP50 float32", "AP50 bfloat16", "CPU s")
# Student's t at 97.5 % by the number of seeds; Abramowitz & Stegun, table 26.10.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def small_pyramid():
    """Return a backbone with strides of 8 to 128 and `WIDTH` channels each."""

    def stage(width_in, stride):
        convolution = nn.Conv2d(width_in, WIDTH, 5, stride, padding=2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(WIDTH), nn.ReLU())

    layers = OrderedDict(stem=stage(3, 4), layer2=stage(WIDTH, 2), layer3=stage(WIDTH, 2), layer4=stage(WIDTH, 2))
    names = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(nn.Sequential(layers), names, [WIDTH] * 3, WIDTH, LastLevelP6P7(WIDTH, WIDTH))


def build_small_model(spec):
    """Build the model of a record as `build_model` does, around `small_pyramid`."""
    sizes = {"min_size": spec.min_size, "max_size": spec.max_size, "_skip_resize": spec.skip_resize}
    if spec.name == "fcos_resnet50_fpn":
        return FCOS(small_pyramid(), spec.num_classes, **sizes)
    octaves = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 5)  # torchvision's retinanet.py, _default_anchorgen
    return RetinaNet(small_pyramid(), spec.num_classes, anchor_generator=anchors, **sizes)


def train_once(folder, model, seed, epochs, precision):
    """Train and score; returns the matches of the evaluation."""
    run_dir = folder / f"{model}-{seed}-{precision}"
    flags = ["--dataset", "shapes", "--model", model, "--device", "cpu", "--keep-negatives", "--workers", "0"]
    flags += ["--min-size", "400", "--max-size", "640", "--batch-size", "4", "--epochs", str(epochs)]
    flags += ["--opt", "adamw", "--lr", "0.001", "--lr-scheduler", "cosineannealinglr", "--warmup-iters", "60"]
    flags += ["--clip-grad-norm", "1", "--eval-every", str(epochs), "--seed", str(seed), "--output-dir", str(run_dir)]
    flags += ["--cache-dir", str(folder / "cache")]
    train.run(flags if precision == "float32" else [*flags, "--amp", "--amp-dtype", "bfloat16"])
    return SavedMatches.load(run_dir / NEWEST_EVAL / "matches_bbox.npz")


def mean_with_interval(values):
    """Return the mean and the 95 % interval of a mean by Student's t."""
    values = np.asarray(values)
    half = (
        STUDENT_T[len(values)] * values.std(ddof=1) / math.sqrt(len(values)) if len(values) in STUDENT_T else math.nan
    )
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def main(args):
    """Train all runs, print each row as it comes and the table at the end."""
    torch.set_num_threads(1)
    for module in (weights, saved_model):
        module.build_model = build_small_model
    rows, differences = [], {model: [] for model in args.models}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for model in args.models:
                before = cpu_seconds()
                first, second = (
                    train_once(Path(folder), model, seed, args.epochs, precision)
                    for precision in ("float32", "bfloat16")
                )
                figures, _ = compare_matches(first, second, 1000, 0)
                ap, ap50 = figures["AP"], figures["AP50"]
                row = {"model": model, "seed": seed, "AP float32": f"{ap.first:.3f}", "AP bfloat16": f"{ap.second:.3f}"}
                row["difference"] = f"{ap.second - ap.first:+.3f} [{ap.low:+.3f}, {ap.high:+.3f}]"
                row |= {"AP50 float32": f"{ap50.first:.3f}", "AP50 bfloat16": f"{ap50.second:.3f}"}
                row["CPU s"] = f"{cpu_seconds() - before:.0f}"
                rows.append(row)
                differences[model].append(ap.second - ap.first)
                print(row, flush=True)
    for model, values in differences.items():
        rows.append(
            {**dict.fromkeys(COLUMNS, ""), "model": model, "seed": "all", "difference": mean_with_interval(values)}
        )
    print(f"{machine()}\n\n{table(rows, COLUMNS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args())
