"""In mixed precision anchors, boxes and losses are those of float32; only features and head outputs are rounded."""

import copy

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

from models.architectures import ARCHITECTURES, ModelSpec, build_model
from models.box_precision import HEADS, keep_boxes_float32

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
HALVES = [torch.bfloat16, torch.float16]


def small_model(name):
    torch.manual_seed(0)
    sizes = {} if ARCHITECTURES[name].fixed_size else {"min_size": (96,), "max_size": 160}
    task = ARCHITECTURES[name].task
    model = build_model(ModelSpec(name, 4, 3 if task == "keypoint" else 0, **sizes)).train()
    if ARCHITECTURES[name].has_proposals:
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    return model


def batch(task):
    torch.manual_seed(1)
    images, targets = list(torch.rand(2, 3, 90, 150)), []
    for k in range(2):
        boxes = torch.tensor([[8.0, 9, 71, 80], [60 + k, 20, 149, 66]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 1 if task == "keypoint" else 2])}
        if task == "mask":
            target["masks"] = (torch.rand(2, 90, 150) < 0.5).to(torch.uint8)
        if task == "keypoint":
            target["keypoints"] = torch.cat(
                [boxes[:, None, :2] + torch.tensor([[5.0, 4], [20, 9], [33, 40]]), torch.ones(2, 3, 1)], 2
            )
        targets.append(target)
    return images, targets


def heads_of(model):
    return {name: model.get_submodule(name) for name in HEADS if name in dict(model.named_modules())}


def losses_of(model, task, dtype):
    torch.manual_seed(2)  # R-CNNs draw samples
    images, targets = batch(task)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        return model(images, copy.deepcopy(targets))


def record(model, outputs):
    """Note what the heads of a model give; returns the handles that end it."""
    return [
        head.register_forward_hook(lambda module, args, output, key=key: outputs[key].append(output))
        for key, head in heads_of(model).items()
    ]


def replay(model, outputs):
    """Let the heads of a model give what was noted; returns the handles that end it."""
    return [
        head.register_forward_hook(lambda module, args, output, key=key: outputs[key].pop(0))
        for key, head in heads_of(model).items()
    ]


# float16 takes a CPU ten times as long: one model of that.
CASES = [(name, torch.bfloat16) for name in NINE] + [("ssdlite320_mobilenet_v3_large", torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_after_the_heads_mixed_precision_computes_what_float32_does(name, dtype):
    """Losses in half precision equal, bit for bit, those of float32 that are given the same outputs of the heads."""
    task, model = ARCHITECTURES[name].task, small_model(name)
    full = losses_of(model, task, None)
    keep_boxes_float32(model)
    outputs = {key: [] for key in heads_of(model)}
    handles = record(model, outputs)
    half = losses_of(model, task, dtype)
    for handle in handles:
        handle.remove()
    assert all(value.dtype == torch.float32 for value in half.values())
    handles = replay(model, outputs)
    replayed = losses_of(model, task, None)
    assert {key: float(value) for key, value in half.items()} == {key: float(v) for key, v in replayed.items()}
    # What remains is the rounding of features to 8 bits. It gives the second stage of R-CNNs other boxes to learn from.
    for key, value in full.items():
        if key in ("loss_classifier", "loss_box_reg", "loss_mask", "loss_keypoint"):
            continue
        assert float(half[key]) == pytest.approx(float(value), rel=0.1, abs=0.05), key


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn", "ssd300_vgg16"]
)
def test_anchors_are_those_of_float32_and_stay_so(name, dtype):
    with torch.device("meta"):
        model = build_model(ModelSpec(name, 4))
    keep_boxes_float32(model)
    (generator,) = [m for m in model.modules() if isinstance(m, (AnchorGenerator, DefaultBoxGenerator))]
    images = type("Images", (), {"tensors": torch.zeros(1, 3, 800, 1344), "image_sizes": [(800, 1344)]})
    strides = (
        [8, 16, 32, 64, 128, 256] if "ssd" in name else [4, 8, 16, 32, 64] if "rcnn" in name else [8, 16, 32, 64, 128]
    )
    maps = [torch.zeros(1, 1, -(-800 // stride), -(-1344 // stride)) for stride in strides]
    expected = generator(images, maps)[0]
    assert expected.dtype == torch.float32
    found = generator(images, [map_.to(dtype) for map_ in maps])[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(generator(images, maps)[0], expected)  # nothing rounded is left behind


def test_state_dicts_and_copies_stay_as_they_are():
    model = small_model("fasterrcnn_mobilenet_v3_large_320_fpn")
    names = list(model.state_dict())
    keep_boxes_float32(model)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model).eval()
    assert all(len(head._forward_hooks) == 1 for head in heads_of(copied).values())
