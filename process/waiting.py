"""Waits that say what they wait for and can be ended, and signals that end a command.

A wait inside torch's or the system's own code is silent, and Python handles no signal until it returns. So every wait
that depends on another process goes through `wait_until` or `wait_for`: after a second it says what it waits for, it
looks for signals all the time, and it has a limit.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long a wait may stay silent, and how often it is looked at.
SILENT_SECONDS = 1.0
POLL_SECONDS = 0.05

# A wait that began or went on so long after a signal is given up; a shorter one ends by itself, and what comes after
# it sees the wish to stop. Other processes are waited for longer, so that all leave together; a scheduler kills them
# half a minute after its signal.
GRACE_SECONDS = 0.5
GRACE_OF_MEETINGS = 10.0

# Schedulers may send a signal twice at once, to a process and to its group: later than this, a second one is meant.
SECOND_SIGNAL_SECONDS = 0.5

# What ends a command. A training takes SIGUSR1 too: SLURM can be told to send it some time before the end (sbatch
# --signal).
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SIGNALS = (*END_SIGNALS, signal.SIGUSR1)

# What a shell adds to the number of a signal for the exit code of the command that it ended: 130 for Ctrl-C.
EXIT_SIGNAL = 128


class Stopped(KeyboardInterrupt):
    """A signal has ended what this process did; ``signal_name`` says which."""

    def __init__(self, signal_name: str, during: str = "") -> None:
        super().__init__(f"stopped by {signal_name}{during}")
        self.signal_name = signal_name

    @property
    def exit_code(self) -> int:
        """What a shell gives for a command that the signal ended."""
        return EXIT_SIGNAL + signal.Signals[self.signal_name]


class WaitError(ValueError):
    """A wait has reached its limit; the text says for what it was, and what to do."""


@dataclass
class _Wish:
    """What a handler that only notes signals has noted, for the waits of this process to see."""

    signal_name: str | None = None
    since: float = 0.0


_WISH = _Wish()


def noted_signal() -> str | None:
    """Return the name of the signal that has come, None if none has."""
    return _WISH.signal_name


def note_signal(name: str | None) -> None:
    """Tell the waits of this process that a signal has come, or with None that there is none any more."""
    if name is None or _WISH.signal_name is None:
        _WISH.signal_name, _WISH.since = name, time.monotonic()


@contextlib.contextmanager
def signals_raise(numbers: Sequence[signal.Signals] = END_SIGNALS) -> Iterator[None]:
    """Let a signal raise `Stopped` in the block, so that what is half written is removed; a second one ends at once.

    A signal that was noted before raises too. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _WISH.signal_name is not None:
        raise Stopped(_WISH.signal_name)
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise Stopped(signal.Signals(number).name)
        if time.monotonic() - first[0] > SECOND_SIGNAL_SECONDS:
            os._exit(EXIT_SIGNAL + number)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def wait_until(
    is_done: Callable[[float], bool],
    what: str,
    *,
    limit: float,
    advice: str = "",
    silent: float = SILENT_SECONDS,
    grace: float = GRACE_SECONDS,
) -> None:
    """Wait in the open: say for what after a second, end soon after a signal, and give up at a limit.

    Args:
        is_done: Returns whether the wait is over, after at most so many seconds.
        what: What is waited for, as in "waiting for ...".
        limit: Seconds after which the wait is given up.
        advice: What the user can do about it.
        silent: Seconds without a word.
        grace: Seconds that the wait goes on after a signal, for it may end by itself.

    Raises:
        Stopped: A signal has come.
        WaitError: The limit is reached.
    """
    begun = time.monotonic()
    next_word = silent
    advice = f": {advice}" if advice else ""
    while not _is_done_or_stopped(is_done, what):
        now = time.monotonic()
        if _WISH.signal_name is not None and now - max(_WISH.since, begun) > grace:
            raise Stopped(_WISH.signal_name, f" while waiting for {what}")
        if now - begun >= limit:
            raise WaitError(f"waited {_in_words(limit)} for {what}{advice}")
        if now - begun >= next_word:
            left = f"gives up in {_in_words(limit - (now - begun))}"
            logger.warning("waiting for %s (%s)%s", what, left, advice)
            next_word = max(60.0, 2 * (now - begun))


def _is_done_or_stopped(is_done: Callable[[float], bool], what: str) -> bool:
    """Return whether a wait is over. One that fails after a signal was ended by it: the others had left for it too."""
    try:
        return is_done(POLL_SECONDS)
    except Exception as error:
        if _WISH.signal_name is None:
            raise
        raise Stopped(_WISH.signal_name, f" while waiting for {what}") from error


def wait_for(
    function: Callable[[], T], what: str, *, limit: float, advice: str = "", silent: float = SILENT_SECONDS
) -> T:
    """Return ``function()``, which may wait inside code that does not hear signals; see `wait_until`.

    It runs in a thread of its own. One that is given up stays behind: the process is expected to end.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    finished = threading.Event()

    def call() -> None:
        try:
            result.append(function())
        except BaseException as error:  # it belongs to the thread that waits
            failure.append(error)
        finally:
            finished.set()

    threading.Thread(target=call, daemon=True).start()
    wait_until(finished.wait, what, limit=limit, advice=advice, silent=silent)
    if failure:
        raise failure[0]
    return result[0]


def _in_words(seconds: float) -> str:
    """Return a time as minutes, below two as seconds."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
