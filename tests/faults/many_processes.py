"""The nine recipes on many processes of one CPU: they train, score, are killed and go on, also on fewer processes.

    python -m tests.faults.many_processes                                        # all nine on eight processes
    python -m tests.faults.many_processes --models ssdlite320_mobilenet_v3_large maskrcnn_resnet50_fpn --processes 4

The commands are those of the README, on small drawn pictures, for some updates from random weights. Every step of a run
that goes on on as many processes must have the losses (by hex) of the run without a kill, and its end the same weights
and scores; on fewer processes every picture of the epoch must be seen once. Eight Mask R-CNN need some 12 GB.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults.jobs import ROOT, send, start  # noqa: E402
from faults.matrix import PEER_GONE, STANDALONE, key_of, newest, result_of  # noqa: E402
from helpers.drawn import draw_coco  # noqa: E402
from models.architectures import ModelSpec, build_model  # noqa: E402
from runtime.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

# Of this many pictures and two per update of a process an epoch has two updates on eight processes.
NUM_IMAGES = 32
FEW = 5


class Broken(Exception):
    """A promise was not kept."""


def expect(holds, text):
    if not holds:
        raise Broken(text)


def read_recipes():
    """Return {model: flags} of the README's recipes, without trained weights."""
    recipes = {}
    for line in re.findall(r"^    torchrun --nproc_per_node=8 train.py (.*)$", (ROOT / "README.md").read_text(), re.M):
        words = shlex.split(line)
        at = words.index("--weights-backbone")
        recipes[words[words.index("--model") + 1]] = words[:at] + words[at + 2 :]
    return recipes


PARTS = ("trains", "one_scores_alike", "a_killed_run_goes_on", "few_pictures")


