"""Where log lines go, and what becomes of them where nobody reads them or a disk is full."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

# Rooms and files whose warnings may differ between the processes of a machine. All others warn of data, flags and
# models, which are the same there: eight processes would say each line eight times.
OF_EACH_PROCESS = ("process", "runtime.step_guard")


def is_of_each_process(record: logging.LogRecord) -> bool:
    """Tell whether a line is worth saying by every process of a machine; an error always is."""
    of_each = any(f"{record.name}.".startswith(f"{name}.") for name in OF_EACH_PROCESS)
    return of_each or record.levelno >= logging.ERROR


class LinesAboveBars(logging.StreamHandler):
    """Writes lines above a progress bar, if there is one, and as they are otherwise.

    Args:
        stream: Where to.
        on_lost: Called with the error when the stream takes no more lines: a closed pipe, a full disk.
    """

    def __init__(self, stream: TextIO, on_lost: Callable[[OSError], None]) -> None:
        super().__init__(stream)
        self.on_lost = on_lost

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except OSError as error:
            close_stdout()
            self.on_lost(error)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """A log file that says once, in one line, that its disk takes no more."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say what became of a line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.lost:
            self.lost = True
            print(f"{self.baseFilename}: {error.strerror}; lines are missing from here on", file=sys.stderr)


def close_stdout() -> None:
    """Let what is still to be printed vanish: nobody reads it, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
