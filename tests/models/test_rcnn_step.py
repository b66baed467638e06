"""The batched step of R-CNNs: with the same samples its losses and gradients are those of torchvision's own step."""

import copy
import pickle

import pytest
import torch
from torchvision.models.detection.roi_heads import keypointrcnn_loss, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.waits import count_waits
from helpers.batches import make_batch
from helpers.thin import build_thin_model
from models import batched_sampling, proposal_step, roi_step, roi_targets
from models.architectures import ModelSpec
from models.batched_step import use_batched_step
from models.object_block import BatchTargets, objects_of
from models.roi_step import Candidates, order_by_level, pool_by_level
from models.roi_targets import keypoint_loss, mask_targets

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


def check_both_are_equal(theirs, monkeypatch, task, counts):
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
        limit = 1e-5 * float(grad.abs().max()) + 1e-7
        assert float((grads[name] - grad).abs().max()) <= limit, name


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("task", MODELS)
def test_losses_and_gradients_are_torchvisions(task, counts, monkeypatch):
    # Pictures as they are: resized ones differ by rounding, which may swap two proposals of nearly the same score.
    check_both_are_equal(small_model(task, skip_resize=True), monkeypatch, task, counts)


def test_where_fewer_candidates_than_wanted_are_drawn_losses_are_torchvisions(monkeypatch):
    """Empty slots weigh nothing, in the mean as well."""
    theirs = small_model("box", skip_resize=True)
    theirs.rpn.fg_bg_sampler.batch_size_per_image = 20000
    theirs.roi_heads.fg_bg_sampler.batch_size_per_image = 4000
    check_both_are_equal(theirs, monkeypatch, "box", COUNTS["one without"])


@pytest.mark.parametrize("task", MODELS)
def test_the_validation_loss_is_torchvisions(task, monkeypatch):
    """It is computed with the resize of evaluation."""
    theirs = small_model(task, min_size=(96,), max_size=160)  # the short side of each picture here
    theirs.transform.eval()
    ours = batched(theirs)
    hand_over_samples(monkeypatch, theirs, ours)
    images, targets = make_batch([(96, 150), (128, 96)], [3, 2], task=task, num_labels=1 if task == "keypoint" else 3)
    with torch.no_grad():
        expected, losses = theirs(images, copy.deepcopy(targets)), ours(images, targets)
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )


def test_resized_pictures_change_losses_of_proposals_by_rounding(monkeypatch):
    theirs = small_model("box", min_size=(64, 80, 100), max_size=150)
    ours = batched(theirs)
    hand_over_samples(monkeypatch, theirs, ours)
    images, targets = batch_of("box", COUNTS["one without"])
    torch.manual_seed(5)
    expected = theirs(images, copy.deepcopy(targets))
    torch.manual_seed(5)
    losses = ours(images, targets)
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        assert float(losses[name].detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5)


