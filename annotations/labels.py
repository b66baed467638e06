"""The model's labels and the categories of the dataset that they stand for."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


def bare_name(name: str) -> str:
    """Return a class name without what people write now in one way and now in another: case, blanks, dashes."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def alike_names(names: Iterable[str]) -> list[list[str]]:
    """Return groups of class names that differ in case, blanks or dashes only, sorted."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        # A number is added where two categories have the same name.
        groups.setdefault(bare_name(re.sub(r" \(id -?\d+\)$", "", name)), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


@dataclass(frozen=True)
class LabelMap:
    """The model's labels and what they mean in the dataset; label 0 is background.

    Attributes:
        category_ids: The category id of every label from 1 on; -1 for a label without a category.
        names: The class name of every label from 1 on.
        id_texts: (category id, text) of the categories whose id is text in the file.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    id_texts: tuple[tuple[int, str], ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of labels, background included."""
        return len(self.category_ids) + 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels that have a category."""
        return tuple(name for id_, name in zip(self.category_ids, self.names) if id_ >= 0)

    def labels_of(self, category_ids: np.ndarray) -> np.ndarray:
        """Return the int64 label of every category id; all of them must be known."""
        sorted_ids, labels = self._sorted
        positions = np.searchsorted(sorted_ids[:-1], category_ids)
        assert (sorted_ids[positions] == category_ids).all(), "a category that has no label"
        return labels[positions]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        known = np.array(self.category_ids, dtype=np.int64)
        order = np.argsort(known, kind="stable")
        return known[order], order + 1

    def categories_of(self, labels: np.ndarray) -> np.ndarray:
        """Return the category id of every label, -1 where it has none."""
        return np.array((-1, *self.category_ids), dtype=np.int64)[labels]

    @classmethod
    def contiguous(cls, categories: Sequence[tuple[int, str]], id_texts: Sequence[tuple[int, str]] = ()) -> "LabelMap":
        """Number categories 1..C in the order of their ids; ``id_texts`` may have those of images too."""
        ids = tuple(id_ for id_, _ in categories)
        texts = tuple((id_, text) for id_, text in id_texts if id_ in set(ids))
        return cls(ids, tuple(name for _, name in categories), texts)

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; `from_plain` reads them."""
        return {
            "label_categories": list(self.category_ids),
            "label_names": list(self.names),
            "category_texts": [list(pair) for pair in self.id_texts],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "LabelMap":
        """Return the labels that `to_plain` wrote."""
        texts = tuple((id_, text) for id_, text in plain.get("category_texts", ()))
        return cls(tuple(plain["label_categories"]), tuple(plain["label_names"]), texts)
