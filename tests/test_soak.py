"""A long run in short: what a run holds does not grow from one evaluation to the next, nor from picture to picture."""

import json
import os
import subprocess
import sys

import pytest

from helpers.drawn import ROOT

# What may differ between two looks at a run in which nothing grows: a thread that is just ending, a page of memory.
SLACK = {"memory, MB": 1.1, "shared memory, MB": 1.1, "open files": 1.05, "threads": 1.05, "processes": 1.0}


@pytest.mark.slow
def test_nothing_grows_while_a_run_goes_on(tmp_path):
    figures = tmp_path / "figures.json"
    flags = ["--updates", 32, "--every", 4, "--val-pictures", 4, "--pictures", 200, "--json", figures]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak.py", *map(str, flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())
    found = {(row["command"], row["figure"]): row for row in rows}
    for (command, figure), row in found.items():
        if figure in SLACK:
            assert row["ratio"] <= SLACK[figure], (command, row)
    # Two checkpoints are kept and one evaluation's files: later ones take the place of earlier ones.
    assert found["train.py", "files of the run"]["ratio"] < 1.1
    assert {command for command, _ in found} == {"train.py", "predict.py"}
