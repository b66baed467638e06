"""Which candidates of each picture count in the losses: drawn for all pictures at once, into fixed slots.

torchvision draws by permutations of the positives and of the negatives of a picture, whose numbers the host has to
read for it. Here each candidate gets a random key, and those with the highest keys are taken.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class Slots(NamedTuple):
    """Drawn candidates of B pictures in S slots each: positives first, then negatives, then empty slots.

    Attributes:
        candidates: int64 [B, S], the numbers of the candidates; any in an empty slot.
        is_positive: bool [B, S]; positives are among the first ``most_positives`` slots.
        is_drawn: bool [B, S], False in empty slots.
        most_positives: How many positives there can be in a picture.
    """

    candidates: Tensor
    is_positive: Tensor
    is_drawn: Tensor
    most_positives: int


def draw_keys(matches: Tensor) -> Tensor:
    """Return a random key in [0, 1) for each candidate, float32 [B, N]; the highest are drawn."""
    return torch.rand(matches.shape, device=matches.device)


@torch.no_grad()
def draw_slots(matches: Tensor, sampler: BalancedPositiveNegativeSampler) -> Slots:
    """Draw candidates as `BalancedPositiveNegativeSampler` does, without reading how many there are.

    Of each picture ``positive_fraction`` of ``batch_size_per_image`` positives, or all where there are fewer; the rest
    are negatives, or all of them. All sets of candidates are equally likely, but for keys that are equal to 24 bits.

    Args:
        matches: int64 [B, N], see `models.batched_matching.match`: 0 or more for positives, -1 for negatives, less for
            what must not be drawn.
        sampler: Says how many are wanted.
    """
    most_positives = min(int(sampler.batch_size_per_image * sampler.positive_fraction), matches.shape[1])
    most_negatives = min(sampler.batch_size_per_image, matches.shape[1])
    keys = draw_keys(matches)
    # masked_fill, not where: where would copy its number to the device and wait for that.
    positive_keys, positives = keys.masked_fill(matches < 0, -2.0).topk(most_positives, dim=1)
    negative_keys, negatives = keys.masked_fill_(matches != -1, -1.0).topk(most_negatives, dim=1)
    # Positives in [0, 1), then negatives in [-1, 0), which loses no bit of theirs, then what is none of both at -2.
    drawn, keys = torch.cat([positives, negatives], dim=1), torch.cat([positive_keys, negative_keys - 1], dim=1)
    keys, places = keys.topk(min(sampler.batch_size_per_image, most_positives + most_negatives), dim=1)
    return Slots(drawn.gather(1, places), keys >= 0, keys >= -1, most_positives)
