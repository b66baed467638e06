"""What the benchmarks share: fresh processes, CPU seconds, memory, the machine's description."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def cpu_seconds():
    """User and system time of this process and its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def resident_mb():
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def private_mb(pid="self"):
    """Memory that only this process holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class Measured:
    """Seconds, CPU seconds and peak memory on top of what was there before, of a ``with`` block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before, self.cpu, self.wall = resident_mb(), cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, cpu_seconds() - self.cpu
        peak = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        self.mb = max(int(peak.split()[1]) / 1024 - self.before, 0)


def in_fresh_process(script, *args, threads=1, timeout=3600):
    """Run ``script args...`` in a process of its own; returns what it prints last as json."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env
    )
    if done.returncode:
        raise RuntimeError(f"{script} {args}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    """One line about the day, the hardware and versions."""
    names = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor())
    found = []
    for name in ("torch", "torchvision", "pycocotools", "numpy", "pillow"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{date.today()}, {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, {', '.join(found)}"


def table(rows, columns):
    """Return a markdown table of dicts."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
