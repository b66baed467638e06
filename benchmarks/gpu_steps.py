"""The steps of `on_gpu.py`: what each looks at on a GPU, and how it is tried on a CPU.

A step is a function of a `Run`; its figures are written one by one, and those that are there already are left out.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import resource
import socket
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from common import ROOT, machine

SSDLITE, FASTER = "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn"
SPEED_MODELS = (FASTER, "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn", SSDLITE)
# How torch's trap begins its warning of a wait; it has another one, once, of its being a prototype.
SYNCHRONIZING = "called a synchronizing CUDA operation"
TESTS_ON_A_GPU = ("tests/test_engine.py",)
PACKAGES = (
    "torch",
    "torchvision",
    "pycocotools",
    "tqdm",
    "matplotlib",
    "jinja2",
    "yaml",
    "defusedxml",
    "PIL",
    "pytest",
)


def since(started):
    return round(time.monotonic() - started, 1)


class Run:
    """What the steps have in common: flags, device, sizes, figures."""

    def __init__(self, args, figures):
        import torch

        self.args, self.figures = args, figures
        self.device = torch.device(args.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def sizes(self, name):
        """Return flags that make a model's pictures small in a trial."""
        return ["--min-size", "64", "--max-size", "96"] if self.args.tiny and not name.startswith("ssd") else []

    def flags(self, name, **other):
        """Return the flags of train.py for a model and the small dataset, ``other`` ones in place of these."""
        flags = {
            "model": name, "dataset": "coco_kp" if "keypoint" in name else "coco", "data_path": self.args.data_path,
            "device": self.args.device, "workers": self.args.workers, "batch_size": 2, "lr": 1e-4, "warmup_iters": 0,
            "epochs": 1, "output_dir": "", "print_freq": 5, **other,
        }  # fmt: skip
        words = []
        for flag, value in flags.items():
            words += [] if value is False else [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return words + self.sizes(name)

    def chosen(self, names):
        """Return those of ``names`` that are asked for; in a trial without any of them the first that is."""
        return [name for name in names if name in self.args.models] or self.args.models[:1]

    def batch(self, name, size=2):
        """Return a drawn batch on the device."""
        from benchmarks.synthetic import draw_batch
        from models.architectures import ARCHITECTURES
        from models.object_block import BatchTargets, objects_of

        task, shape = ARCHITECTURES[name].task, (64, 80) if self.args.tiny else (480, 640)
        images, targets = draw_batch(task, size, shape, num_classes=2 if task == "keypoint" else 91)
        images = [image.to(self.device) for image in images]
        targets = [{k: v.to(self.device) if k != "image_id" else v for k, v in t.items()} for t in targets]
        return images, BatchTargets(targets, objects_of(targets))  # as the loader gives them

    def model(self, name, is_batched=True):
        """Return a model on the device as a training would have it, and its optimizer."""
        from models.architectures import ARCHITECTURES, ModelSpec, build_model
        from models.batched_step import use_batched_step
        from models.folded_norm import fold_frozen_norms
        from optimization.optimizer import build_optimizer
        from utils import seed_torch

        seed_torch(0, "weights")
        task = ARCHITECTURES[name].task
        sizes = {"min_size": (64,), "max_size": 96} if self.sizes(name) else {}
        spec = ModelSpec(name, 2 if task == "keypoint" else 91, 17 if task == "keypoint" else 0, **sizes)
        model = build_model(spec).to(self.device).train()
        fold_frozen_norms(model)
        if is_batched:
            use_batched_step(model)
        return model, build_optimizer(model, "sgd", lr=1e-4, momentum=0.9, weight_decay=0)

    def peak_mb(self):
        """Return the most memory the GPU has lent out since the last call."""
        import torch

        if self.device.type != "cuda":
            return None
        gc.collect()
        peak = torch.cuda.max_memory_allocated(self.device) >> 20
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def environment(run):
    """Note the machine, and what it lacks."""
    import torch

    lacks = ", ".join(name for name in PACKAGES if find_spec(name) is None)
    figures = {"host": machine(), "lacks": lacks or "nothing"}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        figures |= {"GPU": properties.name, "memory MB": properties.total_memory >> 20, "CUDA": torch.version.cuda}
    run.figures.write("machine", **figures)


def gpu_tests(run):
    """Run the tests that are skipped without a GPU."""
    import pytest

    found = {}

    class Counts:
        def pytest_terminal_summary(self, terminalreporter):
            found.update((outcome, len(reports)) for outcome, reports in terminalreporter.stats.items() if outcome)

    os.chdir(ROOT)
    code = pytest.main(["-k", "on_a_gpu", "-p", "no:cacheprovider", *TESTS_ON_A_GPU], plugins=[Counts()])
    run.figures.write("tests", code=int(code), **found)


def dry_runs(run):
    """Rehearse each model's largest batch; two models in half precision and channels-last."""
    import train

    cases = {name: run.flags(name, dry_run=True) for name in run.args.models}
    half = (
        ("float16", "bfloat16") if run.device.type == "cuda" else ("bfloat16", "bfloat16")
    )  # CPUs are slow in float16
    for name, dtype in zip(run.chosen([FASTER, "retinanet_resnet50_fpn"]), half):
        amp = {"amp": True, "amp_dtype": dtype, "channels_last": True}
        cases[f"{name}, {dtype}, channels-last"] = run.flags(name, dry_run=True, **amp)
    for case, flags in cases.items():
        if not run.figures.has(case):
            with run.figures.attempt(case):
                run.peak_mb()
                started = time.monotonic()
                code = train.run_as_command(flags)
                run.figures.write(case, code=code, seconds=since(started), peak_MB=run.peak_mb())


def nan_batches(run):
    """Skip a batch with a picture that is not finite: weights and momentum keep every bit."""
    import torch
    from loop import MemoryLoader

    from engine import train_one_epoch
    from models.box_precision import keep_boxes_float32
    from optimization.precision import choose_amp
    from optimization.schedule import LearningRate
    from optimization.step import StepOptions
    from runtime.progress import Progress
    from runtime.signals import StopRequest

    name = run.chosen([SSDLITE])[0]
    good = run.batch(name)
    bad = [image.clone() for image in good[0]], good[1]
    bad[0][1][0, 5, 5] = float("nan")
    precisions = {"float32": (None, None), "float16": choose_amp("float16", run.device)}
    precisions["bfloat16"] = torch.bfloat16, None
    if run.device.type == "cpu":  # slow in float16; the scaler is tried all the same
        precisions["bfloat16 and a scaler"] = torch.bfloat16, precisions.pop("float16")[1]
    for dtype, (amp_dtype, scaler) in precisions.items():
        if run.figures.has(dtype):
            continue
        with run.figures.attempt(dtype):
            model, optimizer = run.model(name)
            if amp_dtype is not None:
                keep_boxes_float32(model)
            options = StepOptions(on_nan="skip", amp_dtype=amp_dtype, scaler=scaler)

            def train_on(batch, steps=1, model=model, optimizer=optimizer, options=options):
                loader = MemoryLoader([batch], steps)
                loader.device = run.device
                schedule = {"learning_rate": LearningRate(1e-4, 1), "progress": Progress(), "stop": StopRequest()}
                return train_one_epoch(model, optimizer, loader, options=options, **schedule)

            def state(model=model, optimizer=optimizer):
                momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
                return [value.detach().clone() for value in (*model.parameters(), *momentum)]

            train_on(good, 1 if run.args.tiny else 12)  # float16: the first may be skipped, until the scale fits
            before, scale = state(), scaler.get_scale() if scaler else None
            train_on(bad)
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, state()))
            figures = {"bit_equal": same, "scale": f"{scale:g} -> {scaler.get_scale():g}" if scaler else None}
            train_on(good)
            moved = any(not torch.equal(a, b) for a, b in zip(before, state()))
            finite = all(bool(torch.isfinite(value).all()) for value in state())
            norms = all(bool(torch.isfinite(value).all()) for value in model.buffers())
            run.figures.write(dtype, **figures, moves_afterwards=moved, finite_afterwards=finite, norms_finite=norms)