@pytest.mark.parametrize("task", MODELS)
def test_evaluation_and_state_are_torchvisions_and_copies_stay_batched(task):
    theirs = small_model(task, min_size=(96,), max_size=160)
    ours = batched(theirs)
    images, targets = batch_of(task, COUNTS["one without"])
    ours(images, targets)
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        detections = [theirs.eval()(images), ours.eval()(images, targets)]  # targets do not make it training
    for expected, found in zip(*detections, strict=True):
        assert len(expected["boxes"]) > 0 and all(torch.equal(found[key], expected[key]) for key in expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for name in ("", "transform", "rpn", "roi_heads"):
            assert type(copied.get_submodule(name)) is type(ours.get_submodule(name)), name
            assert type(copied.get_submodule(name)) is not type(theirs.get_submodule(name)), name


def test_a_seed_gives_the_same_step():
    model = batched(small_model("mask", min_size=(64, 96), max_size=160))
    images, targets = batch_of("mask", COUNTS["one without"])
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.zero_grad()
        losses, grads = step(model, images, targets)
        results.append([*losses.values(), *grads.values()])
    assert all(map(torch.equal, results[0], results[1])) and not all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_by_level_is_torchvisions_to_the_last_bit(dtype):
    rng = torch.Generator().manual_seed(0)
    pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    features = {str(n): torch.randn(3, 8, 160 >> n, 224 >> n, generator=rng).to(dtype) for n in range(4)}
    corners = torch.rand(3, 40, 2, 2, generator=rng).sort(dim=2).values * torch.tensor([896.0, 640.0])
    boxes = corners.flatten(2) + torch.tensor([0.0, 0, 4, 4])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        pool(features, [boxes[0]], [(640, 896)] * 3)  # works out the scales
    is_drawn = torch.rand(3, 40, generator=rng) < 0.8
    is_positive = is_drawn & (torch.rand(3, 40, generator=rng) < 0.5)
    order, positives, per_picture = order_by_level(
        pool, Candidates(boxes, is_positive.long(), is_positive.long(), is_positive, is_drawn)
    )
    assert min(order.counts) > 5 and per_picture == is_positive.sum(dim=1).tolist()
    for found, wanted in ((order, is_drawn), (positives, is_positive)):
        assert sorted(found.slots.tolist()) == wanted.flatten().nonzero().flatten().tolist()
        chosen = [boxes[b][wanted[b]] for b in range(3)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected, pooled = pool(features, chosen, [(640, 896)] * 3), pool_by_level(pool, features, found)
        assert pooled.dtype == dtype == expected.dtype and torch.equal(pooled[found.slots.argsort()], expected)


@pytest.mark.parametrize("most_pixels", [2**26, 40000, 1], ids=["together", "in groups", "one by one"])
def test_mask_targets_are_torchvisions_of_resized_masks(most_pixels, monkeypatch):
    """Larger, smaller and as they are; to the last bit but for boxes that end on the last row or column of a picture."""
    monkeypatch.setattr(roi_targets, "most_together", lambda pixels: most_pixels)
    given, sizes = [(90, 150), (70, 60), (61, 35), (33, 47)], [(80, 133), (70, 60), (122, 70), (99, 141)]
    rng = torch.Generator().manual_seed(0)
    masks = [torch.randint(0, 2, (count, *size), dtype=torch.uint8, generator=rng) for count, size in
             zip((3, 0, 5, 2), given)]  # fmt: skip
    corners = torch.rand(4, 8, 2, 2, generator=rng).sort(dim=2).values * 60
    boxes, places = corners.flatten(2) + torch.tensor([0.0, 0, 9, 9]), torch.randint(0, 2, (4, 8), generator=rng)
    boxes[2, 5] = torch.tensor([10.3, 7, 70, 122])
    boxes[3, 0] = torch.tensor([100.7, 50, 141, 99])
    counts = [6, 0, 8, 1]
    found = mask_targets(masks, sizes, boxes, places, counts, 28)
    expected = []
    for mask, size, of_picture, places_of_picture, count in zip(masks, sizes, boxes, places, counts, strict=True):
        if count:
            resized = torch.nn.functional.interpolate(mask[:, None].float(), size=size)[:, 0].byte()
            expected.append(project_masks_on_boxes(resized, of_picture[:count], places_of_picture[:count], 28))
    expected = torch.cat(expected)
    inside = torch.ones(len(expected), dtype=torch.bool).index_fill_(0, torch.tensor([11, 14]), False)
    assert torch.equal(found[inside], expected[inside])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_pictures_are_grouped_within_the_bound_of_memory_and_never_cut(monkeypatch):
    monkeypatch.setattr(roi_targets, "most_together", lambda pixels: 10)
    groups = [list(range(6))[group] for group in roi_targets._group_pictures([4, 6, 25, 0, 3, 8])]
    assert groups == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("objects", "groups"), [(7, 2), (20, 4), (100, 4), (600, 6)], ids=["few", "some", "many", "limit of the kernels"]
)
def test_sixteen_pictures_need_few_groups_and_no_more_memory_than_torchvision(objects, groups):
    pixels = [objects * 800 * 1333] * 16
    found = [sum(pixels[group]) for group in roi_targets._group_pictures(pixels)]
    assert len(found) == groups and sum(found) == sum(pixels) and max(found) < 2**31
    assert 5 * max(found) <= max(sum(pixels) + 4 * pixels[0], 5 * 2**26)


def test_pictures_without_objects_have_no_mask_targets():
    masks = [torch.zeros((0, 40, 50), dtype=torch.uint8)] * 2
    places = torch.zeros((2, 3), dtype=torch.int64)
    assert mask_targets(masks, [(40, 50)] * 2, torch.rand(2, 3, 4), places, [0, 0], 28).shape == (0, 28, 28)


def test_keypoints_on_edges_outside_and_unseen_are_learnt_as_torchvision_does():
    boxes = torch.tensor([[10.0, 20, 66, 76], [10.3, 20.7, 41.9, 77.1]])
    points = torch.tensor([[10.0, 20], [66, 76], [66, 30], [12, 76], [9.99, 30], [41.9, 77.1], [40, 40], [66.1, 30]])
    keypoints = torch.cat([points, torch.ones(8, 1)], dim=1).repeat(2, 1, 1)
    keypoints[0, 6, 2] = 0
    logits = torch.randn(2, 8, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = keypointrcnn_loss(logits, [boxes], [keypoints], [torch.arange(2)])
    assert float(keypoint_loss(logits, boxes, keypoints)) == pytest.approx(float(expected), rel=1e-6)
    keypoints[..., 2] = 0
    assert keypoint_loss(logits, boxes, keypoints) == 0


def test_a_network_that_diverges_gives_a_loss_that_is_no_number_and_nothing_worse():
    model = batched(small_model("mask", skip_resize=True))
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.fill_(float("nan"))
    images, targets = batch_of("mask", COUNTS["one without"])
    losses, _ = step(model, images, targets)
    assert losses["loss_rpn_box_reg"].isnan() and losses["loss_classifier"].isfinite()


@pytest.mark.parametrize("task", MODELS)
def test_a_step_waits_twice_whatever_the_batch(task, monkeypatch):
    monkeypatch.setattr(proposal_step, "calls_nms_once", lambda device: True)  # as on a GPU
    model = batched(small_model(task, min_size=(36,), max_size=64))
    model.transform.eval()  # the draw of a short side reads a number, which is on the host
    for size in (2, 6):
        images, targets = make_batch([(48, 64), (40, 32)] * (size // 2), [7] * size, task=task, num_labels=1)
        targets = BatchTargets(targets, objects_of(targets))
        assert count_waits(lambda: model(images, targets)) == {"nms": 1, "tolist": 1}  # noqa: B023
