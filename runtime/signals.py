"""Being asked to stop: signals, the agreement of all processes on it, and the end of the launcher."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch

from process.waiting import EXIT_SIGNAL, STOP_SIGNALS, note_signal
from utils import all_reduce_max

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Set by a signal, looked at by the training loop and by waits for other processes: a handler only raises a flag.

    A second Ctrl-C ends the process at once, without saving.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.signal_name is not None

    def install(self) -> None:
        """Handle `STOP_SIGNALS` in this process, from the first call on.

        Outside the main thread, which alone hears signals, nothing happens.
        """
        if self._before:
            return
        note_signal(None)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def remove(self) -> None:
        """Let signals do again what they did before; Ctrl-C raises where it ended the process, as while torch loads."""
        note_signal(None)
        for number, handler in self._before.items():
            raises = number == signal.SIGINT and handler is signal.SIG_DFL
            signal.signal(number, signal.default_int_handler if raises else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            os._exit(EXIT_SIGNAL + number)
        self.note(signal.Signals(number).name)

    def note(self, name: str) -> None:
        """Take ``name`` for the reason to stop."""
        self.signal_name = name
        note_signal(name)


def agree_to_stop(stop: StopRequest) -> bool:
    """Return whether any process was asked to stop; all processes must call it."""
    return bool(all_reduce_max(torch.tensor([float(bool(stop))])))


def leave_stopping_to_parent() -> None:
    """Make a loading process outlive the signals that a scheduler sends to all processes of a job, however often.

    The process that it loads for needs it until the checkpoint is written, and ends it then: a SIGTERM from there ends
    it, as that is how multiprocessing removes one that is stuck. SLURM sends two to a job that it preempts.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "darwin":  # it does not say who has sent a signal: the second one ends the process
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for all threads that it will have
        threading.Thread(target=_end_at_wish_of_parent, daemon=True).start()


def _end_at_wish_of_parent() -> None:
    """Wait for a SIGTERM of the process that has started this one, and end."""
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (parent.pid if parent else os.getppid()):
        pass
    os._exit(EXIT_SIGNAL + signal.SIGTERM)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies, so that no orphan goes on writing checkpoints."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