def slot_batches(run):
    """Load batches through the shared slots while the copy stream lags, and compare them with the CPU's."""
    import torch
    from gpu import Repeated

    from loading.loaders import build_train_loader
    from loading.splits import Source, load_data
    from models.architectures import ModelSpec
    from utils import Distributed

    def checksum(values):
        """Return one int64 on the values' device, without a wait."""
        words = torch.cat([value.contiguous().view(torch.uint8).flatten() for value in values]).to(torch.int64)
        return (words * (torch.arange(len(words), device=words.device) * 2 + 1)).sum()

    def checksums(device):
        data = load_data(Source("coco", run.args.data_path), "mask")
        spec, here = ModelSpec("maskrcnn_resnet50_fpn", data.label_map.num_classes), Distributed(0, 0, 1, device)
        loader, sampler = build_train_loader(data, spec, here, batch_size=2, workers=run.args.workers, seed=0)
        sampler = Repeated(sampler, 5 if run.args.tiny else 100)
        loader = type(loader)(loader.dataset, sampler, workers=max(run.args.workers, 1), device=device)
        sums = []
        for images, targets in loader:
            sums.append(checksum([*images, *(v for t in targets for v in t.values() if torch.is_tensor(v))]))
            if loader.stream is not None:
                with torch.cuda.stream(loader.stream):  # the next copy starts some 5 ms late
                    torch.cuda._sleep(10_000_000)
        return torch.stack(sums).tolist()

    with run.figures.attempt("batches"):
        started = time.monotonic()
        here, reference = checksums(run.device), checksums(torch.device("cpu"))
        differ = sum(a != b for a, b in zip(here, reference))
        run.figures.write("batches", compared=len(reference), differ=differ, seconds=since(started))


