"""inference/export_formats.py: what is exported takes other batches and sizes, or says what stands in its way."""

from functools import partial

import pytest
import torch

from helpers.shaken import drawn_images, shake
from helpers.thin import EXPORTS_PYRAMIDS, build_thin_one_stage
from inference.compare_outputs import Agreement, compare_outputs, without_suppression
from inference.export_formats import follow, run_onnx, run_pt2, why_not, write_onnx, write_pt2

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
    for image, outputs in zip(images, run(images), strict=True):
        expected = {key: value.numpy() for key, value in model([image])[0].items()}
        compare_outputs(expected, outputs, agreement, "a.jpg", partial(candidates, model, image))
    assert agreement.detections > 10 and agreement.box < 0.01


def written(program, folder):
    """Write both files; returns the functions that run them."""
    write_pt2(program, folder / "a.pt2", {})
    write_onnx(program, folder / "a.onnx", {}, NAMES)
    return run_pt2(folder / "a.pt2", NAMES), run_onnx(folder / "a.onnx", NAMES)


@pytest.mark.slow
@pytest.mark.skipif(not EXPORTS_PYRAMIDS, reason="torch 2.10 does not export pyramids of any size")
def test_one_graph_serves_any_batch_and_size(tmp_path):
    model = build("retinanet")
    drawn = torch.stack([image[:, :128, :120] for image in drawn_images(3)])
    for run in written(follow(model, drawn[:2, :, :96], is_fixed=False), tmp_path):
        for images in (drawn[:1], drawn, drawn[:2, :, :70], drawn[1:, :, :, :60]):
            compare(model, run, images)


@pytest.mark.slow
def test_a_fixed_graph_takes_its_own_size_alone(tmp_path):
    model = build("fcos")
    drawn = torch.stack([image[:, :96, :120] for image in drawn_images(2)])
    for run in written(follow(model, drawn[:1], is_fixed=True), tmp_path):
        for n in range(2):
            compare(model, run, drawn[n : n + 1])
        with pytest.raises(Exception, match="96|shape|dimension"):
            run(drawn[:1, :, :70])


def test_a_file_of_pt2_has_no_pictures_in_it():
    assert follow(build("ssd"), torch.rand(1, 3, 64, 64), is_fixed=True).example_inputs is None


def test_the_operation_that_an_exporter_lacks_is_named():
    try:
        try:
            raise RuntimeError("Error when translating node %amax : call_function[target=torch.ops.aten.amax.default]")
        except RuntimeError as inner:
            raise ValueError("Failed to convert\nNext steps") from inner
    except ValueError as error:
        assert why_not(error) == "the exporter has no form of aten.amax.default"
    assert why_not(ValueError("first\nsecond")) == "first"
