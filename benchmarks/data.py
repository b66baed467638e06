"""The data path: JPEG files to batches of two with two workers, against decoding alone and torchvision's scripts.

    python benchmarks/data.py                                   # drawn photographs
    python benchmarks/data.py --images coco/val2017 --annotations coco/annotations/instances_val2017.json

Rounds are interleaved; a figure is the median of the rounds, with the smallest and the largest. Per preset:
"decode" is a loader that turns JPEGs into uint8 and sends them the way this suite does, nothing else. The anchors
A, A' and B are in ``anchors.py``; B is the faster of PIL images and tensors. "CPU" is the time of all processes.
"on the device" is what `unpack` does with a batch after it has arrived, on --device: floats, and for the rows
"geometry on the device" resizing, placing and mirroring.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import machine, table  # isort: skip
import torch
from anchors import AnchorA, anchor_b, zip_columns
from synthetic import draw_photographs
from torch.utils.data import DataLoader, Dataset

from coco_utils import read_coco
from loading.collate import unpack
from loading.loaders import DeviceLoader
from loading.samples import DetectionDataset, ImageFolder, Sample
from loading.splits import label_map_for
from pixels.images import read_image
from presets import PRESETS, build_transforms

BATCH_SIZE = 2
FIXED_SIZES = {"ssd": (300, 300), "ssdlite": (320, 320)}
NEAR = "same distribution; resized pixels within 1 of 255 levels of Pillow's"
SAME_WORK = {
    "hflip": "bit-equal",
    "multiscale": NEAR,
    "lsj": NEAR + ", edges within half a source pixel; the model pads instead of the loader",
    "ssd": "same distribution; colours within 4 of 255 levels; the model's resize to 300 is included here, not in A, B",
    "ssdlite": "same distribution; the model's resize to 320 is included here, not in A, B",
}
ON_DEVICE = "same distribution; the resize is done in float"
STALE_MASKS = "A leaves masks where they were"


class Decoded(Dataset):
    """JPEG to uint8 and nothing else."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        return Sample(read_image(self.paths[item[1]]), None, {"image_id": item[1]})


class Batches:
    """Batches of fixed indices; how many is set before every pass."""

    def __init__(self, num_images, with_epoch):
        self.num_images, self.with_epoch, self.count, self.epoch = num_images, with_epoch, 8, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        self.epoch += 1
        for b in range(self.count):
            indices = [(b * BATCH_SIZE + k) % self.num_images for k in range(BATCH_SIZE)]
            yield [(self.epoch, i) for i in indices] if self.with_epoch else indices


class Variant:
    """One implementation, with workers that live as long as it does."""

    def __init__(self, dataset, workers, ours=True):
        self.batches = Batches(len(dataset), with_epoch=ours)
        self.warm_up = 2 * workers + 2  # batches that are not timed: what the workers fetch ahead
        if ours:
            self.loader = DeviceLoader(dataset, self.batches, workers=workers, device=torch.device("cpu")).loader
        else:
            options = {"batch_sampler": self.batches, "num_workers": workers, "collate_fn": zip_columns}
            self.loader = DataLoader(dataset, **options, persistent_workers=True, worker_init_fn=_one_thread)
        self.rounds = []

    def run(self, seconds):
        """One pass of about ``seconds``."""
        rate = self.median_rate() if self.rounds else 40
        self.batches.count = self.warm_up + max(int(seconds * rate / BATCH_SIZE), 6)
        for b, _ in enumerate(iterator := iter(self.loader)):
            if b == self.warm_up - 1:
                pids = ["self", *(worker.pid for worker in iterator._workers)]
                cpu, start = sum(map(cpu_ns, pids)), time.perf_counter()
        images = (self.batches.count - self.warm_up) * BATCH_SIZE
        wall, cpu = time.perf_counter() - start, sum(map(cpu_ns, pids)) - cpu
        self.rounds.append((images / wall, cpu / 1e6 / images))

    def median_rate(self):
        return statistics.median(r[0] for r in self.rounds)

    def rate(self):
        return spread([r[0] for r in self.rounds], "{:.0f}")

    def cpu(self):
        return spread([r[1] for r in self.rounds], "{:.1f}")

    def ratio_to(self, other):
        """Median over rounds of this rate over the other's of the same round."""
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(self.rounds, other.rounds)]
        return statistics.median(ratios)

    def device_ms(self, device, batches=12):
        """Milliseconds per image that `unpack` takes on ``device``."""
        self.batches.count = batches
        times = []
        for batch in self.loader:
            start = time.perf_counter()
            unpack(batch, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1000 / BATCH_SIZE)
        return statistics.median(times)


