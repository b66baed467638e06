"""A batch of pictures and their objects is what torchvision's transform makes of them one by one."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from helpers.batches import make_batch
from models.batched_pictures import BatchedTransform
from models.object_block import objects_of

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = [(90, 150), (120, 70), (64, 100), (31, 33)]
OPTIONS = {
    "one size": {"min_size": 80, "max_size": 120},
    "drawn sizes": {"min_size": (48, 64, 80), "max_size": 130},
    "left as they are": {"min_size": 80, "max_size": 120, "_skip_resize": True},
    "fixed": {"min_size": 70, "max_size": 90, "fixed_size": (90, 70), "size_divisible": 1},
}


def pair(**options):
    """torchvision's transform and ours."""
    values = {"image_mean": MEAN, "image_std": STD, **options}
    return GeneralizedRCNNTransform(**values), BatchedTransform(**values)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_equals_torchvisions(options, task, training):
    theirs, ours = (transform.train(training) for transform in pair(**options))
    images, targets = make_batch(SIZES, [3, 0, 5, 1], task=task)
    given = [image.clone() for image in images]
    torch.manual_seed(3)
    expected, moved = theirs(images, targets)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    batch, objects = ours.batch(images, objects_of(targets))
    assert torch.equal(torch.get_rng_state(), state)  # as many numbers drawn
    assert all(map(torch.equal, images, given))
    assert batch.image_sizes == expected.image_sizes and batch.sizes.tolist() == [list(s) for s in batch.image_sizes]
    torch.testing.assert_close(batch.tensors, expected.tensors, rtol=0, atol=2e-6)
    assert torch.equal(batch.tensors == 0, expected.tensors == 0)  # the padding is exactly 0
    wanted = objects_of(moved)
    for name in ("boxes", "labels", "is_object", "keypoints"):
        if getattr(wanted, name) is not None:
            assert torch.equal(getattr(objects, name), getattr(wanted, name)), name
    if task == "mask":
        assert all(mask is target["masks"] for mask, target in zip(objects.masks, targets, strict=True))


def test_the_given_objects_stay_as_they_are():
    images, targets = make_batch(SIZES, [3, 0, 5, 1], task="keypoint")
    objects = objects_of(targets)
    before = objects.boxes.clone(), objects.keypoints.clone()
    _, moved = pair(min_size=40, max_size=70)[1].batch(images, objects)
    assert torch.equal(objects.boxes, before[0]) and torch.equal(objects.keypoints, before[1])
    assert not torch.equal(moved.boxes, before[0])


def test_many_short_sides_are_drawn_as_torchvision_draws_them():
    theirs, ours = pair(min_size=tuple(range(20, 60)), max_size=400)
    torch.manual_seed(0)
    expected = [theirs.torch_choice(theirs.min_size) for _ in range(50)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert [height for height, _ in ours._sizes_after([(40, 40)] * 50)] == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_is_torchvisions():
    theirs, ours = pair(min_size=80, max_size=120)
    images, targets = make_batch(SIZES, [1, 1, 1, 1])
    assert torch.equal(ours(images, targets)[0].tensors, theirs(images, targets)[0].tensors)
