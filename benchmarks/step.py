"""One training step of each model, torchvision's own beside the batched one: what is issued, and what it costs.

    python benchmarks/step.py [--models ...] [--batch-sizes 2 16] [--rounds 5] [--objects 7] [--measure counts time beside memory]

Operations and waits for the device are counted on a CPU, see `waits.py`; they do not depend on the pictures' size, so
these are small; but for one wait more for each further part of a batch that nms takes, see `MOST_BOXES_OF_NMS`. CPU time is that of forward, backward and update; the two ways alternate, and the ratio is the median
of the rounds' own. "Beside" is the CPU time of one-stage models' forward and backward without backbone and head, the
same code in both ways and nearly all of a step, whose noise hides the rest. Memory is the most that torch's allocator has lent out in a forward and backward, by its profiler, on
top of weights and gradients.
"""

import argparse
import copy
import logging
import statistics
import time

from common import machine, table  # isort: skip
import torch

from benchmarks.synthetic import draw_batch
from benchmarks.waits import count_step
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from models.batched_step import use_batched_step
from optimization.optimizer import build_optimizer
from optimization.step import StepOptions, add_gradients, update_parameters

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
MEASURES = ("counts", "time", "beside", "memory")


def build_both(name, side):
    """Return a model that takes torchvision's own step and its copy that takes the batched one, and what to draw."""
    architecture = ARCHITECTURES[name]
    task, num_classes = architecture.task, 2 if architecture.task == "keypoint" else 91
    sizes = {} if architecture.fixed_size else {"min_size": (side,), "max_size": side * 5 // 3}
    torch.manual_seed(0)
    plain = build_model(ModelSpec(name, num_classes, 17 if task == "keypoint" else 0, **sizes)).train()
    batched = copy.deepcopy(plain)
    use_batched_step(batched)
    return {"torchvision": plain, "batched": batched}, {"task": task, "num_classes": num_classes}


def optimizer_of(model):
    return build_optimizer(model, "sgd", lr=1e-5, momentum=0.9, weight_decay=0)


def step(model, optimizer, batch):
    add_gradients(model, *batch, StepOptions(), weight=1.0, is_update=True)
    update_parameters(optimizer, StepOptions(), torch.zeros(()))


def count_rows(name, args):
    """Return a row of counts for each way and batch size."""
    models, kind = build_both(name, 64)
    rows = []
    for way, model in models.items():
        if hasattr(model, "rpn"):  # numbers of boxes, which the counts do not depend on either
            model.rpn._pre_nms_top_n["training"] = model.rpn._post_nms_top_n["training"] = 100
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
        for batch_size in args.batch_sizes:
            batch = draw_batch(images=batch_size, size=(72, 90), objects=args.objects, **kind)
            count = count_step(model, *batch, optimizer_of(model))
            parts = "backbone", "head", "transform", "anchors", "rpn", "roi heads", "losses"
            found = {part: (count.operations[part], count.waits_of(part)) for part in parts if count.operations[part]}
            rows.append({"model": name, "batch": batch_size, "step": way, "operations": count.forward()})
            rows[-1]["waits"] = count.waits_of()
            rows[-1]["bookkeeping"] = count.forward("backbone", "head")
            rows[-1] |= {part: f"{operations} / {waits}" for part, (operations, waits) in found.items()}
            rows[-1] |= {part: count.operations[part] for part in ("backward", "update")}
            rows[-1]["copies"] = count.copies.total()
            if count.mixed:
                rows[-1]["fails on a GPU"] = ", ".join(count.mixed)
            print(rows[-1], flush=True)
            if args.places:
                for (file, line, wait), number in count.places.most_common():
                    print(f"    {number} x {wait} at {file}:{line}")
    return rows


def time_row(name, args):
    """Return the CPU seconds of both ways."""
    models, kind = build_both(name, args.side)
    batch = draw_batch(images=args.batch_sizes[0], size=(args.side, args.side * 4 // 3), objects=args.objects, **kind)
    optimizers = {way: optimizer_of(model) for way, model in models.items()}
    return timed_row(name, args, models, lambda way: step(models[way], optimizers[way], batch))


def beside_row(name, args):
    """Return the CPU seconds of both ways without backbone and head, which give what they gave once."""
    models, kind = build_both(name, args.side)
    batch = draw_batch(images=args.batch_sizes[0], size=(args.side, args.side * 4 // 3), objects=args.objects, **kind)
    plain = models["torchvision"]
    with torch.no_grad():
        features = plain.backbone(plain.transform(batch[0])[0].tensors)
        outputs = plain.head([features] if isinstance(features, torch.Tensor) else list(features.values()))
    for model in models.values():
        model.backbone = Given(features)
        model.head.forward = Given({name: values.requires_grad_() for name, values in outputs.items()}).forward
    return timed_row(
        name,
        args,
        models,
        lambda way: add_gradients(models[way], *batch, StepOptions(), weight=1.0, is_update=True),
    )


class Given(torch.nn.Module):
    """Gives the same whatever it gets."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, _):
        return self.result


def timed_row(name, args, models, run):
    """Return the CPU seconds of ``run`` in both ways, rounds interleaved."""
    seconds = {way: [] for way in models}
    for turn in range(args.rounds + 1):
        for way in sorted(models, reverse=turn % 2):
            torch.manual_seed(turn)
            start = time.process_time()
            run(way)
            if turn:  # the first round warms up
                seconds[way].append(time.process_time() - start)
    ratios = [ours / theirs for ours, theirs in zip(seconds["batched"], seconds["torchvision"])]
    row = {"model": name, "batch": args.batch_sizes[0], "objects": args.objects}
    row |= {f"{way}, CPU ms": f"{statistics.median(seconds[way]) * 1e3:.1f}" for way in models}
    row["ratio (smallest-largest)"] = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
    print(row, flush=True)
    return row


def memory_row(name, args, objects=100):
    """Return the largest sum of living allocations of both ways."""
    models, kind = build_both(name, args.side)
    batch = draw_batch(images=args.batch_sizes[0], size=(args.side, args.side * 4 // 3), objects=objects, **kind)
    row = {"model": name, "batch": args.batch_sizes[0], "objects": objects}
    peaks = {}
    for way, model in models.items():
        torch.manual_seed(0)
        add_gradients(model, *batch, StepOptions(), weight=1.0, is_update=True)  # from here on gradients are there
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            add_gradients(model, *batch, StepOptions(), weight=1.0, is_update=True)
        living = peak = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                living += event.nbytes()
                peak = max(peak, living)
        model.zero_grad(set_to_none=True)
        peaks[way] = peak / 2**20
        row[f"{way}, MB"] = f"{peaks[way]:.0f}"
    row["ratio"] = f"{peaks['batched'] / peaks['torchvision']:.3f}"
    print(row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NINE, choices=ARCHITECTURES)
    parser.add_argument("--measure", nargs="+", default=MEASURES, choices=MEASURES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 16], help="the first is timed")
    parser.add_argument("--objects", type=int, default=7, help="a picture; memory is measured with 100")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=160, help="short side of pictures that are timed; not for the SSDs")
    parser.add_argument("--places", action="store_true", help="also print which lines wait")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    found = {measure: [] for measure in MEASURES}
    for name in args.models:
        if "counts" in args.measure:
            found["counts"] += count_rows(name, args)
        if "time" in args.measure:
            found["time"].append(time_row(name, args))
        if "beside" in args.measure and not ARCHITECTURES[name].has_proposals:
            found["beside"].append(beside_row(name, args))
        if "memory" in args.measure:
            found["memory"].append(memory_row(name, args))
    print(f"\n{machine()}\n")
    for rows in found.values():
        if rows:
            print(table(rows, list(dict.fromkeys(column for row in rows for column in row))), end="\n\n")


if __name__ == "__main__":
    main()
