"""Where a run is: the position that a checkpoint continues from."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """The position of a run.

    Attributes:
        epoch: Current epoch, from 0.
        batches: Batches of the epoch's global list that are done.
        updates: Optimizer updates since the start of the run.
        eval_due: Whether the evaluation after the epoch before is still to be done.
        skipped: How many updates in a row were skipped.
    """

    epoch: int = 0
    batches: int = 0
    updates: int = 0
    eval_due: bool = False
    skipped: int = 0

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Progress":
        """Return the position that a checkpoint holds; ``eval_due`` was called ``to_score`` in older ones."""
        return cls(**{{"to_score": "eval_due"}.get(name, name): value for name, value in values.items()})
