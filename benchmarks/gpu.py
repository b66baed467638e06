"""Training steps of the nine models: images/s, memory and data wait, from files and from memory, against a plain loop.

    python benchmarks/gpu.py --data-path /data/coco                       # all nine, on the GPU
    python benchmarks/gpu.py --data-path ... --device cpu --models ssdlite320_mobilenet_v3_large --steps 3 --min-size 96

"plain loop" is the scripts' way from public parts: their loader with the best flags (v2 transforms on PIL images, float
images, one tensor after the other to the device), every loss read in every step, float32. The other rows are this
suite with more and more switches. "memory" rows have their batches on the device already: what the model alone can do.
Rows follow each other in one process per model; images/s count from the end of the warm-up steps.
"""

import argparse
import contextlib
import itertools
import logging
import time
from pathlib import Path

from common import machine, table  # isort: skip
import torch
from anchors import AnchorA, anchor_b, zip_columns
from loop import logging_loop
from torch.utils.data import DataLoader
from torchvision.transforms import functional as tvf

from engine import train_one_epoch
from group_by_aspect_ratio import GroupedBatchSampler
from loading.loaders import build_train_loader
from loading.splits import Source, load_data
from models.acceleration import compile_backbone, typical_inputs, use_channels_last
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from models.batched_step import use_batched_step
from models.box_precision import keep_boxes_float32
from models.folded_norm import fold_frozen_norms
from optimization.optimizer import build_optimizer
from optimization.precision import choose_amp
from optimization.schedule import LearningRate
from optimization.step import StepOptions
from runtime.progress import Progress
from runtime.signals import StopRequest
from utils import Distributed

PRESET = {"ssd300_vgg16": "ssd", "ssdlite320_mobilenet_v3_large": "ssdlite"}
BATCH_SIZE = {"ssd300_vgg16": 4, "ssdlite320_mobilenet_v3_large": 24}  # the recipes'; 2 for all others
WAYS = {
    "plain loop": {},
    "suite, torchvision's step": {"torchvision_step": True},
    "suite": {},
    "suite, AMP": {"amp": True},
    "suite, AMP, channels-last": {"amp": True, "channels_last": True},
    "suite, AMP, channels-last, compile": {"amp": True, "channels_last": True, "compile": True},
}


