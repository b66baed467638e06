"""What has to be seen on a GPU, in twelve minutes: correct, exact, without waits, how fast.

    python benchmarks/on_gpu.py --data-path /data/small_coco --wheels wheels/*.whl --output gpu_results
    python benchmarks/on_gpu.py --data-path /data/small_coco --device cpu --tiny --output tried      # without a GPU

It needs this repository, torch and torchvision, a folder in COCO's layout with some fifty images, and wheels of what the
machine lacks, made for its Python; the first step says what that is. Steps run one after the other, each in a process of its own with a time limit. Every figure is written to
DIR/figures.jsonl at once and DIR/figures.md is written after each step, so the run may be cut anywhere. The same command
goes on from there: what is measured stays, what failed is tried again. What a step printed is in DIR/<step>.log.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from common import cpu_seconds, machine, table
from gpu_steps import STEPS, Run, environment, since

from process.device import use_device

IN_ORDER = "in good order"


class Figures:
    """The figures of one step, in a file that all steps share: a line each, written at once.

    Args:
        path: The file.
        step: Name of the step.
        started: When this run began: what failed in an earlier one is tried again.
    """

    def __init__(self, path, step, started):
        self.path, self.step, self.started = path, step, started

    def lines(self):
        """Return the lines of this step, one for each name: the newest."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that was cut while it was written
                lines.append(json.loads(text))
        return {line["name"]: line for line in lines if line["step"] == self.step}

    def of(self, step):
        """Return the figures of another step."""
        return Figures(self.path, step, self.started)

    def has(self, name):
        """Tell whether there is nothing to do for ``name``."""
        line = self.lines().get(name)
        return line is not None and ("failed" not in line or line["run"] == self.started)

    def write(self, name, **figures):
        is_cut = self.path.exists() and not self.path.read_text().endswith("\n")
        with self.path.open("a") as file:
            line = json.dumps({"step": self.step, "name": name, "run": self.started, **figures})
            file.write("\n" * is_cut + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(self.step, name, figures, flush=True)

    @contextlib.contextmanager
    def attempt(self, name):
        """Note what goes wrong in a ``with`` block; a process whose GPU has failed is of no use any more."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = (str(error).splitlines() or [""])[0]
            self.write(name, failed=f"{type(error).__name__}: {text}"[:300], seconds=since(started))
            if "CUDA error" in str(error):
                sys.stdout.flush()
                os._exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="a small folder in COCO's layout")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="figures and logs go here")
    parser.add_argument("--wheels", type=Path, nargs="+", default=[], help="of what this machine lacks")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a trial: small pictures, few steps, nothing compiled")
    parser.add_argument("--steps", nargs="+", choices=[step.__name__ for step in STEPS], help="only these")
    parser.add_argument("--models", nargs="+", help="only these; default: the nine")
    parser.add_argument("--minutes", type=float, default=12, help="start no step that could end after so many")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.output, args.data_path = args.output.resolve(), args.data_path.resolve()
    install(args.wheels, args.output / "site")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not spoil this process's forks
    logging.basicConfig(level=logging.INFO)

    started, path = time.time(), args.output / "figures.jsonl"
    for step, limit in STEPS.items():
        if args.steps and step.__name__ not in args.steps:
            continue
        figures = Figures(path, step.__name__, started)
        ended = figures.lines().get("")
        has_failed = any("failed" in line for line in figures.lines().values())
        if ended is not None and ended["ended"] == IN_ORDER and not has_failed:
            continue
        if step is not environment and not load(args, figures):
            continue
        left = args.minutes * 60 - (time.time() - started)
        if left < 10:
            print(f"{step.__name__}: no time left")
            continue
        run_step(step, args, figures, left if args.tiny else min(limit, left))
        write_tables(path, args.output / "figures.md")
    print((args.output / "figures.md").read_text())


def load(args, figures):
    """Import what the steps need, once for all: they are forks of this process, which never touches the GPU itself.

    Returns:
        Whether it is all there; what is not is noted as the end of the step.
    """
    try:
        import gpu  # noqa: F401

        import train  # noqa: F401
        from models.architectures import ARCHITECTURES
    except ImportError as error:
        figures.write("", ended=f"not begun: {error}")
        return False
    args.models = args.models or [name for name in ARCHITECTURES if not name.endswith("_v2")]
    return True


def install(wheels, folder):
    """Unpack wheels into a folder of their own and let this process and its children find them."""
    if wheels and not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", folder, *wheels]
        if subprocess.run(list(map(str, command)), check=False).returncode:
            print("the wheels are not installed: they are for another Python or system", flush=True)
    if folder.exists():
        sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def run_step(step, args, figures, limit):
    """Run a step in a process of its own; after a failure of the GPU once more for what is left of it."""
    started, cpu, known = time.monotonic(), cpu_seconds(), -1
    while True:
        child = multiprocessing.get_context("fork").Process(target=work, args=(step, args, figures))
        child.start()
        child.join(max(1, limit - (time.monotonic() - started)))
        ended = IN_ORDER if child.exitcode == 0 else f"with exit code {child.exitcode}"
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
            ended = f"cut after {limit:.0f} s"
        elif child.exitcode and len(figures.lines()) > known and time.monotonic() - started < limit:
            known = len(figures.lines())
            continue
        return figures.write("", ended=ended, seconds=since(started), cpu_s=round(cpu_seconds() - cpu, 1))


def work(step, args, figures):
    """Do a step in this process: a group of its own, with its output in a log."""
    os.setsid()
    log = (args.output / f"{step.__name__}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    run = Run(args, figures)
    use_device(run.device)  # as every command does, before anything else asks for the GPU
    step(run)


def write_tables(path, to):
    """Write all figures so far as tables in markdown."""
    text = [f"{machine()}\n"]
    for step in STEPS:
        lines = Figures(path, step.__name__, None).lines()
        if not lines:
            continue
        end = lines.pop("", None)
        text.append(f"## {step.__name__}\n\n{step.__doc__}")
        text.append(
            f"Ended {end['ended']} after {end['seconds']} s ({end['cpu_s']} s of CPU).\n" if end else "Not ended.\n"
        )
        hidden = ("step", "run")
        rows = [{k: v for k, v in row.items() if k not in hidden and v is not None} for row in lines.values()]
        if rows:
            text.append(table(rows, list(dict.fromkeys(column for row in rows for column in row))) + "\n")
    to.write_text("\n".join(text))


if __name__ == "__main__":
    main()
