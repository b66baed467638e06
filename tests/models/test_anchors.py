"""Anchors of one's own are torchvision's for these sizes and ratios; what does not fit a model is one line."""

import json
import re

import numpy as np
import pytest
import torch
from torchvision.models import get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import export
from helpers.drawn import draw_coco
from helpers.runs import lines, run, train_once
from helpers.shaken import shaken_checkpoint
from models.anchors import anchor_owner
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from models.weights import (
    build_start_model,
    find_model_weights,
    load_model_weights,
    read_weights,
    structure_of_weights,
)
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model

SIZES = ((9, 13), (18, 26), (36, 52), (72, 104), (144, 208))
RATIOS = (0.125, 1, 8, 12)
HAVE_ANCHORS = [name for name in ARCHITECTURES if not name.startswith("fcos")]
SMALL = "ssdlite320_mobilenet_v3_large"


def spec_for(name, **options):
    return ModelSpec(name, 4, num_keypoints=3 if ARCHITECTURES[name].task == "keypoint" else 0, **options)


def skeleton(name, **options):
    with torch.device("meta"):
        return build_model(spec_for(name, **options)).eval()


def plain(values):
    return None if values is None else tuple(tuple(map(float, group)) for group in values)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("fasterrcnn_resnet50_fpn", "rpn_anchor_generator"), ("retinanet_resnet50_fpn", "anchor_generator")],
)
def test_anchors_and_heads_are_those_of_torchvisions_builder(name, flag):
    generator = AnchorGenerator(SIZES, (RATIOS,) * 5)
    options = {"min_size": 64, "max_size": 96}
    theirs = get_model(name, weights=None, weights_backbone=None, num_classes=4, **{flag: generator}, **options)
    ours = build_model(spec_for(name, min_size=(64,), max_size=96, anchor_sizes=SIZES, anchor_ratios=RATIOS))
    assert str(ours) == str(theirs)
    ours.load_state_dict(theirs.state_dict())
    targets = [{"boxes": torch.tensor([[5.0, 5, 15, 50]]), "labels": torch.tensor([1])}]
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        losses.append(model.eval().train()([torch.ones(3, 60, 80)] * 2, targets * 2))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", HAVE_ANCHORS)
def test_every_head_gives_a_box_and_its_classes_for_every_anchor(name):
    """The number of boxes that a head gives is the number of anchors, on every map, and nothing else differs."""
    own = skeleton(name)
    model = skeleton(name, anchor_ratios=(0.1, 0.5, 1, 7))
    sizes = {key: value.shape for key, value in own.state_dict().items()}
    found = {key: value.shape for key, value in model.state_dict().items()}
    changed = {key for key in sizes if found[key] != sizes[key]}
    assert found.keys() == sizes.keys() and all(
        ".cls_logits." in k or "bbox" in k or "module_list" in k for k in changed
    )
    assert changed and all(key.startswith(("rpn.head.", "head.")) for key in changed)
    generator, head = anchor_owner(model).anchor_generator, anchor_owner(model).head
    features = list(model.backbone(torch.zeros(1, 3, 320, 320, device="meta")).values())
    outputs = head(features)
    outputs = outputs["bbox_regression"] if isinstance(outputs, dict) else outputs[1]
    if isinstance(outputs, list):  # of an RPN
        counts = [output.shape[1] * output.shape[2] * output.shape[3] // 4 for output in outputs]
    else:
        counts = [outputs.shape[1]]
    places = [feature.shape[2] * feature.shape[3] for feature in features]
    assert sum(counts) == sum(n * k for n, k in zip(places, generator.num_anchors_per_location()))
    if name == "retinanet_resnet50_fpn_v2":
        assert head.regression_head._loss_type == "giou"


def test_sizes_given_once_are_those_of_all_maps_and_the_models_own_are_the_default():
    own = skeleton("fasterrcnn_mobilenet_v3_large_fpn").rpn.anchor_generator
    model = skeleton("fasterrcnn_mobilenet_v3_large_fpn", anchor_sizes=((8, 16, 32),))
    assert model.rpn.anchor_generator.sizes == ((8, 16, 32),) * 3
    assert model.rpn.anchor_generator.aspect_ratios == own.aspect_ratios
    model = skeleton("retinanet_resnet50_fpn", anchor_ratios=(1, 3))
    assert model.anchor_generator.sizes == skeleton("retinanet_resnet50_fpn").anchor_generator.sizes
    assert model.anchor_generator.aspect_ratios == ((1, 3),) * 5


def default_boxes(model):
    """The default boxes of SSD's first place on every map, as (width, height)."""
    maps = [torch.zeros(1, 1, side, side) for side in (20, 10, 5, 3, 2, 1)]
    boxes = model.anchor_generator(ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)]), maps)[0]
    sides = boxes[:, 2:] - boxes[:, :2]
    starts = np.cumsum(
        [0, *(m.shape[2] ** 2 * k for m, k in zip(maps, model.anchor_generator.num_anchors_per_location()))]
    )
    return [
        sides[start : start + k].tolist()
        for start, k in zip(starts.tolist(), model.anchor_generator.num_anchors_per_location())
    ]


