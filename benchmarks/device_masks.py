"""Peak memory and time of masks that the device resizes: all objects of a large picture at once, and a few at a time.

    python benchmarks/device_masks.py                    # on the CPU
    python benchmarks/device_masks.py --device cuda

"at once" makes every mask at the source's size before the first is resized, "in pieces" is what training does. Memory
counts from after the batch has been built, and includes picture and result.
"""

import argparse
import hashlib
import json
import sys

from common import Measured, in_fresh_process, machine, table  # isort: skip
import numpy as np
import torch

from loading import collate
from loading.samples import Sample
from pixels.geometry import Placement
from pixels.masks import MaskBlock

SIZES = {"COCO": (480, 640, 10), "1080p": (1080, 1920, 30), "12 megapixels": (3000, 4000, 100)}


def measure(height, width, num_objects, device):
    """Return megabytes, seconds and a digest of the masks of one batch of one picture."""
    rng = np.random.default_rng(0)
    scale = min(800 / height, 1333 / width)
    target = round(height * scale), round(width * scale)
    placement = Placement((0, 0, width, height), (0, 0, target[1], target[0]), *target, True, (0, 0, 0), True)
    blocks = []
    for _ in range(num_objects):
        size = height // 10, width // 10
        left, top = int(rng.integers(0, width - size[1])), int(rng.integers(0, height - size[0]))
        blocks.append(MaskBlock(left, top, rng.integers(0, 2, size, dtype=np.uint8)))
    sample = Sample(np.zeros((height, width, 3), np.uint8), placement, {"image_id": 0}, blocks)
    batch = collate.collate_fn([sample])
    collate.unpack(collate.collate_fn([Sample(np.zeros((9, 9, 3), np.uint8), None, {"image_id": 0}, [])]), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Measured() as measured:
        _, (target,) = collate.unpack(batch, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    megabytes = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else measured.mb
    digest = hashlib.sha256(target["masks"].cpu().numpy()).hexdigest()
    return megabytes, measured.wall, digest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # one figure, in a process of its own
    args = parser.parse_args()
    if args.one:
        if args.one[1] == "at once":
            collate.MAX_MASK_BYTES = sys.maxsize
        print(json.dumps(measure(*SIZES[args.one[0]], torch.device(args.device))))
        return
    rows = []
    for name, (height, width, num_objects) in SIZES.items():
        row = {"masks": f"{name}: {num_objects} objects on {width} x {height}"}
        digests = set()
        for way in ("at once", "in pieces"):
            megabytes, seconds, digest = in_fresh_process(__file__, "--device", args.device, "--one", name, way)
            row |= {f"{way}, MB": round(megabytes), f"{way}, ms": round(1000 * seconds)}
            digests.add(digest)
        assert len(digests) == 1, "the masks differ"
        rows.append(row)
    print(machine(), f"on {args.device}")
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
