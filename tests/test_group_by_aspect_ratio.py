"""Batches: same bins as the reference, equal numbers on every process, nothing lost or repeated."""

import bisect
import hashlib

import numpy as np
import pytest

from group_by_aspect_ratio import (
    EvalBatchSampler,
    GroupedBatchSampler,
    aspect_ratio_edges,
    format_groups,
    group_by_aspect_ratio,
)


def random_sizes(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(50, 300, n), rng.integers(50, 300, n)


def samplers(heights, widths, world_size, **options):
    options = {"group_factor": 3, "batch_size": 2, "seed": 5, **options}
    return [
        GroupedBatchSampler(heights, widths, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


def indices(batches):
    return [index for batch in batches for _, index in batch]


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_bins_follow_the_reference_formula(k):
    heights, widths = random_sizes(500)
    edges = [2 ** (-1 + i / k) for i in range(2 * k + 1)] if k else [1.0]
    expected = [bisect.bisect_right(edges, w / h) for h, w in zip(heights, widths)]
    assert group_by_aspect_ratio(heights, widths, k).tolist() == expected
    assert len(aspect_ratio_edges(k)) + 1 == (2 * k + 2 if k else 2)


def test_an_edge_belongs_to_the_wider_group():
    assert group_by_aspect_ratio(np.array([100, 100]), np.array([100, 99]), 0).tolist() == [1, 0]


def test_groups_are_described_with_their_counts():
    line = format_groups(np.array([0, 1, 1]), 0)
    assert line.endswith("0-1: 1, 1-inf: 2")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [3, 7, 40, 101])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("factor", [-1, 0, 3])
def test_an_epoch_uses_every_image_once_but_for_the_rest_of_the_last_batch(world_size, num_images, batch_size, factor):
    heights, widths = random_sizes(num_images)
    group = samplers(heights, widths, world_size, batch_size=batch_size, group_factor=factor)
    assert len({len(s) for s in group}) == 1 and len(group[0]) > 0
    used = []
    for sampler in group:
        for step, batch in enumerate(sampler):
            assert len(batch) == sampler.batch_size
            if sampler.weight(step) > 0:
                used += [index for _, index in batch]
    assert len(set(used)) == len(used)
    assert num_images - len(used) < group[0].batch_size


def test_random_configurations_have_the_same_number_of_batches_on_every_process():
    rng = np.random.default_rng(0)
    for _ in range(500):
        num_images, world_size = int(rng.integers(1, 60)), int(rng.integers(1, 9))
        heights, widths = random_sizes(num_images, seed=int(rng.integers(1000)))
        options = {"batch_size": int(rng.integers(1, 9)), "group_factor": int(rng.integers(-1, 4))}
        if num_images < world_size:
            with pytest.raises(ValueError, match=f"{num_images} training image.*{world_size} process"):
                samplers(heights, widths, world_size, **options)
            continue
        group = samplers(heights, widths, world_size, **options)
        lengths = {len(list(sampler)) for sampler in group}
        assert len(lengths) == 1 and lengths == {len(group[0])}


def test_weights_average_an_update_over_its_real_batches():
    heights, widths = random_sizes(2 * 7)
    group = samplers(heights, widths, 3, batch_size=2)  # 7 batches: two full steps and one of a single batch
    for step in range(len(group[0])):
        weights = [sampler.weight(step) for sampler in group]
        assert sum(weights) / 3 == pytest.approx(1)
        assert (weights == [1, 1, 1]) == (step < 2)
    group = samplers(heights, widths, 2, batch_size=2)
    for first in (0, 2):  # two steps per update: batches 0-3 and 4-6
        total = sum(sampler.weight(step, 2) for sampler in group for step in (first, first + 1))
        assert total / 2 == pytest.approx(1)


def test_order_is_a_function_of_seed_and_epoch():
    heights, widths = random_sizes(50)
    (a,), (b,), (c,) = (samplers(heights, widths, 1, seed=s) for s in (1, 1, 2))
    assert list(a) == list(b) != list(c)
    b.set_epoch(3)
    assert sorted(indices(a)) == sorted(indices(b)) and indices(a) != indices(b)
    assert {epoch for batch in b for epoch, _ in batch} == {3}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_processes_goes_on_without_losing_or_repeating_a_sample(before, after):
    heights, widths = random_sizes(46)
    reference = {tuple(batch) for batch in samplers(heights, widths, 1)[0].epoch_batches(0).tolist()}
    done_steps = 4
    first = samplers(heights, widths, before)
    used = [batch for sampler in first for batch in list(sampler)[:done_steps]]
    rest = samplers(heights, widths, after)
    for sampler in rest:
        sampler.set_epoch(0, first[0].done_after(done_steps))
        used += [batch for step, batch in enumerate(sampler) if sampler.weight(step) > 0]
    as_tuples = [tuple(index for _, index in batch) for batch in used]
    assert len(as_tuples) == len(set(as_tuples)) == len(reference)
    assert set(as_tuples) == reference


def test_batches_hold_images_of_similar_shape():
    rng = np.random.default_rng(0)
    ratios = rng.choice([0.67, 0.75, 1.33, 1.5], 4000, p=[0.1, 0.2, 0.5, 0.2]) * rng.uniform(0.97, 1.03, 4000)
    widths = np.full(4000, 600)
    heights = (widths / ratios).astype(int)

    def waste(factor):
        (sampler,) = samplers(heights, widths, 1, batch_size=8, group_factor=factor)
        batches = sampler.epoch_batches(0)
        scale = 800 / np.minimum(heights, widths)
        h, w = (heights * scale)[batches], (widths * scale)[batches]
        padded = (h.max(axis=1) * w.max(axis=1) * 8).sum()
        return padded / (h * w).sum() - 1

    assert max(waste(3), waste(0)) < 0.03 < 0.3 < waste(-1)


def test_fewer_images_than_a_batch_make_one_batch_of_all():
    heights, widths = random_sizes(5)
    (sampler,) = samplers(heights, widths, 1, batch_size=8)
    assert len(sampler) == 1
    assert sorted(indices(sampler)) == list(range(5))
    pair = samplers(heights, widths, 2, batch_size=8)
    assert [sampler.batch_size for sampler in pair] == [2, 2]


def repeated(num_images=60, seed=0):
    """Return sizes and repeat factors: most images come once, some up to five times, mostly not a whole number."""
    factors = np.where(np.arange(num_images) % 3 == 0, np.random.default_rng(seed).uniform(1, 5, num_images), 1.0)
    factors[3] = 3.0
    return *random_sizes(num_images, seed), factors


def items_of(group):
    """Return the items of an epoch over all processes, repeated batches left out."""
    return [item for s in group for step, batch in enumerate(s) if s.weight(step) > 0 for item in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("factor", [-1, 3])
def test_an_image_comes_as_often_as_its_factor_says(world_size, factor):
    heights, widths, factors = repeated()
    group = samplers(heights, widths, world_size, group_factor=factor, repeats=factors)
    counts = np.zeros((600, len(factors)))
    for epoch in range(len(counts)):
        for sampler in group:
            sampler.set_epoch(epoch)
        items = items_of(group)
        assert len(items) == 2 * group[0].num_batches and group[0].num_batches == int(factors.sum()) // 2
        assert len(set(items)) == len(items)
        np.add.at(counts[epoch], [index for _, index, *_ in items], 1)
    assert (counts <= np.ceil(factors)).all()
    # Left out are an odd image, and one that some epochs draw beyond the sum of the factors.
    assert (np.maximum(np.floor(factors) - counts, 0).sum(axis=1) <= 2).all()
    left_out = (factors.sum() - 2 * group[0].num_batches) / factors.sum()
    error = counts.mean(axis=0) - factors * (1 - left_out)
    assert np.abs(error).max() < 4 * np.sqrt((0.25 + 0.02 * 5) / len(counts)) and abs(error.mean()) < 0.01


def test_the_items_of_an_image_that_comes_again_are_numbered():
    heights, widths, factors = repeated()
    (sampler,) = samplers(heights, widths, 1, batch_size=1, repeats=factors)
    items = sorted(item for batch in sampler for item in batch if item[1] == 3)
    assert items == [(0, 3), (0, 3, 1), (0, 3, 2)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_processes_loses_and_repeats_no_image_beyond_its_factor(before, after):
    heights, widths, factors = repeated()
    reference = items_of(samplers(heights, widths, 1, repeats=factors))
    first, rest = (samplers(heights, widths, world, repeats=factors) for world in (before, after))
    done = [item for sampler in first for batch in list(sampler)[:9] for item in batch]
    for sampler in rest:
        sampler.set_epoch(0, first[0].done_after(9))
    assert sorted(done + items_of(rest)) == sorted(reference)


def test_factors_of_one_change_nothing_and_the_order_is_that_of_earlier_checkpoints():
    heights, widths = random_sizes(101)
    (plain,), (ones,) = (samplers(heights, widths, 1, repeats=repeats) for repeats in (None, np.ones(101)))
    assert list(plain) == list(ones) and plain.to_plain() == ones.to_plain()
    digest = hashlib.sha256(plain.epoch_batches(7).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "c44d25a1f0b6cf81"
    assert plain.to_plain()["shapes of the images"] == "b5e1ab330a639cac"
    alone = GroupedBatchSampler(heights, widths, group_factor=3, batch_size=2, seed=5)
    assert list(alone) == list(plain)  # without ranks: the only process
    for repeats in (np.full(101, 1.01), np.where(np.arange(101) == 7, 1.5, 1)):
        (other,) = samplers(heights, widths, 1, repeats=repeats)
        assert other.to_plain() != plain.to_plain()


def test_evaluation_takes_images_in_their_order_all_of_epoch_0():
    assert list(EvalBatchSampler(3, batch_size=2)) == [[(0, 0), (0, 1)], [(0, 2)]]


def test_an_image_that_comes_again_fills_no_batch_with_itself():
    heights, widths, factors = repeated(200)
    (sampler,) = samplers(heights, widths, 1, batch_size=4, repeats=factors)
    different = [len(set(batch)) for epoch in range(20) for batch in sampler.epoch_batches(epoch).tolist()]
    assert np.mean(np.array(different) == 4) > 0.9


@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_visits_every_image_once_in_the_same_batches(num_images, world_size, batch_size):
    ranks = [
        EvalBatchSampler(num_images, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    batches = [batch for sampler in ranks for batch in sampler]
    assert sorted(indices(batches)) == list(range(num_images))
    assert sorted(map(tuple, batches)) == sorted(map(tuple, EvalBatchSampler(num_images, batch_size=batch_size)))
    assert all(len(sampler) - sampler.min_length in (0, 1) for sampler in ranks)
