"""Nine models by four ways to export them: does it pass, how close, how fast on one core, how large is the file.

    python benchmarks/export.py --images photos/      # about a quarter of an hour of one core

Random weights, shaken so that the models find things; each model runs in a process of its own. Time is CPU time, the least
of some rounds in which PyTorch and the files take turns.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import ROOT, in_fresh_process, machine, table  # isort: skip
import torch

sys.path.append(str(ROOT / "tests"))
import export
from helpers.shaken import limit_proposals, shaken_checkpoint
from inference import export_formats
from inference.trained_model import load_trained_model
from models.architectures import ARCHITECTURES

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
WAYS = {
    "pt2": export.Export.to_pt2,
    "onnx, new exporter": export.Export.to_onnx,
    "onnx, old exporter": export.Export.to_traced_onnx,
    "torchscript": export.Export.to_torchscript,
}


class Patch:
    """What `limit_proposals` asks of pytest's monkeypatch."""

    setattr = staticmethod(setattr)


def milliseconds(runs, rounds):
    """Return the least CPU time of each function in turn, after one call that does not count."""
    best = {}
    for n in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            took = (time.process_time() - start) * 1000
            best[name] = min(best.get(name, took), took) if n > 1 else took
    return best


def measure(name, images, rounds, proposals):
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if proposals:
        limit_proposals(Patch, proposals)
    rows, runs = [], {}
    with tempfile.TemporaryDirectory() as folder, export.quiet():
        folder = Path(folder)
        trained = load_trained_model(shaken_checkpoint(folder / "a.pth", name, detections_per_img=20))
        trained.model.requires_grad_(False)
        model = export.OnePicture(trained.model).eval()
        pictures = export.load_pictures(images, trained)
        cases = export.build_cases(model, pictures)
        picture = pictures[0][1]
        job = export.Export(trained, cases, None)
        followed = {}

        def follow_once(*args):
            """Follow a model once for the two ways that need it; it is most of their time."""
            if not followed:
                followed["program"] = honest(*args)
            return followed["program"]

        honest, export.follow = export.follow, follow_once
        honest_onnx = export.run_onnx
        export.run_onnx = lambda path, names: honest_onnx(path, names, 1)
        for way, write in WAYS.items():
            row = {"model": name, "way": way}
            rows.append(row)
            path = folder / "exported"
            try:
                runner, own_cases = write(job, path)
                row["MB"] = round(path.stat().st_size / 1e6, 1)
                agreement = export.check_file(model, runner, own_cases)
            except Exception as error:
                row["passes"] = f"no: {export_formats.why_not(error)}"
                continue
            row |= {"passes": "yes", "boxes, px": f"{agreement.box:.1g}", "scores": f"{agreement.score:.1g}"}
            if agreement.mask or agreement.keypoint:
                row["masks, keypoints"] = f"{agreement.mask:.2%}" if agreement.mask else f"{agreement.keypoint:.1g} px"
            runs[way] = lambda runner=runner: runner(picture[None])
            with contextlib.suppress(OSError):
                path.unlink()
        took = milliseconds({"PyTorch": lambda: model(picture), **runs}, rounds)
    for row in rows:
        if row["way"] in took:
            row["ms"] = round(took[row["way"]], 1)
            row["PyTorch / file"] = f"{took['PyTorch'] / took[row['way']]:.2f}"
    rows.insert(0, {"model": name, "way": "PyTorch", "ms": round(took["PyTorch"], 1)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NINE)
    parser.add_argument("--images", nargs="+", help="pictures to compare on; default: drawn ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--proposals", type=int, default=200, help="of an R-CNN; 0: the 1000 it has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.images, args.rounds, args.proposals)))
        return
    print(machine(), *(f"{name} {version(name)}" for name in ("onnx", "onnxscript", "onnxruntime")), sep=", ")
    rows = []
    for name in args.models:
        flags = [
            "--rounds",
            args.rounds,
            "--proposals",
            args.proposals,
            *(["--images", *args.images] if args.images else []),
        ]
        rows += in_fresh_process(__file__, "--one", name, *flags)
        print(json.dumps(rows[-5:]), file=sys.stderr, flush=True)
    columns = ["model", "way", "passes", "boxes, px", "scores", "masks, keypoints", "ms", "PyTorch / file", "MB"]
    print(table(rows, columns))


if __name__ == "__main__":
    main()