def verified_resumes(run):
    """Interrupt and continue a training: the same bits."""
    import train

    for name in run.chosen([SSDLITE, FASTER]):
        if not run.figures.has(name):
            with run.figures.attempt(name):
                started = time.monotonic()
                exact = {"use_deterministic_algorithms": True, "verify_resume": 2 if run.args.tiny else 6}
                code = train.run_as_command(run.flags(name, **exact))
                run.figures.write(name, equal=code == 0, seconds=since(started))


def waits(run):
    """Count what a step waits for, by place: torchvision's own step beside the batched one."""
    for name in run.chosen(SPEED_MODELS):
        for way in ("torchvision's step", "batched step"):
            if run.figures.has(f"{name}, {way}"):
                continue
            with run.figures.attempt(f"{name}, {way}"):
                model, optimizer = run.model(name, is_batched=way == "batched step")
                places = count_waits(run, model, run.batch(name), optimizer)
                text = ", ".join(f"{number} x {place}" for place, number in places.most_common(12))
                run.figures.write(f"{name}, {way}", waits=places.total(), places=text)


def count_waits(run, model, batch, optimizer):
    """Return the waits of a step by place; on a GPU by torch's own trap, on a CPU by our books."""
    import torch

    from benchmarks.waits import count_step
    from optimization.step import StepOptions, add_gradients, update_parameters

    if run.device.type != "cuda":
        return Counter(
            {f"{f}:{n} {wait}": k for (f, n, wait), k in count_step(model, *batch, optimizer).places.items()}
        )
    for turn in range(3):  # the first ones fill what is kept
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if turn == 2 else "default")
            add_gradients(model, *batch, StepOptions(), weight=1.0, is_update=True)
            update_parameters(optimizer, StepOptions(), batch[0][0].new_zeros(()))
            torch.cuda.set_sync_debug_mode("default")
    places = [(Path(w.filename), w.lineno) for w in found if SYNCHRONIZING in str(w.message)]
    return Counter(f"{path.parent.name}/{path.name}:{line}" for path, line in places)


def speeds(run):
    """Measure images/s: the plain loop, the suite with torchvision's step, and as it is."""
    measure_ways(run, ("plain loop", "suite, torchvision's step", "suite"))


def speeds_of_everything(run):
    """Measure images/s with all that speeds up; compiling takes its time."""
    measure_ways(run, ("suite, AMP, channels-last",) if run.args.tiny else ("suite, AMP, channels-last, compile",))


def measure_ways(run, ways):
    from gpu import measure

    tiny = run.args.tiny
    options = {"warmup": 1 if tiny else 10, "steps": 2 if tiny else 30, "min_size": 64 if tiny else None}
    options["batch_size"] = 2 if tiny else None
    args = argparse.Namespace(data_path=run.args.data_path, workers=run.args.workers, **options)
    for name in run.chosen(SPEED_MODELS):
        for way in ways:
            if run.figures.has(f"{name}, {way}"):
                continue
            with run.figures.attempt(f"{name}, {way}"):
                rate, memory, wait = measure(args, name, way, run.device, from_memory=False)
                figures = {"images_per_s": round(rate, 1), "peak_MB": memory, "data_wait": round(wait, 2)}
                speeds = run.figures.of("speeds").lines()
                plain = rate if way == "plain loop" else speeds.get(f"{name}, plain loop", {}).get("images_per_s")
                run.figures.write(f"{name}, {way}", **figures, over_plain=round(rate / plain, 2) if plain else None)


