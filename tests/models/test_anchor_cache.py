"""Anchors are made once per shape of a batch, and equal those that torchvision makes for each picture."""

import copy
import pickle

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from models import anchor_cache
from models.anchor_cache import anchors_of
from models.architectures import ModelSpec, build_model


def generator_of(name):
    with torch.device("meta"):
        model = build_model(ModelSpec(name, 4))
    return model.rpn.anchor_generator if "rcnn" in name else model.anchor_generator


def shapes(height, width, levels, dtype=torch.float32):
    images = ImageList(torch.zeros(2, 3, height, width), [(height, width), (height - 5, width - 9)])
    maps = [torch.zeros(2, 8, -(-height // 2**k), -(-width // 2**k), dtype=dtype) for k in range(3, 3 + levels)]
    return images, maps


@pytest.fixture
def calls(monkeypatch):
    """How often a generator was called."""
    made = []
    forward = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *args: made.append(args[0]) or forward(*args))
    return made


@pytest.mark.parametrize(
    ("name", "levels"), [("retinanet_resnet50_fpn", 5), ("fcos_resnet50_fpn", 5), ("ssd300_vgg16", 6)]
)
def test_anchors_equal_torchvisions_and_are_float32(name, levels):
    generator = generator_of(name)
    images, maps = shapes(96, 160, levels)
    expected = generator(images, maps)
    found = anchors_of(generator, images, [map_.bfloat16() for map_ in maps])
    assert found.dtype == torch.float32 and all(torch.equal(found, each) for each in expected)


def test_a_shape_is_made_once_and_the_oldest_of_too_many_goes(calls, monkeypatch):
    monkeypatch.setattr(anchor_cache, "MOST_SHAPES", 2)
    generator = generator_of("retinanet_resnet50_fpn")
    for height, made in ((96, 1), (96, 1), (128, 2), (96, 2), (160, 3), (96, 3), (128, 4)):
        anchors = anchors_of(generator, *shapes(height, 96, 5))
        assert len(calls) == made and len(anchors) == len(generator(*shapes(height, 96, 5))[0])
        calls.pop()


def test_copies_start_empty_and_training_may_follow_an_evaluation():
    generator = generator_of("fcos_resnet50_fpn")
    with torch.inference_mode():
        generator(*shapes(64, 64, 5))
        assert not anchors_of(generator, *shapes(64, 64, 5)).is_inference()
    for copied in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert len(copied._anchor_cache) == 0
        assert torch.equal(anchors_of(copied, *shapes(64, 64, 5)), anchors_of(generator, *shapes(64, 64, 5)))
    assert not generator.state_dict()
