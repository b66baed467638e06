"""The position of a run."""

from runtime.progress import Progress


def test_a_run_starts_at_its_beginning_with_nothing_due():
    assert vars(Progress()) == {"epoch": 0, "batches": 0, "updates": 0, "eval_due": False, "skipped": 0}


def test_a_position_is_read_back_and_so_is_that_of_an_older_checkpoint():
    progress = Progress(epoch=3, batches=4, updates=50, eval_due=True, skipped=2)
    assert Progress.from_plain(vars(progress)) == progress
    older = {"epoch": 3, "batches": 4, "updates": 50, "to_score": True}
    assert Progress.from_plain(older) == Progress(3, 4, 50, eval_due=True)
