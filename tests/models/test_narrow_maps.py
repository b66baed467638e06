"""The gradients of maps of one column on a CPU in bfloat16."""

import pytest
import torch
from torch import nn

from models.architectures import ModelSpec, build_model
from models.narrow_maps import widen_narrow_maps


def soil_memory():
    """Fill what the next tensors get of freed memory with large numbers."""
    for _ in range(3):
        blocks = [torch.full((size,), 1e30) for size in (2304, 65536, 300_000, 589_824, 1_200_000)]
        del blocks


def gradients(conv, maps, dtype):
    conv.zero_grad()
    maps = maps.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = conv(maps)
    soil_memory()
    output.float().square().sum().backward()
    return output.float(), maps.grad, conv.weight.grad.clone()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 1), (1, 3)])
def test_gradients_in_bfloat16_are_those_of_float32(size):
    torch.manual_seed(0)
    conv, maps = nn.Conv2d(256, 256, 3, stride=2, padding=1), torch.randn(2, 256, *size)
    expected = gradients(conv, maps, None)
    widen_narrow_maps(conv)
    for exact in (True, False):
        found = gradients(conv, maps, None if exact else torch.bfloat16)
        for values, wanted in zip(found, expected, strict=True):
            scale = float(wanted.detach().abs().max())
            assert torch.allclose(values, wanted, atol=(1e-5 if exact else 0.05) * scale, rtol=0)


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 7, stride=2, padding=3),
                                  nn.Conv2d(8, 8, 5, stride=2, padding=2), nn.Conv2d(8, 8, 3, stride=3, padding=1),
                                  nn.Conv2d(8, 8, 2, stride=2, padding=1), nn.Conv2d(8, 8, 1, stride=2),
                                  nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding="valid")])  # fmt: skip
def test_what_a_convolution_gives_keeps_its_shape(conv):
    maps = [torch.randn(1, 8, 9, width) for width in (1, 2, 3) if conv.padding != "valid" or width == 3]
    before = [conv(map_) for map_ in maps]
    widen_narrow_maps(conv)
    for map_, wanted in zip(maps, before, strict=True):
        assert torch.allclose(conv(map_), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_a_pyramid_of_pictures_of_64_pixels_has_finite_gradients(name):
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, 4)).get_submodule("backbone.fpn.extra_blocks")
    widen_narrow_maps(model)
    maps = [torch.randn(2, 256, side, side) for side in (8, 4, 2)]
    soil_memory()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, _ = model(maps, maps if model.use_P5 else [torch.randn(2, 2048, s, s) for s in (8, 4, 2)], [])
    assert results[-1].shape[-2:] == (1, 1)
    soil_memory()
    sum(values.float().sum() for values in results).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() < 1e4, name
