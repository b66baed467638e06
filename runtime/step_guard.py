"""What all ranks agree on in every step: is a loss not finite, and was someone asked to stop.

Nothing here waits for a GPU but `may_save`: flags are read on the host one step late, when they have long arrived.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from files import write_aside, write_torch_file
from optimization.step import StepOptions
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.trackers import StepRecord
from utils import all_reduce_max, describe_error, rank

logger = logging.getLogger(__name__)

# So many updates in a row may be skipped before the run is given up.
MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the text names term, step, rate and image ids."""


@dataclass
class Verdict:
    """What the flags of a step say, once they are on the host.

    Attributes:
        record: The step.
        stop: Whether a rank was asked to stop.
        bad_loss: Whether a loss was not finite, on any rank; a bad step without one has a bad gradient.
        is_bad: Whether that is to be reported.
        given_up: Whether too many updates in a row were skipped.
    """

    record: StepRecord
    stop: bool
    bad_loss: bool
    is_bad: bool
    given_up: bool


@dataclass
class StepGuard:
    """Brings the ranks' flags together and acts on them.

    An update with a loss or gradient that is not finite is not made in the first place, since the optimizer reads the
    flag on the device; the host hears of it afterwards.

    Flags are read as late as they may be, and acted on in the same step on all ranks, even where one of them has read
    them earlier (`may_save`).

    Attributes:
        device: Where losses are.
        stop: This process's own wish to stop.
        progress: Counts the updates skipped in a row, over epochs.
        options: Says with ``on_nan`` whether a bad step ends the run, and where its batch is saved.
        stopping: Whether a rank was asked to stop.
    """

    device: torch.device
    stop: StopRequest
    progress: Progress
    options: StepOptions
    stopping: bool = False
    _flags: Tensor = field(default_factory=lambda: torch.zeros(2))  # of the newest step
    _non_finite: Tensor | None = None  # in the update that is under way, on the device
    _has_bad_loss: bool = False  # the same, of those that have arrived on the host
    _waiting: list[tuple[Tensor, StepRecord]] = field(default_factory=list)  # on their way to the host
    _read: list[Verdict] = field(default_factory=list)  # of later steps than those acted on

    def reduce_flags(self, losses: Tensor) -> Tensor:
        """Reduce a step's flags over the ranks, on the device.

        Args:
            losses: float32 [terms], of this rank's step.

        Returns:
            float, on the device: 1 if any loss of any rank since the last update is not finite.
        """
        bad = (~torch.isfinite(losses).all()).to(torch.float32)
        self._flags = all_reduce_max(torch.stack([bad, torch.full_like(bad, float(bool(self.stop)))]))
        non_finite = self._flags[0]
        self._non_finite = non_finite if self._non_finite is None else torch.maximum(self._non_finite, non_finite)
        return self._non_finite

    def enqueue(self, record: StepRecord, skipped: Tensor | None) -> None:
        """Send the flags of the step that was reduced last to the host, without waiting.

        Args:
            record: The step whose flags these are; it is named if one of them is set.
            skipped: float, on the device: 1 if the update was skipped, from `update_parameters`; None for a step
                without one. The same on all ranks, as the gradients are.
        """
        flags = torch.cat([self._flags, self._flags.new_zeros(1) if skipped is None else skipped[None]])
        on_host = flags.to("cpu", non_blocking=self.device.type != "mps")  # MPS does not order such copies
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            on_host.arrived = event  # type: ignore[attr-defined]
        self._waiting.append((on_host, record))
        if record.is_update:
            self._non_finite = None

    def handle_arrived(self, *, wait: bool = False) -> None:
        """Act on the flags that are due: set ``stopping``, report losses and gradients that are not finite.

        Args:
            wait: Also for those that a GPU has not sent yet.

        Raises:
            NonFiniteLossError: See `report_bad_step`.
        """
        lag = 1 if self.device.type == "cuda" and not wait else 0
        while len(self._read) + len(self._waiting) > lag:
            if not self._read:
                self._read_next()
            verdict = self._read.pop(0)
            self.stopping |= verdict.stop
            if verdict.is_bad:
                report_bad_step(verdict.record, verdict.bad_loss, verdict.given_up, self.options)

    def may_save(self) -> bool:
        """Return whether the run goes on from here, for all that the steps so far say: else their batches are not done.

        Waits for the device, on this process alone: nothing is acted on earlier than on other ranks.
        """
        while self._waiting:
            self._read_next()
        return not any(verdict.is_bad and ends_run(verdict.given_up, self.options) for verdict in self._read)

    def _read_next(self) -> None:
        """Read the flags of the next step, and count skipped updates."""
        flags, record = self._waiting.pop(0)
        if self.device.type == "cuda":
            flags.arrived.synchronize()  # type: ignore[attr-defined]
        bad_loss, stop, skipped = (flag > 0 for flag in flags.tolist())
        self._has_bad_loss |= bad_loss
        if record.is_update:
            self.progress.skipped = self.progress.skipped + 1 if skipped else 0
        given_up = self.progress.skipped >= MAX_SKIPPED_IN_A_ROW
        is_news = bad_loss or (skipped and not self._has_bad_loss)
        # In float16 an overflow belongs to the scaler, which skips the update and lowers its scale.
        is_bad = given_up or (is_news and self.options.scaler is None)
        self._read.append(Verdict(record, stop, bad_loss, is_bad, given_up))
        if record.is_update:
            self._has_bad_loss = False


def ends_run(given_up: bool, options: StepOptions) -> bool:
    """Return whether a bad step ends the run, as too many updates in a row were skipped or the user wants it so."""
    return given_up or options.on_nan == "stop"


def on_cpu(value: Any) -> Any:
    """Return copies of tensors, in whatever dicts and lists, on the CPU.

    A saved batch is read on machines without a GPU too, and torch saves no views of one memory as several types, which
    the fields of a batch are.
    """
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value


def report_bad_step(record: StepRecord, is_loss: bool, given_up: bool, options: StepOptions) -> None:
    """Say which loss, or that the gradient, was not finite and on which images.

    Args:
        record: The step that was not finite.
        is_loss: Whether it was a loss, on any rank; else the gradient.
        given_up: Whether too many updates in a row were skipped.
        options: ``on_nan`` is read, and ``debug_folder``: the batch is saved there.

    Raises:
        NonFiniteLossError: With ``on_nan`` stop, or if ``given_up``.
    """
    values = dict(zip(record.names, record.losses.tolist()))
    here = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    ids = [target["image_id"] for target in record.targets]
    what = f"loss not finite ({', '.join(here) or 'on another process'})" if is_loss else "gradient not finite"
    text = f"epoch {record.epoch} step {record.step}: {what}, learning rate {record.lr:.6g}, image ids {ids}"
    if (here or not is_loss) and options.debug_folder is not None:
        path = options.debug_folder / f"bad_batch_epoch{record.epoch}_step{record.step}_rank{rank()}.pt"
        try:
            with write_aside(path) as temporary, temporary.open("wb") as file:
                content = {"images": record.images, "targets": record.targets, "losses": values}
                write_torch_file(on_cpu(content), file)
            text += f"; the batch is in {path}"
        except OSError as error:
            text += f"; the batch could not be saved ({describe_error(error)})"
    if ends_run(given_up, options):
        hint = "lower --lr, lengthen --warmup-iters, or set --clip-grad-norm; --on-nan skip goes on without the batch"
        raise NonFiniteLossError(f"{text}; {hint}")
    logger.warning("%s; the update is skipped", text)
