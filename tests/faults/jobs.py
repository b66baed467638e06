"""Runs of tests/faults/faulty_train.py as a user starts them, watched from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from helpers.forked import Forked, run_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "faults" / "faulty_train.py"

# Seconds that processes wait for each other; more of them on a machine that is busy with other things.
PATIENCE = float(os.environ.get("FAULT_PATIENCE", "20"))
# A run that has not ended so long after its fault hangs.
HANG_SECONDS = 3 * PATIENCE


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Job:
    """A running job: its processes (one launcher, or one per rank) and what they leave behind."""

    folder: Path
    processes: list[subprocess.Popen | Forked] = field(default_factory=list)
    out: Path = Path()
    stopped: list[int] = field(default_factory=list)
    restarts: int | None = None
    recovered_in: float | None = None

    def events(self, kind=None):
        """Return the traced events of all processes in order of time."""
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    found.append({"rank": int(path.stem), **json.loads(line)})
                except ValueError:  # cut off by a kill
                    continue
        return sorted((e for e in found if kind in (None, e["event"])), key=lambda e: e["time"])

    def steps(self, rank=0):
        return [event for event in self.events("step") if event["rank"] == rank]

    def pids(self):
        """Return the newest process of every rank."""
        return {event["rank"]: event["pid"] for event in self.events("start")}

    def log(self):
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log*")))

    def wait_for(self, condition, seconds=2 * HANG_SECONDS):
        """Poll until ``condition()`` holds; returns whether it came before the end of the job or of the time."""
        end = time.time() + seconds
        while time.time() < end:
            if condition():
                return True
            if all(p.poll() is not None for p in self.processes):
                return bool(condition())
            time.sleep(0.005)
        return False

    def end(self, seconds=HANG_SECONDS):
        """Wait for the end; returns the exit codes, or None after killing a job that hangs."""
        deadline = time.time() + seconds
        hangs = False
        for process in self.processes:
            try:
                process.wait(max(deadline - time.time(), 0.01))
            except subprocess.TimeoutExpired:
                hangs = True
        if hangs:
            self.kill()
        return None if hangs else [process.returncode for process in self.processes]

    def kill(self):
        """End what is left of the job: its own processes only."""
        for pid in [*self.pids().values(), *(p.pid for p in self.processes)]:
            for member in [*children(pid), pid]:
                send(member, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def children(pid):
    try:
        return [int(v) for v in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def loading_processes(pid):
    """Return the DataLoader workers of a training process: all that it has started but Python's resource tracker."""
    return [c for c in children(pid) if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()]


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def start(folder, out, flags, *, processes=2, torchrun=None, env=None, prefix=()):
    """Start ``faulty_train.py``: one process per rank, or by torchrun with the given flags.

    Without torchrun and ``prefix`` the processes are copies of a server that has imported torch.
    """
    folder.mkdir(parents=True)
    job = Job(folder, out=out)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT_TRACE": str(folder), **(env or {})}
    command = [str(SCRIPT), *map(str, flags), "--output-dir", str(out)]

    def popen(arguments, name, **more):
        log = (folder / f"log{name}").open("w")
        return subprocess.Popen(
            [*prefix, sys.executable, *arguments], env={**settings, **more}, stdout=log, stderr=log, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip

    if torchrun is not None:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun]
        job.processes.append(popen([*launcher, *command], ""))
        return job
    port = str(free_port())
    for rank in range(processes):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        if prefix:
            job.processes.append(popen(command, rank, **more))
        else:
            job.processes.append(Forked(folder / f"log{rank}", run_script, *command, env={**settings, **more}))
    return job
