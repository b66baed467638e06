"""The two forms of boxes."""

import numpy as np
import pytest

from pixels.geometry import xywh_to_xyxy, xyxy_to_xywh


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boxes_become_corners_and_back_in_their_own_dtype(dtype):
    boxes_xywh = np.array([[1.5, 2, 10, 20], [0, 0, 3, 0]], dtype=dtype)
    before = boxes_xywh.copy()
    corners = xywh_to_xyxy(boxes_xywh)
    assert corners.tolist() == [[1.5, 2, 11.5, 22], [0, 0, 3, 0]] and corners.dtype == dtype
    again = xyxy_to_xywh(corners)
    assert again.tolist() == before.tolist() and again.dtype == dtype
    assert (boxes_xywh == before).all()  # what was given is not changed


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4)])
def test_any_number_of_boxes(shape):
    boxes = np.arange(np.prod(shape), dtype=float).reshape(shape)
    assert xywh_to_xyxy(boxes).shape == xyxy_to_xywh(boxes).shape == shape