class Recipe:
    """One recipe on small pictures.

    Args:
        model: Its name.
        folder: For all that its runs write.
        processes: How many.
    """

    def __init__(self, model, folder, processes):
        self.model, self.folder, self.processes = model, folder, processes
        num_keypoints = 17 if model.startswith("keypoint") else 0
        self.data = draw_coco(folder / "data", num_images=NUM_IMAGES, num_keypoints=num_keypoints)
        self.few = draw_coco(folder / "few", num_images=FEW, num_keypoints=num_keypoints)
        size = [] if model.startswith("ssd") else ["--min-size", "64", "--max-size", "96"]
        self.flags = [*read_recipes()[model], *size, "--device", "cpu", "--workers", "0", "--epochs", "2"]
        self.flags += ["--lr", "0.001", "--batch-size", "2", "--eval-every", "2", "--checkpoint-every", "1"]
        self.flags += ["--print-freq", "1", "--cache-dir", folder / "cache"]
        self.flags += ["--resume", "auto"]

    def start(self, name, processes, *more, data=None, torchrun=None):
        flags = [*self.flags, "--data-path", data or self.data, *more]
        trace, env = self.folder / f"trace-{name}", {"FAULT_PATIENCE": "300"}
        return start(trace, self.folder / name, flags, processes=processes, torchrun=torchrun, env=env)

    def prove(self, parts):
        """Yield (part, its result, seconds); the first part is needed by all others."""
        for part in PARTS:
            if part == PARTS[0] or part in parts:
                begun = time.monotonic()
                yield part.replace("_", " "), getattr(self, part)(), time.monotonic() - begun

    def trains(self):
        """torchrun, as the recipe says."""
        job = self.start("whole", self.processes, torchrun=STANDALONE)
        job.wait_for(lambda: len(job.steps()) >= 2, 900)
        memory = sum(peak_mb(pid) for pid in job.pids().values())
        expect(job.end(900) == [0], last_words(job))
        steps = job.events("step")
        self.losses, self.result = {key_of(step): step["losses"] for step in steps}, result_of(job)
        expect(len({step["rank"] for step in steps}) == self.processes, "a process has trained nothing")
        ids = [i for step in steps if step["epoch"] == 0 for i in step["ids"]]
        expect(len(ids) == len(set(ids)), f"pictures were seen twice in an epoch: {sorted(ids)}")
        return f"{memory / 1024:.1f} GB resident at the most, {len(ids)} pictures an epoch"

    def one_scores_alike(self):
        """The figures and the detections of one process on a checkpoint, to the last bit."""
        many = self.score("many", self.processes, self.data)
        alone = self.score("alone", 1, self.data)
        expect(alone == many, f"one process scores {alone}, {self.processes} score {many}")
        files = [f"predictions_{kind}.json" for kind in alone]
        for name in files:
            same = (self.folder / "alone" / name).read_bytes() == (self.folder / "many" / name).read_bytes()
            expect(same, f"{name} differs")
        found = len(json.loads((self.folder / "alone" / files[0]).read_text()))
        expect(found, "nothing is found, so nothing is compared")
        aps = [f"{kind} AP {scores['AP']:.6f}" for kind, scores in alone.items()]
        return f"{', '.join(aps)}, {found} detections"

    def eager_checkpoint(self):
        """Return a checkpoint of random weights that finds many objects; one of few updates finds none."""
        path = self.folder / "eager.pth"
        if not path.exists():
            content = load_checkpoint(self.folder / "whole" / "weights" / "checkpoint.pth")
            spec = ModelSpec.from_plain(content["model_spec"])
            torch.manual_seed(0)
            weights = build_model(spec).state_dict()
            for name, values in weights.items():
                is_score = name.endswith(".bias") and ("cls" in name or "classification_head" in name)
                if is_score and values.numel() % spec.num_classes == 0:
                    values.zero_().view(-1, spec.num_classes)[:, 1:4] = 3  # of which the drawn objects are
            save_checkpoint({**content, "model": weights}, path)
        return path

    def score(self, name, processes, data):
        job = self.start(name, processes, "--test-only", "--resume", self.eager_checkpoint(), data=data)
        expect(job.end(900) == [0] * processes, last_words(job))
        return last_scores(job.out)

    def a_killed_run_goes_on(self):
        """SIGKILL of one of the processes; then from the same checkpoint on as many, on half and on three."""
        job = self.start("killed", self.processes, torchrun=STANDALONE)
        job.wait_for(lambda: newest(job).exists() and len(job.steps()) >= 2, 900)
        begun = time.monotonic()
        send(job.pids()[random.Random(self.model).randrange(self.processes)], signal.SIGKILL)
        expect(job.end(90) == [1], f"the others did not end with 1 within 90 s:\n{last_words(job)}")
        ended = time.monotonic() - begun
        expect(PEER_GONE in job.log() or "Signal 9" in job.log(), f"no word on why:\n{last_words(job)}")
        progress = load_checkpoint(newest(job))["progress"]
        rounds = progress["batches"] // self.processes
        before = [step for rank in range(self.processes)
                  for step in [s for s in job.steps(rank) if s["epoch"] == progress["epoch"]][:rounds]]  # fmt: skip
        for processes in dict.fromkeys((self.processes, self.processes // 2, 3)):
            name = f"on{processes}"
            shutil.copytree(job.out, self.folder / name)
            again = self.start(name, processes)
            expect(again.end(900) == [0] * processes, f"on {processes}:\n{last_words(again)}")
            self.check_continued(again, processes, before)
            print(f"{self.model}: ended {ended:.0f} s after the kill, goes on on {processes}", flush=True)
        return "on all of these"

    def check_continued(self, job, processes, before):
        """Compare with the whole run; ``before`` are the steps of the epoch that the checkpoint counts as done."""
        steps = job.events("step")
        if processes == self.processes:
            wrong = [step for step in steps if self.losses[key_of(step)] != step["losses"]]
            expect(not wrong, f"{len(wrong)} of {len(steps)} steps have other losses than without a kill")
            expect(result_of(job) == self.result, "other weights or scores at the end than without a kill")
        else:
            expect(f"processes {self.processes}, now {processes}" in job.log(), "no word on the number of processes")
        for epoch in {step["epoch"] for step in steps}:
            # A process without a batch in the last update of an epoch computes another one's again, with weight 0.
            batches = {tuple(step["ids"]) for step in [*before, *steps] if step["epoch"] == epoch}
            seen = sorted(i for batch in batches for i in batch)
            whole = sorted(i for key in self.losses if key[1] == epoch for i in key[2])
            expect(seen == whole, f"on {processes}, epoch {epoch} saw {seen} instead of {whole}")

    def few_pictures(self):
        """Fewer pictures than processes: a training is refused in one line each, scores are those of one process."""
        job = self.start("refused", self.processes, data=self.few)
        expect(job.end(300) == [1] * self.processes, f"training on {FEW} pictures:\n{last_words(job)}")
        refused = len(re.findall(rf"error: {FEW} training image\(s\) for {self.processes} process\(es\)", job.log()))
        expect(refused == self.processes and "Traceback" not in job.log(), last_words(job))
        many, alone = self.score("few-many", self.processes, self.few), self.score("few-alone", 1, self.few)
        expect(many == alone, f"{FEW} pictures: {self.processes} processes score {many}, one {alone}")
        return f"training on {FEW} refused by all, scores alike"


def last_words(job):
    """Return the end of what the processes say, without the traceback that torchrun adds."""
    return re.split(r"^E\d{4} ", job.log(), maxsplit=1, flags=re.M)[0][-3000:]


def peak_mb(pid):
    """Return the most memory that a process has had resident, in MB."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024
    except (OSError, TypeError):
        return 0


def last_scores(folder):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {kind: line[kind] for kind in ("bbox", "segm", "keypoints") if kind in line}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8, help="4 or more")
    parser.add_argument("--models", nargs="+", default=list(read_recipes()), choices=read_recipes(), metavar="MODEL")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args()
    begun, broken = time.monotonic(), 0
    for model in args.models:
        with tempfile.TemporaryDirectory() as name:
            recipe = Recipe(model, Path(name), args.processes)
            try:
                for what, result, seconds in recipe.prove(args.parts):
                    print(f"{model}: {what}: {result} ({seconds:.0f} s)", flush=True)
            except (Broken, OSError, ValueError, KeyError) as error:
                broken += 1
                print(f"{model}: BROKEN {type(error).__name__}: {error}", flush=True)
    print(f"{len(args.models) - broken} of {len(args.models)} recipes keep their promises on {args.processes} processes; "
          f"{time.monotonic() - begun:.0f} s on {len(os.sched_getaffinity(0))} core(s)")  # fmt: skip
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
