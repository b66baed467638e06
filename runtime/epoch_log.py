"""What a run prints while it trains, and the averages it keeps."""

import datetime
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.trackers import StepRecord
from utils import all_reduce_sum, peak_memory_mb, rank, world_size

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


def progress_bar(title: str, total: int, initial: int = 0) -> tqdm:
    """Return a live bar on the terminal; a bar that shows nothing on other processes, in pipes and in files."""
    shows = rank() == 0 and sys.stdout.isatty()
    look = {"file": sys.stdout, "dynamic_ncols": True, "disable": not shows}
    return tqdm(total=total, desc=title, unit="batch", initial=initial, **look)


class EpochLog:
    """Collects one epoch's losses and times; losses stay on the device until they are shown.

    On a terminal they stand beside a live bar, elsewhere in plain lines.

    Args:
        title: Start of the bar, or of every line.
        num_steps: How many are to come.
        print_freq: Steps between lines.
        device: Where losses are.
        first_step: How many of the epoch's steps were taken before.
    """

    def __init__(
        self, title: str, num_steps: int, print_freq: int, device: torch.device, *, first_step: int = 0
    ) -> None:
        self.title, self.num_steps, self.print_freq, self.device = title, num_steps, print_freq, device
        self.first_step = first_step
        self.names: list[str] = []
        self.pending: list[Tensor] = []
        self.totals: Tensor | None = None  # of the losses, and how many batches they are of
        self.count = 0
        self.images = self.images_printed = 0
        self.wait = self.wait_printed = 0.0
        self.start = self.last_print = time.perf_counter()
        self.bar = progress_bar(title, first_step + num_steps, initial=first_step)

    def time_waits(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield ``batches`` and note how long each was waited for."""
        asked_at = time.perf_counter()
        for batch in batches:
            self.wait += time.perf_counter() - asked_at
            yield batch
            asked_at = time.perf_counter()

    def step(self, record: StepRecord) -> None:
        """Note one step."""
        self.names = record.names
        self.pending.append(record.losses)
        self.images += len(record.images)
        self.count += 1
        self.bar.update()
        if self.count % self.print_freq == 0 or self.count == self.num_steps or self.count == 1:
            self._print(record.lr)

    def _flush(self) -> Tensor:
        """Return the mean of the pending losses over steps and ranks, on the CPU, and add them to the totals.

        Batches with a loss that is not finite are left out of both.
        """
        recent = torch.stack(self.pending).to("cpu", torch.float64)
        self.pending = []
        recent = recent[torch.isfinite(recent).all(dim=1)]
        total = all_reduce_sum(torch.cat([recent.sum(dim=0), recent.new_tensor([len(recent)])]))
        self.totals = total if self.totals is None else self.totals + total
        return total[:-1] / total[-1]

    def _bad_batches(self) -> int:
        """Return how many batches of all ranks were left out of the totals."""
        assert self.totals is not None
        return self.count * world_size() - int(self.totals[-1])

    def _print(self, lr: float) -> None:
        recent = self._flush()
        now = time.perf_counter()
        seconds = max(now - self.last_print, 1e-9)
        images = float(all_reduce_sum(torch.tensor([float(self.images - self.images_printed)])))
        waited = (self.wait - self.wait_printed) / seconds
        eta = datetime.timedelta(seconds=int((now - self.start) / self.count * (self.num_steps - self.count)))
        assert self.totals is not None
        mean = self.totals[:-1] / self.totals[-1]
        terms = [f"{name}: {a:.4f} ({b:.4f})" for name, a, b in zip(self.names, recent, mean)]
        head = [f"lr: {lr:.6f}", f"loss: {recent.sum():.4f} ({mean.sum():.4f})"]
        tail = [f"img/s: {images / seconds:.1f}", f"data wait: {waited:.0%}"]
        if self.device.type == "cuda":
            tail.append(f"max mem: {peak_memory_mb(self.device)} MB")
        if bad := self._bad_batches():
            tail.append(f"bad batches: {bad}")
        if self.bar.disable:
            place = f"[{self.first_step + self.count}/{self.first_step + self.num_steps}]"
            line = [f"{self.title} {place}", f"eta: {eta}", *head, *terms, *tail]
            logger.info("%s", "  ".join(line))
        else:
            self.bar.set_postfix_str("  ".join([*head, *tail]), refresh=False)
        self.last_print, self.images_printed, self.wait_printed = now, self.images, self.wait

    def finish(self) -> dict[str, float]:
        """Return the epoch's averages: ``loss``, each term, ``img_per_s``, ``data_wait`` (a share), ``seconds``.

        Where there were some also ``bad_batches``: how many, over all ranks, had a loss that was not finite. They are
        left out of the means; where all are, there is no loss.
        """
        if self.pending:
            self._flush()
        self.bar.close()
        seconds = max(time.perf_counter() - self.start, 1e-9)
        images = float(all_reduce_sum(torch.tensor([float(self.images)])))
        averages = {"seconds": seconds, "img_per_s": images / seconds, "data_wait": self.wait / seconds}
        if self.totals is not None:
            if bad := self._bad_batches():
                averages["bad_batches"] = float(bad)
            if self.totals[-1]:
                mean = (self.totals[:-1] / self.totals[-1]).tolist()
                averages = {"loss": sum(mean), **dict(zip(self.names, mean)), **averages}
        if self.device.type == "cuda":
            averages["max_mem_mb"] = float(peak_memory_mb(self.device))
        return averages
