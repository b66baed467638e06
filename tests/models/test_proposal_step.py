"""Proposals of a batch are torchvision's of each picture, by one nms or by many."""

import copy

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from models import proposal_step
from models.anchor_cache import anchors_of
from models.batched_pictures import PictureBatch
from models.proposal_step import BatchedRPN, by_anchor, kept_by_nms

SIZES = [(96, 128), (70, 121), (88, 60)]


def head_outputs(rng):
    """Feature maps, objectness and codes of three anchors a place, with small boxes and low scores among them."""
    maps = [torch.zeros(3, 1, 96 // stride, 128 // stride) for stride in (4, 8, 16, 32)]
    objectness = [torch.randn(3, 3, *map_.shape[-2:], generator=rng) * 3 for map_ in maps]
    codes = [torch.randn(3, 12, *map_.shape[-2:], generator=rng) for map_ in maps]
    for level in codes:
        level[:, 2::12] -= 8 * (torch.rand(level[:, 2::12].shape, generator=rng) < 0.3)  # of no width
    return maps, objectness, codes


@pytest.fixture
def network():
    generator = AnchorGenerator(((16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4)
    options = {"training": 300, "testing": 300}, {"training": 120, "testing": 120}
    plain = RegionProposalNetwork(generator, torch.nn.Identity(), 0.7, 0.3, 64, 0.5, *options, 0.7, score_thresh=0.2)
    plain.train().min_size = 0.5
    batched = copy.deepcopy(plain)
    batched.__class__ = BatchedRPN
    return plain, batched


def batch():
    return PictureBatch(torch.zeros(3, 3, 96, 128), SIZES, torch.tensor(SIZES, dtype=torch.float32))


def proposals_of_both(network, objectness, codes, maps):
    plain, batched = network
    anchors = anchors_of(plain.anchor_generator, batch(), maps)
    levels = [level[0].numel() for level in objectness]
    flat, flat_codes = concat_box_prediction_layers(objectness, codes)
    decoded = plain.box_coder.decode(flat_codes, [anchors] * 3).view(3, -1, 4)
    expected, _ = plain.filter_proposals(decoded, flat, SIZES, levels)
    ours = batched.propose(anchors, by_anchor(objectness, 1).squeeze(2), by_anchor(codes, 4), levels, batch())
    return expected, ours


@pytest.mark.parametrize("most_boxes", [None, 2**16, 2000, 100], ids=["per level", "one", "two calls", "per picture"])
def test_proposals_are_torchvisions(network, monkeypatch, most_boxes):
    if most_boxes:  # as on a GPU
        monkeypatch.setattr(proposal_step, "calls_nms_once", lambda device: True)
        monkeypatch.setattr(proposal_step, "MOST_BOXES_OF_NMS", most_boxes)
    calls, nms = [], proposal_step.nms
    monkeypatch.setattr(proposal_step, "nms", lambda *args: calls.append(1) or nms(*args))
    maps, objectness, codes = head_outputs(torch.Generator().manual_seed(0))
    expected, (boxes, is_proposal) = proposals_of_both(network, objectness, codes, maps)
    assert len(calls) == {None: 3 * 4, 2**16: 1, 2000: 2, 100: 3}[most_boxes]
    assert boxes.shape == (3, 120, 4)
    for theirs, ours, is_box in zip(expected, boxes, is_proposal, strict=True):
        assert torch.equal(ours[is_box], theirs)
    assert is_proposal.all(dim=1).any()


def test_a_picture_with_few_proposals_has_empty_places(network):
    maps, objectness, codes = head_outputs(torch.Generator().manual_seed(1))
    for level in objectness:
        level[1] -= 6  # most scores below the limit
    expected, (boxes, is_proposal) = proposals_of_both(network, objectness, codes, maps)
    assert 0 < is_proposal[1].sum() < 120 == is_proposal[0].sum()
    assert torch.equal(boxes[1][is_proposal[1]], expected[1])


@pytest.mark.parametrize("once", [True, False])
def test_what_is_not_a_number_is_no_proposal(network, monkeypatch, once):
    """A network that diverges gives such boxes; pooling from them would read anywhere in memory."""
    monkeypatch.setattr(proposal_step, "calls_nms_once", lambda device: once)
    maps, objectness, codes = head_outputs(torch.Generator().manual_seed(2))
    codes[0][0] = float("nan")
    objectness[1][1] = float("nan")
    objectness[2][2], codes[3][2] = float("inf"), float("inf")
    for level in codes:
        level[1] = float("nan")
    _, (boxes, is_proposal) = proposals_of_both(network, objectness, codes, maps)
    assert boxes.isfinite().all() and is_proposal.sum(dim=1).gt(0).tolist() == [True, False, True]


def test_boxes_at_the_edges_do_not_meet_those_of_other_pictures_or_levels():
    whole = torch.tensor([[0.0, 0, 128, 96], [0, 0, 128, 95], [127, 95, 128, 96], [0, 0, 1, 1]]).expand(5, -1, -1)
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    for levels, kept in (([2, 2], {True: 3, False: 3}), ([1, 3], {True: 4, False: 4})):
        for once in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(proposal_step, "calls_nms_once", lambda device, once=once: once)
                assert len(kept_by_nms(whole, scores, levels, 0.7, 128)) == 5 * kept[once]
