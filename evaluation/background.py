"""One piece of work at a time beside the main thread, so that a GPU is not left without work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Carries calls out in a thread of its own, in the order of `run`; a ``with`` block ends when all are done.

    At most one call is under way and none waits, so that what they hold in memory stays bounded. An error in a call is
    raised by the next `run` or at the end of the block.
    """

    def __enter__(self) -> "Background":
        """Start the thread."""
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last call; its error counts unless the block has one of its own."""
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Start a call after the one before has ended."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(function, *args)
