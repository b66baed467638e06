"""The two forms of boxes, and mask blocks cut as the picture is."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from pixels.geometry import Placement, View, xywh_to_xyxy, xyxy_to_xywh
from pixels.masks import MaskBlock


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


def on_canvas(block, height, width):
    canvas = np.zeros((height, width), dtype=np.uint8)
    rows, columns = block.pixels.shape
    canvas[block.top : block.top + rows, block.left : block.left + columns] = block.pixels
    return canvas


@pytest.mark.parametrize("flipped", [False, True])
def test_a_cut_block_is_the_whole_mask_cut(flipped):
    """Blocks that reach over each edge of the crop, end at it, begin at it, cover it, or lie outside."""
    height, width, crop = 12, 15, (4, 3, 10, 9)
    x1, y1, x2, y2 = crop
    placement = Placement(crop, (0, 0, 6, 6), 6, 6, flipped, (0.0,) * 3, antialias=False)
    rng = np.random.default_rng(0)
    seen = set()
    for left in range(width):
        for right in range(left + 1, width + 1):
            for top, bottom in ((0, 12), (2, 4), (3, 9), (8, 11), (0, 3), (5, 6)):
                block = MaskBlock(left, top, rng.integers(0, 2, (bottom - top, right - left), dtype=np.uint8))
                expected = on_canvas(block, height, width)[y1:y2, x1:x2]
                cut = placement.crop_block(block)
                assert np.array_equal(on_canvas(cut, 6, 6), expected), (left, right, top, bottom)
                if flipped:
                    expected = expected[:, ::-1]
                assert np.array_equal(on_canvas(placement.resize_block(cut), 6, 6), expected)
                seen.add((bool(expected[:, 0].any()), bool(expected[:, -1].any())))
    assert len(seen) == 4


@pytest.mark.parametrize("flipped", [False, True])
def test_keypoints_are_kept_as_torchvisions_sanitize_keeps_them(flipped):
    """On the first and the last pixel of a crop, on its far edge, and half a pixel beside each."""
    view = View.of(30, 40).crop(5, 8, 12, 20)
    xs, ys = np.array([7.5, 8, 8.5, 27, 27.5, 28, 28.5]), np.array([4.5, 5, 5.5, 16, 16.5, 17, 17.5])
    points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(1, -1, 2)
    keypoints = np.concatenate([points, np.full((1, points.shape[1], 1), 2)], axis=2)
    placement = (view.flip() if flipped else view).place()
    moved = placement.move_keypoints(keypoints, np.arange(points.shape[1]))[0]
    in_crop = torch.from_numpy(points[0] - [8, 5])
    _, kept = tvf.sanitize_keypoints(in_crop, canvas_size=(12, 20))
    assert (moved[:, 2] > 0).tolist() == kept.tolist() and 0 < kept.sum() < len(kept)
    if flipped:
        in_crop[:, 0] = (20 - 1 - in_crop[:, 0]).clamp(min=0)
    assert (moved[:, :2] == np.where(kept[:, None], in_crop, 0)).all()


@pytest.mark.parametrize(("target", "shrink"), [((0, 0, 10, 20), 4.0), ((5, 5, 10, 25), 6.0), ((0, 0, 60, 160), 0.5)])
def test_shrink_is_that_of_the_side_that_shrinks_more(target, shrink):
    assert Placement((10, 20, 40, 100), target, 200, 200, False, (0.0,) * 3, antialias=True).shrink == shrink
