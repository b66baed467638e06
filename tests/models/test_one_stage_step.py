"""The batched step of RetinaNet, FCOS and SSD has torchvision's losses and gradients, and its cost is not per picture."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou_loss

from benchmarks.waits import count_waits
from helpers.batches import make_batch
from helpers.thin import build_thin_one_stage
from models.batched_boxes import giou_loss
from models.batched_step import use_batched_step
from models.object_block import BatchTargets, objects_of

NAMES = ["retinanet", "retinanet_giou", "fcos", "ssd"]
SIZES = [(90, 150), (120, 70), (64, 100)]
COUNTS = {"one without": [3, 0, 12], "none": [0, 0, 0], "hundred": [100, 2, 1], "crowd": [9, 6, 5]}


def thin_pair(name, *, same_pictures=True):
    """torchvision's model and ours of the same weights; with no mean to take off, pictures are equal bit by bit."""
    torch.manual_seed(0)
    plain = build_thin_one_stage(name, **({"image_mean": [0.0] * 3, "image_std": [1.0] * 3} if same_pictures else {}))
    batched = copy.deepcopy(plain)
    use_batched_step(batched)
    return plain.train(), batched.train()


def batch_of(kind):
    images, targets = make_batch(SIZES, COUNTS[kind])
    if kind == "crowd":  # equal boxes, and equal areas one in the other's place
        targets[0]["boxes"][:4] = torch.tensor([20.0, 20, 60, 70])
        targets[0]["boxes"][4:6] = torch.tensor([24.0, 20, 64, 70])
        # Around a point of the coarsest map, from whose level's range no object is too large.
        targets[1]["boxes"][:] = torch.tensor([28.0, 1, 69, 95])
        targets[2]["boxes"][:3] = torch.tensor([60.0, 30, 61, 31])  # smaller than the pixels of any map
    return images, targets


def losses_and_gradient(model, images, targets):
    torch.manual_seed(1)  # short sides are drawn
    losses = model(images, [dict(target) for target in targets])
    model.zero_grad()
    sum(losses.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradient


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_torchvisions(name, kind):
    plain, batched = thin_pair(name)
    expected, wanted = losses_and_gradient(plain, *batch_of(kind))
    found, gradient = losses_and_gradient(batched, *batch_of(kind))
    assert list(found) == list(expected) and found == pytest.approx(expected, rel=1e-5)
    # torchvision's focal loss has p as 1 - (1 - p), which loses six bits at 0.01, where training starts.
    rounding = 3e-5 if kind == "none" and name.startswith("retinanet") else 1e-5
    assert (gradient - wanted).norm() <= rounding * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_torchvisions_with_its_normalisation_and_the_resize_of_evaluation(name):
    plain, batched = thin_pair(name, same_pictures=False)
    for model in (plain, batched):
        model.transform.eval()  # as for the validation loss
    expected, _ = losses_and_gradient(plain, *batch_of("one without"))
    found, _ = losses_and_gradient(batched, *batch_of("one without"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_confident_heads_have_torchvisions_losses(name):
    """Far from where training starts: large logits, boxes that have left their anchors."""
    plain, batched = thin_pair(name)
    with torch.no_grad():
        for model in (plain, batched):
            torch.manual_seed(5)
            for parameter in model.head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    expected, wanted = losses_and_gradient(plain, *batch_of("crowd"))
    found, gradient = losses_and_gradient(batched, *batch_of("crowd"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_state_are_torchvisions_and_copies_stay_batched(name):
    plain, batched = thin_pair(name)
    losses_and_gradient(batched, *batch_of("one without"))
    batched.load_state_dict(plain.state_dict())
    plain.score_thresh = batched.score_thresh = 0.0
    images, _ = batch_of("one without")
    with torch.inference_mode():
        for ours, theirs in zip(batched.eval()(images), plain.eval()(images), strict=True):
            assert len(theirs["boxes"]) > 0 and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert list(batched.state_dict()) == list(plain.state_dict())
    for copied in (copy.deepcopy(batched), pickle.loads(pickle.dumps(batched))):
        assert type(copied) is type(batched) and isinstance(copied, type(plain))
        assert len(copied.anchor_generator._anchor_cache) == 0


class Operations(TorchDispatchMode):
    """Counts operations; views are none."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_beside_the_network(model, num_pictures):
    """Return how many operations a forward has outside backbone and head, with objects as the loader packs them."""
    images, targets = make_batch([(48, 64), (40, 32)] * (num_pictures // 2), [7] * num_pictures)
    targets = BatchTargets(targets, objects_of(targets))
    pictures, _ = model.transform.batch(images, targets.objects)
    with Operations() as network:
        model.head(list(model.backbone(pictures.tensors).values()))
    with Operations() as step:
        model(images, targets)
    return step.counts.total() - network.counts.total()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_few_operations_whatever_the_batch_and_no_wait(name):
    _, batched = thin_pair(name, same_pictures=False)
    if name != "ssd":
        batched.transform.min_size, batched.transform.max_size = (36, 40), 64
    for size in (2, 16):
        operations_beside_the_network(batched, size)  # anchors and constants are made
    few, many = (operations_beside_the_network(batched, size) for size in (2, 16))
    assert many <= 150 and many - few <= 2 * 14
    batched.transform.eval()  # the draw of a short side reads a number, which is on the host
    images, targets = batch_of("one without")
    targets = BatchTargets(targets, objects_of(targets))
    batched(images, targets)
    assert not count_waits(lambda: sum(batched(images, targets).values()).backward())


def test_giou_loss_is_torchvisions_with_its_gradient():
    boxes, targets = (make_batch([(80, 120)], [60], seed=seed)[1][0]["boxes"] for seed in (0, 1))
    targets[:10] = boxes[:10]  # side by side they only touch: gradients are one-sided there
    targets[:10, 0] = boxes[:10, 2]
    targets[:10, 2:] += 30
    targets[10:20] = boxes[10:20]
    gradients = []
    for loss in (giou_loss, lambda *args: generalized_box_iou_loss(*args, reduction="none")):
        found = boxes.clone().requires_grad_()
        losses = loss(found, targets)
        losses.sum().backward()
        gradients.append((losses.detach(), found.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
