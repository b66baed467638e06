"""train.py as it is, with a trace of every step, short patience, and faults that cannot be made from outside.

``FAULT_TRACE`` names a folder: every process appends events to a file of its own there. ``FAULT_NAN`` is "rank step": so
many steps after its start this process's loss becomes NaN, once. ``FAULT_PLAIN_GROUP`` makes the process group in the
usual way, for comparison. ``FAULT_PATIENCE``: seconds that processes wait for each other.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

import engine
import train
import utils
from loading import loaders
from runtime import machine
from runtime.trackers import Tracker
from training import evaluate_model, start_up

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))
FOLDER = Path(os.environ["FAULT_TRACE"])


def note(event, **values):
    line = {"event": event, "pid": os.getpid(), "time": time.time(), **values}
    with (FOLDER / f"{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class TracingGuard(engine.StepGuard):
    """Makes a loss NaN where the fault says so."""

    steps = 0

    def reduce_flags(self, losses):
        rank, step = (int(v) for v in os.environ.get("FAULT_NAN", "-1 -1").split())
        if rank == RANK and step == TracingGuard.steps:
            losses[0] = float("nan")
        TracingGuard.steps += 1
        return super().reduce_flags(losses)


class StepTracer(Tracker):
    """Notes what every step computed before the processes agree on it."""

    def on_step(self, record):
        losses = [value.hex() for value in record.losses.tolist()]
        note("step", epoch=record.epoch, ids=[t["image_id"] for t in record.targets], losses=losses)


def traced(function):
    return lambda *args, trackers, **kwargs: function(*args, trackers=[*trackers, StepTracer()], **kwargs)


def noted(event, function):
    def run(*args, **kwargs):
        note(event)
        return function(*args, **kwargs)

    return run


def plain_group(device, dist_url="env://"):
    dist.init_process_group("gloo")
    return utils.Distributed(dist.get_rank(), RANK, dist.get_world_size(), device)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    note("start", restarts=os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    engine.StepGuard = TracingGuard
    train.train_one_epoch = traced(train.train_one_epoch)
    evaluate_model.evaluate = noted("evaluation", evaluate_model.evaluate)
    train.load_data = noted("data", train.load_data)
    patience = float(os.environ.get("FAULT_PATIENCE", "20"))
    utils.COLLECTIVE_TIMEOUT, loaders.WORKER_TIMEOUT_SECONDS = datetime.timedelta(seconds=patience), 0.4 * patience
    machine.HANG_SECONDS = 1.5 * patience
    if "FAULT_PLAIN_GROUP" in os.environ:
        start_up.init_distributed = plain_group
    train.run_and_leave()