def test_ssd_has_every_ratio_with_its_inverse_and_a_size_between_two():
    sizes = ((10,), (20,), (40,), (80,), (160,), (200,), (240,))
    first = default_boxes(skeleton(SMALL, anchor_sizes=sizes, anchor_ratios=(4, 1, 0.25)))[0]
    expected = [(10, 10), (200**0.5, 200**0.5), (20, 5), (5, 20)]
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    # Its own sizes, given as flags, change nothing.
    own = tuple((320 * scale,) for scale in skeleton(SMALL).anchor_generator.scales)
    assert default_boxes(skeleton(SMALL, anchor_sizes=own, anchor_ratios=(2, 3))) == default_boxes(skeleton(SMALL))


WRONG = {
    "maps": ("retinanet_resnet50_fpn", "16 32", r"has 5 feature maps, got sizes for 2; .*32,40,50 64,80,101"),
    "mobilenet": ("fasterrcnn_mobilenet_v3_large_fpn", "8 16 32 64 128", r"has 3 feature maps, got sizes for 5; .*, or once"),
    "uneven": ("retinanet_resnet50_fpn", "16 32 64 128 256,300", r"needs as many sizes on each feature map, got 1, 1, 1, 1, 2"),
    "negative": ("retinanet_resnet50_fpn", "-8 16 32 64 128", r"--anchor-sizes -8 16 32 64 128: must be above 0"),
    "nan": ("retinanet_resnet50_fpn", "nan", r"--anchor-sizes nan: must be above 0"),
    "ratio": ("retinanet_resnet50_fpn", "16 --anchor-ratios 0", r"--anchor-ratios 0: must be above 0"),
    "text": ("retinanet_resnet50_fpn", "16;32", r"'16;32': expected pixels, such as 32, or 32,40,50 for one map"),
    "thin": ("retinanet_resnet50_fpn", "2 --anchor-ratios 9", r"an anchor is 0\.67 pixels thin, expected over 1"),
    "points": ("fcos_resnet50_fpn", "16 32 64 128 256", r"--anchor-sizes: fcos_resnet50_fpn has points instead of anchors"),
    "ssd": ("ssd300_vgg16", "8 16 32 64 128 256", r"6 feature maps .*give these, and .*7 numbers .*, such as 21 45 99 153"),
    "ssd groups": (SMALL, "8,9 16 32 64 128 256 300", r"7 numbers without commas, such as 64 112 160 208 256 304 320"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_anchors_that_a_model_cannot_have_are_one_line(case, capsys):
    name, text, message = WRONG[case]
    with pytest.raises(SystemExit, match="2"):
        run("--model", name, "--anchor-sizes", *text.split())
    text = capsys.readouterr().err
    assert text.count("error:") == 1 and re.search(message, text.splitlines()[-1]), text


def test_the_record_survives_plain_values_and_older_ones_have_none():
    spec = spec_for("retinanet_resnet50_fpn", anchor_sizes=plain(SIZES), anchor_ratios=RATIOS)
    values = json.loads(json.dumps(spec.to_plain()))
    assert ModelSpec.from_plain(values) == spec
    del values["anchor_sizes"], values["anchor_ratios"]
    assert ModelSpec.from_plain(values) == spec_for("retinanet_resnet50_fpn")


def fresh_layers(name, weights, path, spec):
    """Save the weights of one record, start from them with another; returns the names that started anew."""
    torch.save(build_model(weights).state_dict(), path)
    source = find_model_weights(str(path), name)
    return load_model_weights(build_model(spec), read_weights(source), source, spec)


def test_weights_keep_all_but_the_heads_that_other_anchors_change(tmp_path):
    path = tmp_path / "a.pth"
    faster, retina = "fasterrcnn_mobilenet_v3_large_320_fpn", SMALL
    rpn = [f"rpn.head.{layer}.{kind}" for layer in ("bbox_pred", "cls_logits") for kind in ("bias", "weight")]
    assert fresh_layers(faster, spec_for(faster), path, spec_for(faster, anchor_ratios=RATIOS)) == rpn
    same_number = spec_for(faster, anchor_sizes=((8, 16, 32, 64, 128),))
    assert fresh_layers(faster, spec_for(faster), path, same_number) == []
    # 6 anchors of 4 classes have the shape of 4 anchors of 6 classes.
    anew = fresh_layers(retina, ModelSpec(retina, 6, anchor_ratios=(2,)), path, ModelSpec(retina, 4))
    assert {key.split(".")[1] for key in anew} == {"classification_head", "regression_head"}
    assert len([key for key in anew if key.endswith("weight")]) == 12


def test_weights_of_a_run_bring_their_anchors_unless_flags_give_others(tmp_path):
    path = shaken_checkpoint(tmp_path / "a.pth", SMALL, anchor_ratios=(5.0,))
    source = find_model_weights(str(path), SMALL)
    assert structure_of_weights(source, read_weights(source), SMALL)["anchor_ratios"] == (5.0,)
    model, spec = build_start_model(spec_for(SMALL), weights=str(path))
    assert spec.anchor_ratios == (5.0,) and model.anchor_generator.aspect_ratios == [[5.0]] * 6
    model, spec = build_start_model(spec_for(SMALL, anchor_ratios=(3.0,)), weights=str(path))
    assert spec.anchor_ratios == (3.0,) and model.anchor_generator.aspect_ratios == [[3.0]] * 6


@pytest.mark.slow
@pytest.mark.usefixtures("restore_process")
def test_a_run_keeps_its_anchors_in_training_scoring_and_resuming(tmp_path, capsys):
    root, out = draw_coco(tmp_path / "coco", num_images=4), tmp_path / "run"
    sizes = ["20", "40", "80", "120", "180", "240", "300"]
    train_once(root, out, "--anchor-sizes", *sizes, "--anchor-ratios", "0.125", "8")
    checkpoint = out / "weights" / "checkpoint.pth"
    content = load_checkpoint(checkpoint)
    model, spec = rebuild_model(content)
    assert spec.anchor_ratios == (0.125, 8.0) and spec.anchor_sizes == tuple((float(size),) for size in sizes)
    np.testing.assert_allclose(model.anchor_generator.scales, [float(size) / 320 for size in sizes])
    again = tmp_path / "again"
    common = ["--data-path", root, "--device", "cpu", "--workers", 0, "--resume", checkpoint]
    assert run(*common, "--test-only", "--output-dir", again) == 0
    assert lines(again)[0]["bbox"] == lines(out)[0]["bbox"]
    assert run(*common, "--epochs", 2, "--output-dir", out, "--anchor-ratios", "2", "3") == 1
    text = r"error: .*the checkpoint was trained with --anchor-ratios 0.125 8, got 2 3; leave the flag out"
    assert re.search(text, capsys.readouterr().err)
    assert run(*common, "--epochs", 2, "--output-dir", out) == 0
    assert rebuild_model(load_checkpoint(checkpoint))[1] == spec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to_format", "sizes"),
    [(SMALL, "onnx", None), ("fasterrcnn_mobilenet_v3_large_320_fpn", "torchscript", ((8.0, 24.0, 72.0),))],
)
def test_an_exported_file_agrees_with_a_model_of_its_own_anchors(
    tmp_path, name, to_format, sizes, few_proposals, monkeypatch
):
    monkeypatch.setattr(export, "NUM_PICTURES", 1)
    path = shaken_checkpoint(tmp_path / "a.pth", name, anchor_sizes=sizes, anchor_ratios=(0.2, 1.0, 5.0))
    output = tmp_path / "exported"
    assert export.run(["--checkpoint", str(path), "--format", to_format, "--output", str(output)]) == 0
    assert output.is_file()