def group_of_one(run):
    """Train in a process group of one: accumulated, compiled, three sizes; a run that fails leaves at once."""
    name = run.chosen(["retinanet_resnet50_fpn"])[0]
    several = {} if run.args.tiny else {"min_size": 480}
    flags = run.flags(name, accumulate=2, compile=not run.args.tiny, eval_every=0, **several)
    if several:
        at = flags.index("--min-size")
        flags[at + 2 : at + 2] = ["640", "800"]
    bad = run.flags(name, lr=1e30, eval_every=0, amp=False)
    for case, words, expected in (("loss not finite", bad, 3), ("accumulated, compiled, three sizes", flags, 0)):
        if run.figures.has(case):
            continue
        started = time.monotonic()
        child = multiprocessing.get_context("fork").Process(target=train_in_group, args=(words,))
        child.start()
        child.join()
        run.figures.write(case, code=child.exitcode, expected=expected, seconds=since(started))


def train_in_group(flags):
    """Do what the flags say as the one process of a group, and leave as train.py does."""
    import train
    from process.joining import join_group
    from training import start_up
    from utils import COLLECTIVE_TIMEOUT, Distributed, init_distributed

    def init(device, dist_url):
        here = init_distributed(device, dist_url)
        join_group(0, 1, here.device, dist_url, COLLECTIVE_TIMEOUT)
        return Distributed(0, 0, 1, here.device)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    start_up.init_distributed = init
    train.run_and_leave(flags)


def average_precisions(run):
    """Score one checkpoint on the device and on the CPU, both in whole float32."""
    import torch

    import train

    torch.backends.cudnn.allow_tf32 = False

    folder = run.args.output / "ap"
    flags = {"dataset": "shapes", "batch_size": 8, "opt": "adamw", "lr": 0.002, "epochs": 6, "eval_every": 0}
    flags |= {"lr_scheduler": "cosineannealinglr", "warmup_iters": 40, "output_dir": folder}
    if run.args.tiny:
        flags = {"eval_every": 0, "output_dir": folder}
    if not run.figures.has("trained"):
        started = time.monotonic()
        run.figures.write("trained", code=train.run_as_command(run.flags(SSDLITE, **flags)), seconds=since(started))
    found = {}
    for place, device in (("device", run.args.device), ("cpu", "cpu")):
        scored = folder / f"scored_on_{place}"
        test = {"test_only": True, "resume": folder, "output_dir": scored, "device": device}
        if "dataset" in flags:
            test["dataset"] = "shapes"
        started = time.monotonic()
        code = train.run_as_command(run.flags(SSDLITE, **test))
        line = json.loads((scored / "metrics.jsonl").read_text().splitlines()[-1])
        found[place] = line["bbox"]["AP"]
        run.figures.write(f"on the {place}", code=code, AP=round(found[place], 5), seconds=since(started))
    difference = abs(found["device"] - found["cpu"])
    run.figures.write("difference", AP=round(difference, 5), within=difference <= 0.001)


def out_of_memory(run):
    """Run out of memory: the answer is one line."""
    import torch

    import train

    name = run.chosen([FASTER])[0]
    model, _ = run.model(name)
    if run.device.type == "cuda":
        del model
        torch.cuda.set_per_process_memory_fraction(0.015)
    else:
        held = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmSize"))
        limit = (int(held.split()[1]) << 10) + (200 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    said = io.StringIO()
    with run.figures.attempt("error"), contextlib.redirect_stderr(said):
        code = train.run_as_command(run.flags(name, batch_size=32, workers=0, eval_every=0))
        lines = said.getvalue().splitlines()
        run.figures.write("error", code=code, lines=len(lines), text=lines[-1][:300] if lines else None)


# In the order of their worth, with limits in seconds: the sum is what they may take, not what they should.
STEPS = {
    environment: 30, gpu_tests: 45, dry_runs: 120, nan_batches: 30, slot_batches: 60, verified_resumes: 100, waits: 60,
    speeds: 150, group_of_one: 90, average_precisions: 70, out_of_memory: 20, speeds_of_everything: 180,
}  # fmt: skip