def _one_thread(_):
    torch.set_num_threads(1)


def cpu_ns(pid):
    """CPU time of all threads of a process, in nanoseconds."""
    return sum(int(Path(task, "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}-{form.format(max(values))})"


def build_variants(preset, images, annotations, workers):
    """All implementations of one preset by name."""
    arrays = read_coco(annotations)
    used = [i for i in range(len(arrays)) if (~arrays.is_crowd[arrays.objects(i)]).any()]

    def ours(with_masks, on_device=False):
        fixed = FIXED_SIZES.get(preset)
        return DetectionDataset(
            arrays,
            ImageFolder(images),
            label_map_for(arrays),
            indices=used,
            transforms=build_transforms(preset, fixed_size=fixed),
            needs_masks=with_masks,
            resize_on_device=on_device,
        )

    def theirs(dataset):
        chosen = [dataset.ids.index(int(arrays.image_ids[i])) for i in used]
        return Variant(torch.utils.data.Subset(dataset, chosen), workers, ours=False)

    paths = [images / arrays.file_name(i) for i in used]
    place = (images, annotations, preset)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints while it loads
        variants = {
            "decode": Variant(Decoded(paths), workers),
            "A": theirs(AnchorA(*place)),
            "A'": theirs(AnchorA(*place, with_masks=False)),
            "B PIL boxes": theirs(anchor_b(*place)),
            "B tensor boxes": theirs(anchor_b(*place, tensors=True)),
            "B PIL masks": theirs(anchor_b(*place, with_masks=True)),
            "B tensor masks": theirs(anchor_b(*place, with_masks=True, tensors=True)),
            "boxes": Variant(ours(False), workers),
            "masks": Variant(ours(True), workers),
        }
    if PRESETS[preset].on_device:
        variants["boxes, geometry on the device"] = Variant(ours(False, on_device=True), workers)
        variants["masks, geometry on the device"] = Variant(ours(True, on_device=True), workers)
    return variants


def rows_of(preset, variants, device):
    """Rows of the table, decoding and anchors first."""
    decode, rows = variants["decode"], []
    for name, variant in variants.items():
        row = {
            "preset": preset,
            "loader": name,
            "img/s": variant.rate(),
            "CPU ms/img": variant.cpu(),
            "of decode's img/s": f"{100 * variant.ratio_to(decode):.0f} %",
        }
        if name.startswith(("boxes", "masks")):
            kind = name[:5]
            b = max((variants[f"B {way} {kind}"] for way in ("PIL", "tensor")), key=Variant.median_rate)
            row["over A"] = f"{variant.ratio_to(variants['A']):.1f}"
            row["over A'"] = f"{variant.ratio_to(variants[_a_prime(kind)]):.1f}"
            row["over B"] = f"{variant.ratio_to(b):.1f}"
            row["on the device, ms/img"] = f"{variant.device_ms(device):.1f}"
            row["same work"] = ON_DEVICE if "device" in name else SAME_WORK[preset]
            if kind == "masks" and preset in FIXED_SIZES:
                row["same work"] += "; " + STALE_MASKS
        rows.append(row)
    return rows


def _a_prime(kind):
    return "A'" if kind == "boxes" else "A"  # with masks, A' is A


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; drawn ones by default")
    parser.add_argument("--annotations", type=Path, help="their COCO json")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--only", nargs="+", help="names of loaders, for a closer look")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every loader in every round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images, annotations = args.images, args.annotations
        if images is None:
            images, annotations = draw_photographs(Path(folder))
        for preset in args.presets:
            variants = build_variants(preset, images, annotations, args.workers)
            if args.only:
                variants = {name: v for name, v in variants.items() if name in ("decode", *args.only)}
            for r in range(args.rounds + 1):
                for variant in variants.values():
                    variant.run(args.seconds if r else 0.3)
                    if r == 1:
                        del variant.rounds[0]  # the first pass starts the workers
            if args.only:
                for name, v in variants.items():
                    print(preset, name, v.rate(), v.cpu(), f"{v.ratio_to(variants['decode']):.2f}", flush=True)
                continue
            rows += rows_of(preset, variants, args.device)
            print(f"{preset} done", file=sys.stderr)
    print(machine())
    if rows:
        columns = list(max(rows, key=len))
        print(table(rows, columns))


if __name__ == "__main__":
    sys.exit(main())
