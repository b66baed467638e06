"""The start of a training process: signals, log, the other processes, determinism; and errors that are the user's."""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

from process.device import choose_device
from process.joining import launched_ranks
from runtime.machine import prepare_process
from runtime.signals import StopRequest, die_with_parent
from utils import Distributed, describe_error, init_distributed, setup_logging

logger = logging.getLogger(__name__)


class SetUpError(Exception):
    """Something the user can put right, found before training started; the text is for them."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn the errors that set-up raises for users into `SetUpError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SetUpError(describe_error(error)) from error


def start_process(stop: StopRequest, *, device: str | None, dist_url: str, deterministic: bool) -> Distributed:
    """Join the other processes and set up signals, log and determinism.

    Args:
        stop: Is told of signals from now on.
        device: Name of the torch device, or None, see `choose_device`.
        dist_url: Where processes meet.
        deterministic: Refuse operations whose results vary from run to run.

    Raises:
        SetUpError: There is no such device, or the processes do not meet.
    """
    prepare_process()
    stop.install()
    setup_logging(launched_ranks()[0] == 0, on_lost=lambda error: _end_of_log(error, stop))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    with errors_in_one_line():
        distributed = init_distributed(choose_device(device), dist_url)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return distributed


def _end_of_log(error: OSError, stop: StopRequest) -> None:
    """Stop as for a signal when the reader of the log has gone, as with ``| head``; a full disk costs lines only."""
    if isinstance(error, BrokenPipeError):
        stop.note("SIGPIPE")
