"""The best anchor of a box equals the best of all pairs, for every model."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from inspection.anchor_reach import AnchorGrids, build_skeleton_model, reach_of_anchors, resize_objects
from models.architectures import ARCHITECTURES, ModelSpec, build_model

SIZE = (70, 100)


def random_boxes(rng, count, height, width):
    corners = rng.uniform(0, 1, (count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    return boxes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reach_equals_torchvisions_own_matching(name):
    has_points = ARCHITECTURES[name].task == "keypoint"
    sizes = {} if ARCHITECTURES[name].fixed_size else {"min_size": (128,), "max_size": 200}
    spec = ModelSpec(name, 2, num_keypoints=2 if has_points else 0, **sizes)
    boxes = random_boxes(np.random.default_rng(0), 40, *SIZE)
    heights, widths = (np.full(len(boxes), side) for side in SIZE)
    skeleton = build_skeleton_model(spec)
    objects = resize_objects(skeleton, boxes, heights, widths)
    reach = reach_of_anchors(AnchorGrids(skeleton), objects)

    model = build_model(spec).eval()
    images, targets = model.transform([torch.zeros(3, *SIZE)], [{"boxes": torch.from_numpy(boxes)}])
    resized = targets[0]["boxes"]
    assert images.image_sizes[0] == (objects.heights[0], objects.widths[0])
    assert np.allclose(objects.boxes, resized.numpy(), atol=1e-3)
    with torch.no_grad():
        features = list(model.backbone(images.tensors).values())
    owner = model.rpn if hasattr(model, "rpn") else model
    anchors = owner.anchor_generator(ImageList(images.tensors, images.image_sizes), features)[0]
    if name.startswith("fcos"):
        matched = []
        model.head.compute_loss = lambda targets, outputs, anchors, indices: matched.append(indices[0])
        per_level = [f.shape[-2] * f.shape[-1] for f in features]
        for box in resized:  # one at a time: boxes that share a location compete for it
            model.compute_loss([{"boxes": box[None]}], {}, [anchors], per_level)
        assert reach.best.tolist() == [bool((indices >= 0).any()) for indices in matched]
        assert 0 < reach.best.sum() < len(boxes) or reach.best.all()
    else:
        assert np.allclose(reach.best, box_iou(resized.double(), anchors.double()).max(dim=1).values, atol=1e-6)
        thresholds = {"ssd": (0.5, 0.5), "retinanet": (0.5, 0.4)}
        expected = next((v for k, v in thresholds.items() if name.startswith(k)), (0.7, 0.3))
        assert (reach.wanted, reach.least) == expected
    assert reach.stride == pytest.approx(images.tensors.shape[-1] / features[0].shape[-1], rel=0.05)
