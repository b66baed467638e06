"""Matching all pictures at once gives what torchvision's matchers give picture by picture, ties included."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou as box_iou_of_one

from helpers.batches import make_batch
from models import batched_matching
from models.batched_matching import box_iou, match, of_matched
from models.object_block import objects_of

MATCHERS = {
    "low quality": Matcher(0.5, 0.4, allow_low_quality_matches=True),
    "plain": Matcher(0.5, 0.5),
    "ssd": SSDMatcher(0.5),
}


def grid():
    """Anchors of three sizes on a grid: many have equal IoUs with an object, or none with any."""
    columns, rows, sides = torch.arange(0.0, 90, 6), torch.arange(0.0, 70, 6), torch.tensor([9.0, 20, 41])
    x, y, side = torch.meshgrid(columns, rows, sides, indexing="ij")
    return torch.stack([x, y, x + side, y + 1.5 * side], dim=-1).reshape(-1, 4)


def some_objects(kind):
    counts = {"several": [3, 0, 12, 1], "none": [0, 0], "hundred": [100, 7]}.get(kind, [9, 2])
    _, targets = make_batch([(90, 110)] * len(counts), counts)
    if kind == "crowd":  # equal boxes under different labels, on the anchors and far from them
        targets[0]["boxes"][:4] = torch.tensor([12.0, 12, 32, 42])
        targets[0]["boxes"][4:7] = torch.tensor([13.0, 13, 20, 20])
        targets[1]["boxes"][:] = torch.tensor([500.0, 500, 600, 600])
    return targets


def match_one(target, anchors, matcher):
    """torchvision's own: a loop body of `compute_loss`."""
    if len(target["boxes"]) == 0:
        return torch.full((len(anchors),), -1)
    return matcher(box_iou_of_one(target["boxes"], anchors))


@pytest.mark.parametrize("kind", ["several", "none", "hundred", "crowd"])
@pytest.mark.parametrize("matcher", MATCHERS.values(), ids=MATCHERS)
def test_matches_equal_torchvisions(kind, matcher):
    targets, anchors = some_objects(kind), grid()
    expected = torch.stack([match_one(target, anchors, matcher) for target in targets])
    assert torch.equal(match(objects_of(targets), anchors, matcher), expected)


@pytest.mark.parametrize("matcher", MATCHERS.values(), ids=MATCHERS)
def test_each_picture_may_have_its_own_anchors(matcher):
    targets = some_objects("several")
    anchors = torch.stack([grid() + shift for shift in (0, 3, 7, 11)])
    expected = torch.stack([match_one(target, own, matcher) for target, own in zip(targets, anchors, strict=True)])
    assert torch.equal(match(objects_of(targets), anchors, matcher), expected)


@pytest.mark.parametrize("most", [1, 2 * 12 * len(grid())])
def test_slices_change_nothing_and_keep_the_bound(monkeypatch, most):
    objects, sizes = objects_of(some_objects("several")), []
    expected = match(objects, grid(), MATCHERS["low quality"])
    monkeypatch.setattr(batched_matching, "MOST_PAIRS", most)

    def noted(*args):
        sizes.append(len(args[0]))
        return box_iou(*args)

    monkeypatch.setattr(batched_matching, "box_iou", noted)
    assert torch.equal(match(objects, grid(), MATCHERS["low quality"]), expected)
    assert sizes == ([1, 1, 1, 1] if most == 1 else [2, 2])
    each = torch.stack([grid()] * 3 + [grid() + 90])  # of its own in every picture
    assert torch.equal(match(objects, each, MATCHERS["low quality"])[:3], expected[:3])
    assert not torch.equal(match(objects, each, MATCHERS["low quality"])[3], expected[3])


def test_ious_equal_torchvisions_to_the_last_bit_and_empty_places_have_none():
    objects = objects_of(some_objects("several"))
    anchors = torch.cat([grid(), torch.zeros(1, 4)])  # a box without area as well, as padded proposals are
    found = box_iou(objects.boxes, anchors, objects.is_object)
    for iou, boxes, count in zip(found, objects.boxes, objects.counts, strict=True):
        assert torch.equal(iou[:count], box_iou_of_one(boxes[:count], anchors))
        assert (iou[count:] == 0).all()


def test_an_anchor_gets_what_belongs_to_its_object():
    values = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    matches = torch.tensor([[2, -1, 0], [1, -2, 2]])
    expected = torch.stack([values[0][[2, 0, 0]], values[1][[1, 0, 2]]])
    assert torch.equal(of_matched(values, matches), expected)
    assert torch.equal(of_matched(values[..., 0], matches), expected[..., 0])
