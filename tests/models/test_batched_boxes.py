"""Boxes are encoded and decoded for a batch as torchvision does for one picture; constants are copied once."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from helpers.batches import make_batch
from models.batched_boxes import constant, decode_boxes, encode_boxes


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)])
def test_codes_and_boxes_equal_torchvisions(weights):
    coder = BoxCoder(weights)
    boxes, anchors = (make_batch([(80, 120)], [50], seed=seed)[1][0]["boxes"] for seed in (0, 1))
    codes = encode_boxes(boxes.view(5, 10, 4), anchors.view(5, 10, 4), weights)
    torch.testing.assert_close(codes.view(50, 4), coder.encode_single(boxes, anchors), rtol=1e-6, atol=1e-6)
    codes[0, 0, 2:] = 100  # beyond what the coder allows
    decoded = decode_boxes(codes, anchors.view(5, 10, 4), coder)
    torch.testing.assert_close(
        decoded.view(50, 4), coder.decode_single(codes.view(50, 4), anchors), rtol=1e-6, atol=1e-4
    )


def test_a_constant_is_made_once_and_serves_training_after_an_evaluation():
    constant.cache_clear()
    with torch.inference_mode():
        kept = constant((0.5, 0.25), torch.device("cpu"))
    assert constant((0.5, 0.25), torch.device("cpu")) is kept and kept.tolist() == [0.5, 0.25]
    assert not kept.is_inference()
