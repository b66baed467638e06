"""SIGKILL inside a checkpoint write, again and again: does a readable checkpoint remain?"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from runtime.checkpoint import CheckpointFolder, find_newest

SIZE = 400_000  # float32 values: 1.6 MB


def content(epoch):
    progress = {"epoch": epoch, "batches": 0, "updates": 0}
    return {"model": {"w": torch.full((SIZE,), float(epoch))}, "model_spec": {"name": "x"}, "progress": progress}


def save_ours(folder, epoch):
    saver = CheckpointFolder(folder, keep=2)
    return lambda n: saver.save(content(epoch + n), epoch_done=(epoch + n) % 5)


def read_ours(folder):
    found = find_newest(folder)
    return found is not None and found[1]["progress"]["epoch"]


def save_plain(folder, epoch):
    return lambda n: torch.save(content(epoch + n), folder / "checkpoint.pth")


def read_plain(folder):
    try:
        return torch.load(folder / "checkpoint.pth", weights_only=True)["progress"]["epoch"]
    except Exception:
        return False


def kill_inside_a_save(folder, make_save, epoch, rng):
    """Fork a process that saves without end, and kill it inside a save; returns (whether inside, saves it finished)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        save = make_save(folder, epoch)
        for n in range(1, 1000):
            os.write(write_end, b"(")
            save(n)
            os.write(write_end, b")")
        os._exit(0)
    os.close(write_end)
    begun, marks = time.time(), b""
    while marks.count(b")") < 2:  # how long does a save take?
        marks += os.read(read_end, 1)
    duration = (time.time() - begun) / 2
    os.read(read_end, 1)
    time.sleep(rng.random() * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as rest:
        marks += b"(" + rest.read()
    return marks.endswith(b"("), marks.count(b")")


def count_torn_writes(kills, seed):
    """Return {way of saving: (kills inside a save, how many left nothing readable or something older than the last)}."""
    results = {}
    for name, make_save, read in (("this suite", save_ours, read_ours), ("plain torch.save", save_plain, read_plain)):
        rng = random.Random(seed)
        inside = torn = epoch = 0
        with tempfile.TemporaryDirectory() as folder:
            while inside < kills:
                was_inside, finished = kill_inside_a_save(Path(folder), make_save, epoch, rng)
                epoch += finished
                if was_inside:
                    inside += 1
                    found = read(Path(folder))
                    torn += found is False or found < epoch
                epoch += 1
        results[name] = (inside, torn)
    return results