class KeypointAnchor(AnchorA):
    """Default flags with keypoints: only objects that have some are kept, as in the scripts."""

    def __getitem__(self, index):
        image, records = super(AnchorA, self).__getitem__(index)
        records = [r for r in records if not r["iscrowd"]]
        boxes = torch.tensor([r["bbox"] for r in records], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        keypoints = torch.tensor([r["keypoints"] for r in records], dtype=torch.float32).reshape(len(records), -1, 3)
        target = {"boxes": boxes, "labels": torch.ones(len(records), dtype=torch.int64), "keypoints": keypoints}
        for step in self.steps:
            image, target = step(image, target)
        return tvf.convert_image_dtype(tvf.pil_to_tensor(image), torch.float32), target


class Repeated(GroupedBatchSampler):
    """As many batches as there are steps, epoch after epoch, as one epoch."""

    def __init__(self, inner, steps):
        self.__dict__.update(inner.__dict__)
        self.inner, self.num_batches = inner, steps

    def __iter__(self):
        epochs = (self.inner.epoch_batches(epoch) for epoch in itertools.count())
        batches = ([(epoch, int(i)) for i in batch] for epoch, rows in enumerate(epochs) for batch in rows)
        return itertools.islice(batches, self.num_batches)


class Timed:
    """A loader that notes when the warm-up ends, and how long its reader waited from then on."""

    def __init__(self, loader, batch_sampler, warmup, device, batches=None):
        self.loader, self.batch_sampler, self.device = loader, batch_sampler, device
        self.warmup, self.batches = warmup, batches
        self.images = self.wait = 0

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        source = iter(self.loader) if self.batches is None else itertools.cycle(self.batches)
        for step in range(len(self)):
            if step == self.warmup:
                self.finish()
                self.start, self.images, self.wait = time.perf_counter(), 0, 0
            before = time.perf_counter()
            images, targets = next(source)
            self.wait += time.perf_counter() - before
            self.images += len(images)
            yield images, targets

    def finish(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.end = time.perf_counter()


def to_device(batches, device):
    for images, targets in batches:
        yield (
            [image.to(device) for image in images],
            [{k: v.to(device) if torch.is_tensor(v) else v for k, v in target.items()} for target in targets],
        )


class PlainLoader:
    def __init__(self, loader, device):
        self.loader, self.device = loader, device

    def __iter__(self):
        while True:
            yield from to_device(self.loader, self.device)


def plain_loader(args, name, device):
    task = ARCHITECTURES[name].task
    kind = "person_keypoints" if task == "keypoint" else "instances"
    images, annotations = args.data_path / "train2017", args.data_path / "annotations" / f"{kind}_train2017.json"
    if task == "keypoint":
        dataset = KeypointAnchor(images, annotations, "hflip")
        keep = [i for i, id_ in enumerate(dataset.ids) if dataset.coco.getAnnIds([id_], iscrowd=False)]
    else:
        dataset = anchor_b(images, annotations, PRESET.get(name, "hflip"), with_masks=task == "mask")
        inner = getattr(dataset, "_dataset", dataset)
        keep = [i for i, id_ in enumerate(inner.ids) if inner.coco.getAnnIds([id_], iscrowd=False)]
    batch_size = args.batch_size or BATCH_SIZE.get(name, 2)
    if len(keep) < batch_size:
        raise ValueError(f"{images}: {len(keep)} images have objects, and a batch takes {batch_size}")
    return PlainLoader(
        DataLoader(
            torch.utils.data.Subset(dataset, keep),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            collate_fn=zip_columns,
        ),
        device,
    )


def measure(args, name, way, device, from_memory):
    """Return images/s, peak MB and data wait of one row."""
    options = WAYS[way]
    task = ARCHITECTURES[name].task
    dataset = "coco_kp" if task == "keypoint" else "coco"
    data = load_data(Source(dataset, args.data_path), task)
    sizes = {} if name.startswith("ssd") or not args.min_size else {"min_size": (args.min_size,)}
    sizes |= {"max_size": args.min_size * 5 // 3} if sizes else {}
    architecture = ARCHITECTURES[name]
    spec = ModelSpec(
        name,
        data.label_map.num_classes,
        data.num_keypoints if task == "keypoint" else 0,
        frozen_norm=architecture.freezes_norm,  # as from pretrained weights
        trainable_layers=architecture.trainable_layers,
        **sizes,
    )
    torch.manual_seed(0)
    model = build_model(spec).to(device).train()
    if way != "plain loop":
        fold_frozen_norms(model)
        if not options.get("torchvision_step"):
            use_batched_step(model)
    torch.backends.cudnn.benchmark = way != "plain loop" and spec.architecture.fixed_size is not None
    amp_dtype, scaler = choose_amp("auto", device) if options.get("amp") else (None, None)
    batch_size = args.batch_size or BATCH_SIZE.get(name, 2)
    if amp_dtype is not None:
        keep_boxes_float32(model)
    if options.get("channels_last"):
        use_channels_last(model)
    if options.get("compile"):
        compile_backbone(model, typical_inputs(spec, batch_size, device), amp_dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = build_optimizer(model, "sgd", lr=1e-4, momentum=0.9, weight_decay=1e-4)
    here = Distributed(0, 0, 1, device)
    loader, sampler = build_train_loader(
        data, spec, here, batch_size=batch_size, workers=args.workers, seed=0, augmentation=PRESET.get(name, "hflip")
    )
    steps = args.warmup + args.steps
    sampler = Repeated(sampler, steps)
    loader = type(loader)(loader.dataset, sampler, workers=args.workers, device=device)
    kept = None
    if from_memory:
        kept = [batch for _, batch in zip(range(4), loader)]
    if way == "plain loop":
        timed = Timed(plain_loader(args, name, device), sampler, args.warmup, device, kept)
        logging_loop(model, optimizer, timed)
    else:
        timed = Timed(loader, sampler, args.warmup, device, kept)
        run_engine(model, optimizer, timed, scaler, amp_dtype)
    timed.finish()
    seconds = timed.end - timed.start
    memory = torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else None
    return timed.images / seconds, memory, timed.wait / seconds


def run_engine(model, optimizer, loader, scaler, amp_dtype):
    train_one_epoch(
        model,
        optimizer,
        loader,
        progress=Progress(),
        learning_rate=LearningRate(1e-4, 1),
        options=StepOptions(scaler=scaler, amp_dtype=amp_dtype),
        stop=StopRequest(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="COCO's layout; a small one is repeated")
    nine = [name for name in ARCHITECTURES if not name.endswith("_v2")]
    parser.add_argument("--models", nargs="+", default=nine, choices=ARCHITECTURES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="default: the recipes'")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--min-size", type=int, help="for a quick look without a GPU; not for the SSDs")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    device = torch.device(args.device)
    rows = []
    for name in args.models:
        plain = {}
        for way, from_memory in itertools.product(args.ways, (False, True)):
            row = {"model": name, "way": way, "batches from": "memory" if from_memory else "files"}
            try:
                speed, memory, wait = measure(args, name, way, device, from_memory)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                row["images/s"] = f"failed: {str(error).splitlines()[0][:80]}"
            else:
                if way == "plain loop":
                    plain[from_memory] = speed
                ratio = f"{speed / plain[from_memory]:.2f}" if from_memory in plain else ""
                row |= {
                    "images/s": f"{speed:.1f}",
                    "over plain": ratio,
                    "peak MB": memory or "",
                    "data wait": f"{wait:.0%}",
                }
            rows.append(row)
            print(row, flush=True)
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{on}, {machine()}, {args.workers} workers, {args.steps} steps after {args.warmup}\n")
    print(table(rows, ["model", "way", "batches from", "images/s", "over plain", "peak MB", "data wait"]))


if __name__ == "__main__":
    main()
