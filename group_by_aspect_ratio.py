"""Which images form a batch, in which order, on which process: a pure function of seed and epoch.

An epoch is one global list of batches, the same on every process. Process r of W takes batches r, r + W,
r + 2 W, ...; a run that goes on with another W picks the list up where it stopped and neither loses nor repeats
a sample.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from utils import seeded_numpy_rng

logger = logging.getLogger(__name__)

# Repeat factors are counted in such units: their sums are exact, in whatever order they are added.
ONE = 1 << 32

# Images of one group are sorted by aspect ratio inside windows of so many batches: less padding, and still
# about as random as without.
SORT_WINDOW = 64


def aspect_ratio_edges(k: int) -> np.ndarray:
    """Return the group edges of ``--aspect-ratio-group-factor k``, as in torchvision's scripts.

    2 ** t for 2 k + 1 values t evenly spaced in -1..1, and just 1.0 for k = 0.
    """
    return 2.0 ** np.linspace(-1, 1, 2 * k + 1) if k > 0 else np.ones(1)


def group_by_aspect_ratio(heights: np.ndarray, widths: np.ndarray, k: int) -> np.ndarray:
    """Return the group of every image, int64 [N]; 2 k + 2 groups of width / height, one for a negative k."""
    if k < 0:
        return np.zeros(len(heights), dtype=np.int64)
    return np.searchsorted(aspect_ratio_edges(k), widths / heights, side="right")


def format_groups(groups: np.ndarray, k: int) -> str:
    """Return one line with the edges and the number of images in each non-empty group."""
    edges = [0.0, *aspect_ratio_edges(k).tolist(), float("inf")] if k >= 0 else [0.0, float("inf")]
    counts = np.bincount(groups, minlength=len(edges) - 1)
    parts = [f"{edges[g]:.3g}-{edges[g + 1]:.3g}: {n}" for g, n in enumerate(counts) if n]
    return "aspect ratio (width / height) groups: " + ", ".join(parts)


class GroupedBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches of images of similar shape; each item is (epoch, index), so that a worker can seed the sample.

    With ``repeats`` an image may come several times in an epoch; its items after the first are (epoch, index, k), for
    the k-th time again. Image i comes ``repeats[i]`` times, and where that is no whole number once more in so many
    epochs as its fraction says.

    Every epoch is shuffled, split by group, sorted by aspect ratio inside windows of `SORT_WINDOW` batches and
    cut into batches, which are shuffled again. What is left of each group fills batches together with the
    groups next to it. Only the last ``N % batch_size`` images of the shuffled list are left out, others in every epoch
    (with ``repeats`` of the list's own length, and one more at the most). All processes get the same number of batches:
    where the list does not divide, the last step repeats batches with a weight of 0, see `weight`.

    Args:
        heights: int [N].
        widths: int [N].
        group_factor: k of `group_by_aspect_ratio`; negative for no groups.
        batch_size: Images per batch and process. With fewer images than ``batch_size * world_size`` it is
            reduced so that every process has a batch.
        seed: The run's random seed; with the epoch it gives the order of the images.
        repeats: float64 [N], how often each image comes in an epoch, on average, at least 1; None: once.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: There are fewer images than processes, or none.
    """

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        *,
        group_factor: int,
        batch_size: int,
        seed: int,
        repeats: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        num_images = len(heights)
        if num_images < world_size:
            raise ValueError(
                f"{num_images} training image(s) for {world_size} process(es); every process needs at least one, "
                "start fewer processes or add images"
            )
        self.ratios = (np.asarray(widths) / np.asarray(heights)).astype(np.float32)
        self.group_factor = group_factor
        self.groups = group_by_aspect_ratio(heights, widths, group_factor)
        self.sorts = group_factor >= 0
        self.batch_size = min(batch_size, num_images // world_size)
        if self.batch_size < batch_size:
            logger.warning(
                "%d training images are fewer than %d per process times %d: the batch size becomes %d",
                *(num_images, batch_size, world_size, self.batch_size),
            )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.repeats = np.full(num_images, ONE) if repeats is None else np.round(repeats * ONE).astype(np.int64)
        # The same in every epoch: the learning rate counts updates per epoch, a checkpoint the batches that are done.
        self.num_batches = int(self.repeats.sum()) // ONE // self.batch_size
        self.set_epoch(0)

    def to_plain(self) -> dict[str, Any]:
        """Return what the order of the batches follows from, as plain values; processes do not matter."""
        shapes = hashlib.sha256(self.ratios.tobytes()).hexdigest()[:16]
        sizes = {"training images": len(self.ratios), "batch size": self.batch_size, "seed": self.seed}
        repeats = hashlib.sha256(self.repeats.tobytes()).hexdigest()[:16] if (self.repeats != ONE).any() else None
        return {**sizes, "groups": self.group_factor, "shapes of the images": shapes, "repeat factors": repeats}

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and how many batches of its global list are done already."""
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def first_step(self) -> int:
        """How many steps such processes take for the batches that are done already: the next step's number."""
        return -(-self.first_batch // self.world_size)

    def __len__(self) -> int:
        """Return the number of batches that this process still has in the epoch."""
        return -(-(self.num_batches - self.first_batch) // self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        """Yield this process's batches as lists of (epoch, index) and (epoch, index, k)."""
        batches, times = self._make_epoch(self.epoch)
        for step in range(len(self)):
            number = self.batch_number(step) % self.num_batches
            items = zip(batches[number].tolist(), times[number].tolist())
            yield [(self.epoch, index, k) if k else (self.epoch, index) for index, k in items]

    def batch_number(self, step: int) -> int:
        """Return which batch of the global list this process has in ``step``; past its end where it repeats one."""
        return self.first_batch + step * self.world_size + self.rank

    def done_after(self, steps: int) -> int:
        """Return how many batches of the global list are done after ``steps`` steps of this epoch."""
        return min(self.first_batch + steps * self.world_size, self.num_batches)

    def weight(self, step: int, accumulate: int = 1) -> float:
        """Return the factor of this process's loss in ``step`` so that an update averages over real batches.

        An update takes ``accumulate`` steps of all processes; gradients are averaged over processes and added
        over steps. Full updates have 1 / accumulate; a last, shorter one more; a repeated batch 0.
        """
        start = self.first_batch + (step // accumulate) * accumulate * self.world_size
        real = min(accumulate * self.world_size, self.num_batches - start)
        exists = self.batch_number(step) < self.num_batches
        return self.world_size / real if exists else 0.0

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """Return the global list of an epoch, int64 [num_batches, batch_size]."""
        return self._make_epoch(epoch)[0]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of an epoch, sorted, and for the how many-th time each comes, both int64 [D].

        The fractions are laid end to end in an order of the epoch's own, and an image comes once more where its piece
        holds a mark; marks are 1 apart and begin at random. So the probability is the fraction itself, and the number
        of marks is the sum of the fractions, up or down: epochs differ by one image, which the last batch leaves out.
        """
        rng = seeded_numpy_rng(self.seed, "repeats", epoch)
        order = rng.permutation(len(self.repeats))
        times, fractions = np.divmod(self.repeats, ONE)
        ends = rng.integers(ONE) + np.cumsum(fractions[order])
        times[order] += np.diff(ends // ONE, prepend=0)
        images = np.repeat(np.arange(len(times)), times)
        return images, np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the global list of an epoch and for the how many-th time each image comes, from 0."""
        rng = seeded_numpy_rng(self.seed, "order", epoch)
        images, times = self._draw(epoch)
        order = rng.permutation(len(images))[: self.num_batches * self.batch_size]
        groups = self.groups[images[order]]
        by_group = np.argsort(groups, kind="stable")
        order, groups = order[by_group], groups[by_group]

        counts = np.bincount(groups)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        in_full_batch = place < np.repeat(counts // self.batch_size * self.batch_size, counts)
        rest, full = order[~in_full_batch], order[in_full_batch]
        if self.sorts:
            window = place[in_full_batch] // (SORT_WINDOW * self.batch_size)
            # An image that comes again has the ratio of the first: sorted by it alone they would fill a batch together.
            keys = (self.ratios[images[full]], times[full], window, groups[in_full_batch])
            full = full[np.lexsort(keys)]
        batches = np.concatenate([full, rest]).reshape(self.num_batches, self.batch_size)
        batches = batches[rng.permutation(self.num_batches)]
        return images[batches], times[batches]


class EvalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Every image once, in batches that do not depend on the number of processes; nothing is padded.

    Args:
        num_images: Number of images.
        batch_size: Images per batch.
        rank: Number of this process, from 0.
        world_size: Number of processes; the shards may differ by one batch.
    """

    def __init__(self, num_images: int, *, batch_size: int = 1, rank: int = 0, world_size: int = 1) -> None:
        starts = range(0, num_images, batch_size)
        self.batches = [range(s, min(s + batch_size, num_images)) for s in starts[rank::world_size]]
        self.min_length = len(starts) // world_size  # of any process

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (0, index)."""
        for batch in self.batches:
            yield [(0, index) for index in batch]
