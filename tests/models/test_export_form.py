"""models/export_form.py: the form that is exported finds what torchvision's own forward finds."""

from functools import partial

import pytest
import torch

from helpers.shaken import drawn_images, shake
from helpers.thin import build_thin_one_stage
from inference.compare_outputs import Agreement, compare_outputs, without_suppression
from models.export_form import export_form, keep_best


def build(name):
    torch.manual_seed(0)
    model = build_thin_one_stage(name, score_thresh=0.012, detections_per_img=40, topk_candidates=60)
    shake(model)
    return model.eval().requires_grad_(False)


def all_candidates(model, image):
    with without_suppression(model):
        return {key: value.numpy() for key, value in model([image])[0].items()}


@pytest.mark.parametrize("name", ["ssd", "retinanet", "retinanet_giou", "fcos"])
def test_a_form_finds_what_the_detector_finds(name):
    model = build(name)
    for height, width in ((97, 131), (131, 97), (60, 300)):
        images = torch.stack([drawn_images(1)[0][:, :60, :97], torch.rand(3, 60, 97)])
        images = torch.nn.functional.interpolate(images, size=(height, width))
        boxes, labels, scores, counts = export_form(model)(images)
        assert boxes.shape == (2, 40, 4)
        for n, expected in enumerate(model(list(images))):
            count, agreement = int(counts[n]), Agreement()
            assert count == len(expected["scores"]) > 0
            found = {"boxes": boxes[n, :count], "labels": labels[n, :count], "scores": scores[n, :count]}
            # By partners, not by place: equal scores may come in any order.
            arrays = [{key: value.numpy() for key, value in outputs.items()} for outputs in (expected, found)]
            compare_outputs(*arrays, agreement, name, partial(all_candidates, model, images[n]))
            assert agreement.detections >= count - 2 and agreement.box < 1e-4 and agreement.score < 1e-6
            assert not boxes[n, count:].any() and not labels[n, count:].any() and not scores[n, count:].any()


def test_what_overlaps_is_suppressed_within_its_picture_and_group_alone():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5).repeat(2, 1, 1)
    boxes[:, 4] += 20
    scores = torch.tensor([[0.5, 0.6, 0.7, 0.0, 0.2], [0.9, 0.0, 0.0, 0.8, 0.0]])
    groups = torch.tensor([[0, 0, 3, 1, 0], [0, 1, 2, 3, 0]])
    best, chosen = keep_best(boxes, scores, groups, 4, 0.5, 3)
    assert best.tolist() == torch.tensor([[0.7, 0.6, 0.2], [0.9, 0.8, 0.0]]).tolist()
    assert chosen[0].tolist() == [2, 1, 4] and chosen[1, :2].tolist() == [0, 3]


def test_nothing_found_leaves_all_slots_empty():
    model = build("retinanet")
    model.score_thresh = 0.99
    boxes, labels, scores, counts = export_form(model)(torch.rand(2, 3, 50, 60))
    assert counts.tolist() == [0, 0] and not boxes.any() and not labels.any() and not scores.any()
