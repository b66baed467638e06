"""A validation split held out of the training pictures, where the data have none.

A picture's side follows from its content and the seed, so others may come and go. Pictures that are the same, or nearly
so, stay together: the smallest of their digests decides for all. A new copy with a smaller one may therefore move its
group in a new run; a run that is continued goes by what its checkpoint knows, and by the rule for new pictures alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loading.duplicates import fingerprint_images, group_equal
from loading.samples import ImageFolder
from loading.split import Split
from pixels.image_files import examples
from utils import derive_seed

logger = logging.getLogger(__name__)

# Hexadecimal digits of a digest that are kept: two of a million pictures share them with a chance of 3e-8.
DIGITS = 16


@dataclass(frozen=True)
class Holdout:
    """Which pictures are held out.

    Attributes:
        fraction: The share that is held out, more or less: every picture or group is drawn by itself.
        seed: Decides with each picture's content.
        train: Digests of the pictures that were trained on, `DIGITS` of each.
        val: Digests of those that were held out.
    """

    fraction: float
    seed: int
    train: frozenset[str] = frozenset()
    val: frozenset[str] = frozenset()

    @classmethod
    def asked(cls, fraction: float | None, seed: int, known: dict[str, Any] | None) -> "Holdout | None":
        """Return what flags and checkpoint ask for; None where neither does.

        Args:
            fraction: ``--val-fraction``; None where it is not given.
            seed: ``--seed``; that of a checkpoint goes before it.
            known: `Data.to_plain` of a checkpoint.

        Raises:
            ValueError: The checkpoint has another fraction.
        """
        plain = None if known is None else known.get("holdout")
        if plain is None:
            return None if fraction is None else cls(fraction, seed)
        if fraction not in (None, plain["fraction"]):
            raise ValueError(
                f"--val-fraction {fraction:g}: the checkpoint's is {plain['fraction']:g}; with another one, pictures "
                "that it was trained on would be scored: give the same, or leave it out"
            )
        sides = ([text[k : k + DIGITS] for k in range(0, len(text), DIGITS)] for text in (plain["train"], plain["val"]))
        return cls(plain["fraction"], plain["seed"], *map(frozenset, sides))

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; `asked` reads them. Of 100,000 pictures they take 1.6 MB."""
        train, val = ("".join(sorted(side)) for side in (self.train, self.val))
        return {"fraction": self.fraction, "seed": self.seed, "train": train, "val": val}

    def place(self, digests: Sequence[str], groups: np.ndarray) -> np.ndarray:
        """Return which pictures are held out, bool [P].

        Args:
            digests: `DIGITS` of each picture's digest.
            groups: int64 [P], the same number for pictures that stay together.
        """
        known = self.train | self.val
        deciding: dict[int, tuple[bool, str]] = {}
        for digest, group in zip(digests, groups.tolist()):
            of_picture = (digest not in known, digest)  # known pictures go before others
            deciding[group] = min(deciding.get(group, of_picture), of_picture)
        is_val = {group: self._is_drawn(digest) for group, (_, digest) in deciding.items()}
        sides = ((digest, is_val[group]) for digest, group in zip(digests, groups.tolist()))
        return np.array([digest in self.val if digest in known else side for digest, side in sides], dtype=bool)

    def _is_drawn(self, digest: str) -> bool:
        if digest in self.train or digest in self.val:
            return digest in self.val
        return derive_seed(self.seed, "held out", digest) < self.fraction * 2**63


def hold_out(pool: Split, holdout: Holdout, *, cache_dir: Path | None = None) -> tuple[Split, Split, Holdout]:
    """Divide a split into one to train on and one to score.

    Args:
        pool: All pictures.
        holdout: The rule, and what is known of earlier.
        cache_dir: Remembers what the pictures look like.

    Returns:
        (training split, validation split, the rule with all pictures known).

    Raises:
        ValueError: One side gets no picture.
        BadImageError: A picture cannot be decoded.
    """
    assert isinstance(pool.images, ImageFolder)
    prints = fingerprint_images(pool.annotations, pool.images, pool.indices, cache_dir=cache_dir)
    digests = [digest[:DIGITS] for digest in prints.digests]
    # A run that is continued with the same pictures need not compare them: all sides are known.
    is_known = holdout.val.union(holdout.train).issuperset(digests)
    groups = np.arange(len(digests)) if is_known else group_equal(prints)
    is_val = holdout.place(digests, groups)
    _say(pool, holdout, digests, groups, is_val)
    kept, held = pool.indices[~is_val], pool.indices[is_val]
    train = replace(pool, indices=kept, members=np.setdiff1d(np.arange(len(pool.annotations)), held))
    val = replace(pool, name=f"{pool.name} (held out)", indices=held, members=held, unused=())
    _warn_of_one_sided(train, val)
    of_val = {digest for digest, side in zip(digests, is_val.tolist()) if side}
    return train, val, replace(holdout, train=holdout.train | (set(digests) - of_val), val=holdout.val | of_val)


def _say(pool: Split, holdout: Holdout, digests: Sequence[str], groups: np.ndarray, is_val: np.ndarray) -> None:
    """Log how many pictures are held out, and how many of them stay together; raises ValueError for none or all."""
    sizes = np.unique(groups, return_counts=True)[1]
    alike = sizes[sizes > 1]
    share = f"--val-fraction {holdout.fraction:g} holds out {is_val.sum()} of {len(is_val)} pictures"
    together = ""
    if len(alike):
        together = f"; {alike.sum()} pictures in {len(alike)} group(s) of (nearly) the same stay together"
        together += f", the largest has {alike.max()}"
    if is_val.all() or not is_val.any():
        remedy = "choose another --val-fraction or --seed, or give a validation split"
        raise ValueError(f"{pool.name}: {share}{together}: {remedy}")
    known = holdout.train | holdout.val
    new = sum(digest not in known for digest in digests)
    before = f", {len(digests) - new} of them as in the checkpoint" if known else ""
    logger.info("%s by their content and seed %d%s%s", share, holdout.seed, before, together)


def _warn_of_one_sided(train: Split, val: Split) -> None:
    """Warn of classes that have objects on one side only."""
    trained, scored = count_classes(train), count_classes(val)
    names = [name for _, name in train.annotations.categories]
    for counts, others, what in (
        (trained, scored, "have no object among the pictures held out, and get no score"),
        (scored, trained, "have all their objects on pictures held out, and cannot be learned"),
    ):
        alone = [name for name, count, other in zip(names, counts.tolist(), others.tolist()) if count and not other]
        if alone:
            text = "%d of %d classes %s: %s; another --seed divides the pictures in another way"
            logger.warning(text, len(alone), len(names), what, examples(alone))


def count_classes(split: Split) -> np.ndarray:
    """Return the number of objects of each class on usable pictures, crowds aside, int64 [C]."""
    annotations = split.annotations
    chosen = np.isin(annotations.object_images(), split.indices) & ~annotations.is_crowd
    return np.bincount(annotations.object_classes()[chosen], minlength=len(annotations.categories))
