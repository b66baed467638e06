"""The engine's training step beside a bare loop over the same batches: CPU time, and waits for the device.

    python benchmarks/loop.py [--steps 8] [--rounds 5] [--models ...]

The bare loop is forward, sum, backward, step, zero_grad and nothing else; torchvision's scripts add a reduced loss that
is read every step, and one read per logged loss. The same batches are in memory, so no loader is in any figure. Rounds
alternate; the ratio is the median over rounds. What the engine adds per step is measured once more with a model that
costs nothing, where it is not hidden in the noise of the model.
"""

import argparse
import logging
import statistics
import time

import numpy as np
import torch
from common import machine, table
from torch import nn

from benchmarks.waits import count_waits
from engine import train_one_epoch
from group_by_aspect_ratio import GroupedBatchSampler
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from optimization.optimizer import build_optimizer
from optimization.schedule import LearningRate
from optimization.step import StepOptions
from runtime.progress import Progress
from runtime.signals import StopRequest

CPU = torch.device("cpu")
DEFAULT_MODELS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")


class MemoryLoader:
    """The same few batches, from memory, in the order of a sampler."""

    def __init__(self, batches, steps):
        self.batches, self.device = batches, CPU
        sizes = np.full(steps * len(batches[0][0]), 64)
        self.batch_sampler = GroupedBatchSampler(sizes, sizes, group_factor=-1, batch_size=len(batches[0][0]), seed=0)

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for step in range(len(self)):
            yield self.batches[step % len(self.batches)]


class Nothing(nn.Module):
    """A detector that costs nothing, with Faster R-CNN's loss terms."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images, targets):
        return {name: self.weight.sum() for name in ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn")}


def make_batches(number, batch_size, size):
    rng = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(number):
        images = [torch.rand((3, *size), generator=rng) for _ in range(batch_size)]
        targets = []
        for i in range(batch_size):
            corners = torch.rand((7, 2, 2), generator=rng).sort(dim=1).values * torch.tensor(size[::-1])
            boxes = corners.reshape(7, 4)
            boxes[:, 2:] += 2
            targets.append({"image_id": i, "boxes": boxes, "labels": torch.randint(1, 91, (7,), generator=rng)})
        batches.append((images, targets))
    return batches


def bare_loop(model, optimizer, loader):
    model.train()
    for images, targets in loader:
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def logging_loop(model, optimizer, loader):
    """What torchvision's scripts do for their log: the sum and every term are read in every step."""
    model.train()
    for images, targets in loader:
        losses = model(images, targets)
        loss = sum(losses.values())
        if not np.isfinite(sum(value.detach() for value in losses.values()).item()):
            raise FloatingPointError
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for value in losses.values():
            value.detach().item()


def engine_loop(model, optimizer, loader, print_freq=10**9):
    train_one_epoch(
        model,
        optimizer,
        loader,
        progress=Progress(),
        learning_rate=LearningRate(1e-4, 1),
        options=StepOptions(print_freq=print_freq),
        stop=StopRequest(),
    )


LOOPS = {"bare": bare_loop, "engine": engine_loop, "reads every loss": logging_loop}


def measure(model, loader, rounds):
    """Return CPU seconds per step of each loop, one list per loop, rounds interleaved."""
    seconds = {name: [] for name in LOOPS}
    for turn in range(rounds + 1):
        for name, loop in LOOPS.items():
            torch.manual_seed(0)
            optimizer = build_optimizer(model, "sgd", lr=1e-4, momentum=0.9, weight_decay=0)
            start = time.process_time()
            loop(model, optimizer, loader)
            if turn:  # the first round warms up
                seconds[name].append((time.process_time() - start) / len(loader))
    return seconds


def waits_per_step(loop, model, batches):
    """Return the waits that one more step brings: of 12 steps less those of 2, over 10."""
    counts = []
    for steps in (2, 12):
        optimizer = build_optimizer(model, "sgd", lr=0.0, momentum=0.9, weight_decay=0)
        loader = MemoryLoader(batches[:1], steps)
        torch.manual_seed(0)
        counts.append(count_waits(lambda o=optimizer, d=loader: loop(model, o, d)).total())
    return (counts[1] - counts[0]) / 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS, choices=ARCHITECTURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    rows = []
    for name in ("nothing", *args.models):
        if name == "nothing":
            model, size, steps = Nothing(), (8, 8), 2000
        else:
            sizes = {} if name.startswith("ssd") else {"min_size": (160,), "max_size": 224}
            model, size, steps = build_model(ModelSpec(name, 91, **sizes)), (160, 213), args.steps
        batches = make_batches(2, 2, size)
        seconds = measure(model, MemoryLoader(batches, steps), args.rounds)
        row = {"model": name}
        for loop in LOOPS:
            row[f"{loop}, ms"] = f"{statistics.median(seconds[loop]) * 1e3:.3f}"
        ratios = [a / b for a, b in zip(seconds["engine"], seconds["bare"])]
        if name == "nothing":
            added = statistics.median(a - b for a, b in zip(seconds["engine"], seconds["bare"]))
            row["engine / bare"] = f"+{added * 1e6:.0f} us per step"
        else:
            row["engine / bare"] = f"{statistics.median(ratios):.4f} ({min(ratios):.3f}-{max(ratios):.3f})"
            row["engine's share"] = f"{added / statistics.median(seconds['bare']):.2%}"
        for loop in LOOPS:
            row[f"waits, {loop}"] = f"{waits_per_step(LOOPS[loop], model, batches):.1f}"
        rows.append(row)
        print(row, flush=True)
    print(f"\n{machine()}, batch 2\n")
    print(table(rows, list(rows[-1])))


if __name__ == "__main__":
    main()
