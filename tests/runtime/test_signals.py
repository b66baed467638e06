"""Which signals end which process of a job."""

import multiprocessing
import subprocess
import sys
import time

import pytest

from runtime.signals import leave_stopping_to_parent


def wait_like_a_loading_process(ready):
    leave_stopping_to_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(sys.platform == "darwin", reason="the sender of a signal is not known there")
def test_a_loading_process_outlives_all_signals_of_a_scheduler_and_ends_at_its_parents_word():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=wait_like_a_loading_process, args=(ready,))
    process.start()
    try:
        assert ready.wait(20)
        for name in ("TERM", "TERM", "INT", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
            time.sleep(0.1)
        assert process.is_alive()
        process.terminate()
        process.join(5)
        assert process.exitcode == 143
    finally:
        process.kill()
