"""A few faults of the matrix in tests/faults/matrix.py, for every test run."""

import random
import signal
import sys

import pytest

from faults.jobs import start
from faults.matrix import FAULTS, MODELS, NUM_IMAGES, Campaign, flags_for, run_without_faults
from faults.writes import count_torn_writes
from helpers.drawn import ROOT, draw_coco

sys.path.insert(0, str(ROOT / "tests"))


@pytest.mark.slow
def test_a_run_that_meets_faults_ends_like_one_that_meets_none(tmp_path):
    """SIGKILL, SIGTERM and a broken checkpoint, each continued with --resume auto, compared by hex and SHA-256."""
    data = draw_coco(tmp_path / "coco", num_images=NUM_IMAGES)
    flags = [*flags_for(MODELS[0], data), "--epochs", "2"]
    reference = run_without_faults(tmp_path / "alone", flags)
    campaign = Campaign(tmp_path / "faults", MODELS[0], flags, reference, random.Random(0))
    chosen = [f for f in FAULTS if f.name.startswith(("P1 ", "P5 SIGTERM to every", "P11"))]
    outcomes = campaign.run(chosen)
    assert len(outcomes) == 4 and [o.problems for o in outcomes] == [[]] * 4
    assert all(o.exact and not o.lost and not o.hang for o in outcomes)


@pytest.mark.slow
def test_no_kill_inside_a_checkpoint_write_loses_it():
    results = count_torn_writes(15, seed=1)
    assert results["this suite"] == (15, 0)
    assert results["plain torch.save"][1] >= 8  # so the kills do hit


@pytest.mark.slow
def test_another_number_of_processes_loses_and_repeats_no_sample(tmp_path):
    """One epoch on two processes, then on one, then on three: fewer, and more."""
    data = draw_coco(tmp_path / "coco", num_images=NUM_IMAGES)
    flags = [*flags_for(MODELS[0], data), "--epochs", "1", "--eval-every", "0"]
    jobs, numbers = [], (2, 1, 3)
    for processes in numbers:
        job = start(tmp_path / str(processes), tmp_path / "out", flags, processes=processes)
        if processes != numbers[-1]:
            assert job.wait_for(lambda job=job: len(job.steps()) >= 2)
            job.processes[0].send_signal(signal.SIGTERM)
        assert job.end(300) == [0] * processes, job.log()
        if jobs:
            before = numbers[len(jobs) - 1]
            assert f"processes {before}, now {processes}" in job.log()
            assert "no sample is lost or repeated" in job.log()
        jobs.append(job)
    batches = {tuple(e["ids"]) for job in jobs for e in job.events("step")}
    assert all(job.events("step") for job in jobs)
    ids = [i for batch in batches for i in batch]
    assert len(ids) == len(set(ids)) == NUM_IMAGES
