"""The end of a process that must not wait for anything."""

import contextlib
import multiprocessing
import os
import signal
import sys


def end_process(code: int) -> None:
    """Leave with an exit code, at once: Python would wait for a loading process that is stuck, for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full
            stream.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler complains of loading processes that are killed
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
