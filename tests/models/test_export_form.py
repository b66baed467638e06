"""models/export_form.py: the form that is exported finds what torchvision's own forward finds."""

from functools import partial

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from helpers.shaken import drawn_images, shake
from helpers.thin import build_thin_model, build_thin_one_stage
from inference.compare_outputs import Agreement, compare_outputs, without_suppression
from models.architectures import ARCHITECTURES, ModelSpec
from models.export_form import OUTPUTS, keep_best
from models.rcnn_export_form import export_form, paste_masks


def build(name):
    torch.manual_seed(0)
    if name in ARCHITECTURES:
        keypoints = 3 if name.startswith("keypoint") else 0
        spec = ModelSpec(name, 4, num_keypoints=keypoints, min_size=(96,), max_size=160, detections_per_img=40)
        model = build_thin_model(spec)
        model.rpn._post_nms_top_n = {"training": 60, "testing": 60}
    else:
        model = build_thin_one_stage(name, score_thresh=0.012, detections_per_img=40, topk_candidates=60)
    shake(model)
    return model.eval().requires_grad_(False)


def all_candidates(model, image):
    with without_suppression(model):
        return {key: value.numpy() for key, value in model([image])[0].items()}


R_CNNS = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]


@pytest.mark.parametrize("name", ["ssd", "retinanet", "retinanet_giou", "fcos", *R_CNNS])
def test_a_form_finds_what_the_detector_finds(name):
    model = build(name)
    for height, width in ((97, 131), (131, 97), (60, 300)):
        images = torch.stack([drawn_images(1)[0][:, :60, :97], torch.rand(3, 60, 97)])
        images = torch.nn.functional.interpolate(images, size=(height, width))
        *found, counts = export_form(model)(images)
        for n, expected in enumerate(model(list(images))):
            count, agreement = int(counts[n]), Agreement()
            assert count == len(expected["scores"]) > 0
            # Named as exports name them.
            names = [name for name in OUTPUTS if name in expected]
            assert [len(values[n]) for values in found] == [40] * len(names)
            assert not any(values[n, count:].any() for values in found)
            outputs = dict(zip(names, (values[n, :count].numpy() for values in found), strict=True))
            # By partners, not by place: equal scores may come in any order.
            arrays = {key: values.numpy() for key, values in expected.items() if key in OUTPUTS}
            tied = partial(all_candidates, model, images[n])
            compare_outputs(arrays, outputs, agreement, name, tied, has_proposals=name in R_CNNS)
            assert agreement.detections >= count - 2 and agreement.box < 1e-3 and agreement.score < 1e-5
            assert agreement.mask == 0 and agreement.keypoint < 1e-2


def test_masks_are_pasted_as_torchvision_pastes_them():
    corners = torch.rand(12, 2) * 60 - 5
    boxes = torch.cat([corners, corners + torch.rand(12, 2) * 50 + 1], dim=1)
    masks = torch.rand(12, 28, 28)
    expected = paste_masks_in_image(masks[:, None], boxes, (70, 90))[:, 0]
    torch.testing.assert_close(paste_masks(masks, boxes, 70, 90), expected, atol=1e-5, rtol=0)


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
