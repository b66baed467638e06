"""inference/export_formats.py: what each exporter writes takes other batches and sizes, and says what stands in its way."""

from functools import partial

import pytest
import torch

from helpers.shaken import drawn_images, shake
from helpers.thin import build_thin_one_stage
from inference.compare_outputs import Agreement, compare_outputs, without_suppression
from inference.export_formats import follow, run_onnx, run_pt2, write_onnx, write_pt2

NAMES = ("boxes", "labels", "scores", "counts")


def build(name):
    torch.manual_seed(0)
    model = build_thin_one_stage(name, score_thresh=0.012, detections_per_img=20, topk_candidates=40)
    shake(model)
    return model.eval().requires_grad_(False)


def candidates(model, image):
    with without_suppression(model):
        return {key: value.numpy() for key, value in model([image])[0].items()}


def compare(model, run, images):
    agreement = Agreement()
    found = run(images)
    assert len(found) == len(images)
    for image, outputs in zip(images, found):
        expected = {key: value.numpy() for key, value in model([image])[0].items()}
        compare_outputs(expected, outputs, agreement, "a.jpg", partial(candidates, model, image))
    assert agreement.detections > 0 and agreement.box < 0.01
    return agreement


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssd", "retinanet", "fcos"])
def test_one_graph_serves_pt2_and_onnx_for_any_batch_and_size(name, tmp_path):
    model = build(name)
    drawn = torch.stack([image[:, :128, :120] for image in drawn_images(3)])
    program = follow(model, NAMES[:-1], drawn[:2, :, :96, :120], is_fixed=False)
    write_pt2(program, tmp_path / "a.pt2", {"classes": ["disc"]})
    write_onnx(program, tmp_path / "a.onnx", {"classes": ["disc"]}, NAMES)
    for run in (run_pt2(tmp_path / "a.pt2", NAMES), run_onnx(tmp_path / "a.onnx", NAMES)):
        for images in (drawn[:1], drawn, drawn[:2, :, :70, :], drawn[1:, :, :, :60]):
            compare(model, run, images)
