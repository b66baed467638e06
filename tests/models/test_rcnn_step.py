"""The batched step of R-CNNs: with the same samples its losses and gradients are those of torchvision's own step."""

import copy

import pytest
import torch

from helpers.batches import make_batch
from helpers.thin import build_thin_model
from models import batched_sampling, roi_step
from models.architectures import ModelSpec
from models.batched_step import use_batched_step

MODELS = {"box": "fasterrcnn_resnet50_fpn", "mask": "maskrcnn_resnet50_fpn", "keypoint": "keypointrcnn_resnet50_fpn"}
SIZES = [(96, 150), (128, 96), (70, 160), (96, 128)]
# Objects of each picture: several sizes and one without any, none at all, a crowd.
COUNTS = {"one without": [3, 0, 5, 1], "none": [0, 0], "crowd": [100, 1]}


def small_model(task, **options):
    """A thin R-CNN whose proposals have scores and sizes of their own, instead of all the same."""
    torch.manual_seed(0)
    classes = 2 if task == "keypoint" else 4
    model = build_thin_model(ModelSpec(MODELS[task], classes, 3 if task == "keypoint" else 0, **options)).train()
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(100)
        model.rpn.head.bbox_pred.weight.mul_(10)
    return model


def batched(model):
    """A copy of a model that takes the batched step."""
    model = copy.deepcopy(model)
    use_batched_step(model)
    return model


def batch_of(task, counts):
    return make_batch(SIZES[: len(counts)], counts, task=task, num_labels=1 if task == "keypoint" else 3)


class ByKeys:
    """torchvision's sampler, but the candidates with the highest of given keys are drawn."""

    def __init__(self, plain, keys_of):
        self.plain, self.keys_of = plain, keys_of

    def __call__(self, labels):
        drawn = []
        for keys, values in zip(self.keys_of(labels), labels, strict=True):
            most = int(self.plain.batch_size_per_image * self.plain.positive_fraction)
            masks = []
            for wanted in (values >= 1, values == 0):
                best = keys.masked_fill(~wanted, -1).argsort(descending=True)[: min(most, int(wanted.sum()))]
                masks.append(torch.zeros_like(values, dtype=torch.uint8).index_fill_(0, best, 1))
                most = self.plain.batch_size_per_image - len(best)
            drawn.append(masks)
        return tuple(zip(*drawn, strict=True))


def keys_of_boxes(boxes):
    """A number in [0, 1) that follows from a box: proposals of equal scores may come in any order."""
    return (boxes.double() * torch.tensor([0.37, 0.61, 0.23, 0.83], dtype=torch.float64)).sum(-1).remainder(1).float()


def hand_over_samples(monkeypatch, theirs, ours):
    """Let both steps draw what has the highest keys: of anchors by their number, of candidates by their boxes."""
    keys = torch.rand(4, 20000, generator=torch.Generator().manual_seed(4))
    theirs.rpn.fg_bg_sampler = ByKeys(
        theirs.rpn.fg_bg_sampler, lambda labels: [row[: len(values)] for row, values in zip(keys, labels, strict=False)]
    )
    seen = {}
    add = theirs.roi_heads.add_gt_proposals
    monkeypatch.setattr(theirs.roi_heads, "add_gt_proposals", lambda *args: seen.setdefault("theirs", add(*args)))
    theirs.roi_heads.fg_bg_sampler = ByKeys(
        theirs.roi_heads.fg_bg_sampler, lambda labels: list(map(keys_of_boxes, seen["theirs"]))
    )
    match = roi_step.match
    monkeypatch.setattr(
        roi_step, "match", lambda objects, boxes, *rest: match(objects, seen.setdefault("ours", boxes), *rest)
    )
    monkeypatch.setattr(
        batched_sampling,
        "draw_keys",
        lambda labels: (
            keys_of_boxes(seen["ours"]) if "ours" in seen else keys[: len(labels), : labels.shape[1]].clone()
        ),
    )
    return seen


def step(model, images, targets):
    """Losses and gradients of a step."""
    losses = model(images, copy.deepcopy(targets))
    sum(losses.values()).backward()
    return losses, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("task", MODELS)
def test_losses_and_gradients_are_torchvisions(task, counts, monkeypatch):
    # Pictures as they are: resized ones differ by rounding, which may swap two proposals of nearly the same score.
    theirs = small_model(task, skip_resize=True)
    ours = batched(theirs)
    seen = hand_over_samples(monkeypatch, theirs, ours)
    images, targets = batch_of(task, counts)
    (expected, expected_grads), (losses, grads) = step(theirs, images, targets), step(ours, images, targets)
    assert set(seen) == {"theirs", "ours"}
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5, abs=1e-9), name
    for name, grad in expected_grads.items():
        if name.startswith("backbone.body") and name.endswith("0.bias"):
            continue  # a batch norm follows: the gradient is 0, and what is left is rounding
        torch.testing.assert_close(
            grads[name],
            grad,
            rtol=0,
            atol=1e-5 * float(grad.abs().max()) + 1e-7,
            msg=lambda text, name=name: name + text,
        )
