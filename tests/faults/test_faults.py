"""A few faults of the matrix in tests/faults/matrix.py, for every test run."""

import random
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


def test_no_kill_inside_a_checkpoint_write_loses_it():
    results = count_torn_writes(15, seed=1)
    assert results["this suite"] == (15, 0)
    assert results["plain torch.save"][1] >= 8  # so the kills do hit


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_processes_loses_and_repeats_no_sample(tmp_path, before, after):
    data = draw_coco(tmp_path / "coco", num_images=NUM_IMAGES)
    flags = [*flags_for(MODELS[0], data), "--epochs", "1", "--eval-every", "0"]
    import signal

    first = start(tmp_path / "first", tmp_path / "out", flags, processes=before)
    assert first.wait_for(lambda: len(first.steps()) >= 2)
    first.processes[0].send_signal(signal.SIGTERM)
    assert first.end() == [0] * before
    second = start(tmp_path / "second", tmp_path / "out", flags, processes=after)
    assert second.end(300) == [0] * after, second.log()
    assert f"processes {before}, now {after}" in second.log() and "no sample is lost or repeated" in second.log()
    batches = {tuple(e["ids"]) for job in (first, second) for e in job.events("step")}
    ids = [i for batch in batches for i in batch]
    assert len(ids) == len(set(ids)) == NUM_IMAGES
