"""Sampling into fixed slots has torchvision's numbers, and every candidate is as likely as every other."""

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from models.batched_sampling import draw_slots

# Positives, negatives and candidates that must not be drawn: as many as wanted, too few of one kind, none of one kind.
CASES = [(40, 200, 10), (3, 200, 0), (40, 5, 7), (2, 3, 50), (0, 60, 0), (60, 0, 4), (0, 0, 30)]
SAMPLER = BalancedPositiveNegativeSampler(32, 0.25)


def matches_of(case, width=260):
    matches = torch.cat([torch.full((count,), match) for count, match in zip(case, (5, -1, -2), strict=True)])
    matches = torch.nn.functional.pad(matches, (0, width - len(matches)), value=-2)
    return matches[torch.randperm(width)]


def test_each_picture_gets_torchvisions_numbers_of_distinct_positives_and_negatives():
    torch.manual_seed(0)
    matches = torch.stack([matches_of(case) for case in CASES])
    slots = draw_slots(matches, SAMPLER)
    assert slots.candidates.shape == (len(CASES), 32) and slots.most_positives == 8
    positives, negatives = SAMPLER(list((matches + 1).clamp(max=1)))
    for k in range(len(CASES)):
        drawn = slots.candidates[k][slots.is_drawn[k]]
        assert len(drawn.unique()) == len(drawn)
        values = matches[k][drawn]
        assert (values == 5).sum() == positives[k].sum() and (values == -1).sum() == negatives[k].sum()
        assert torch.equal(slots.is_positive[k][slots.is_drawn[k]], values == 5)
        # positives first, then negatives, then empty slots
        assert slots.is_positive[k].int().diff().le(0).all() and slots.is_drawn[k].int().diff().le(0).all()
        assert not (slots.is_positive[k] & ~slots.is_drawn[k]).any()


def test_few_candidates_fit():
    slots = draw_slots(torch.tensor([[0, -1, -1], [-2, -3, 2]]), SAMPLER)
    assert slots.is_drawn.sum(1).tolist() == [3, 1] and slots.is_positive.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_all_candidates_and_all_pairs_are_equally_likely(kind):
    """Chi square of how often each pair of candidates is drawn together, over many pictures with the same candidates."""
    torch.manual_seed(1)
    matches = torch.tensor([0, 1, 2, 3, 4, 5] + [-1] * 7 + [-2] * 2).expand(20000, -1)
    slots = draw_slots(matches, BalancedPositiveNegativeSampler(5, 0.5))  # 2 of 6 positives, 3 of 7 negatives
    assert slots.is_drawn.all() and (slots.is_positive.sum(1) == 2).all()
    where = torch.arange(6) if kind == "positives" else torch.arange(6, 13)
    taken = (slots.candidates[:, :, None] == where).any(1).double()  # [pictures, candidates]
    singles = taken.sum(0)
    pairs = (taken.T @ taken)[torch.ones(len(where), len(where)).triu(1) > 0]
    for counts, limit in ((singles, 22.5), (pairs, 45)):  # far above the 99.9 % points of 5 or 6, and 14 or 20 degrees
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < limit
    first = torch.bincount(slots.candidates[:, 0 if kind == "positives" else 2], minlength=13)[where].double()
    assert ((first - first.mean()) ** 2 / first.mean()).sum() < 22.5


def test_draws_depend_on_the_seed_alone():
    matches = matches_of((40, 200, 10)).expand(3, -1)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(draw_slots(matches, SAMPLER).candidates)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])
