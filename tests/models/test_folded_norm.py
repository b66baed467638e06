"""Folded frozen norms give torchvision's values bit for bit in float32, and keep the type of what comes in."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.architectures import ModelSpec, build_model
from models.folded_norm import FoldedNorm, fold_frozen_norms
from optimization.weight_average import WeightAverage


def shake(norm, seed):
    generator = torch.Generator().manual_seed(seed)
    for values in norm.buffers():
        values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return norm


@pytest.fixture
def pair():
    plain = shake(FrozenBatchNorm2d(16), 0)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    return plain, folded


def results(norm, images):
    images = images.detach().requires_grad_()
    output = norm(images)
    output.square().sum().backward()
    return output.detach(), images.grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_is_torchvisions_to_the_last_bit_with_its_gradients(pair, memory_format):
    images = torch.randn(2, 16, 9, 7).to(memory_format=memory_format)
    for ours, theirs in zip(results(pair[1], images), results(pair[0], images), strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(pair, dtype, memory_format):
    images = torch.randn(2, 16, 9, 7).to(dtype, memory_format=memory_format)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = pair[1](images), pair[0](images)
    assert ours.dtype == dtype and theirs.dtype == torch.float32
    assert ours.is_contiguous(memory_format=memory_format)
    # Scale and shift are rounded once, and the result: three halves of a last digit, of the largest summand.
    assert (ours - theirs).abs().max() <= 1.5 * torch.finfo(dtype).eps * theirs.abs().max()


def test_scale_and_shift_follow_weights_that_are_loaded_and_moved(pair):
    plain, folded = pair
    images = torch.randn(1, 16, 3, 3)
    folded(images)
    shake(plain, 1)
    folded.load_state_dict(plain.state_dict())
    assert torch.equal(folded(images), plain(images))
    assert torch.equal(folded.double()(images.double()), plain.double()(images.double()))


def test_training_can_follow_an_evaluation_in_inference_mode(pair):
    images = torch.randn(1, 16, 3, 3)
    with torch.inference_mode():
        pair[1](images)
    results(pair[1], images)


def test_a_model_keeps_its_state_and_its_copies_are_folded():
    model = build_model(ModelSpec("fcos_resnet50_fpn", 3, frozen_norm=True))
    before = list(model.state_dict())
    fold_frozen_norms(model)
    assert list(model.state_dict()) == before and sum(isinstance(m, FoldedNorm) for m in model.modules()) == 53
    average = WeightAverage(model, 0.9)
    average.update(model, 5)
    norm = average.model.backbone.body.bn1
    assert isinstance(norm, FoldedNorm) and norm._folded is not model.backbone.body.bn1._folded


@pytest.mark.slow
def test_a_compiled_norm_gives_the_same(pair):
    """By the eager backend, which runs what the compiler has read; without a break in the graph."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), pair[1])
    images = torch.randn(2, 3, 9, 7)
    expected = net(images)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(images), net(images))
