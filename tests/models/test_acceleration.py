"""Memory format, compilation, static graph and profile change how a step is carried out, never its results."""

import copy
import importlib
import json
import logging
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import roi_heads

from helpers.ranks import run_on_ranks
from models.acceleration import (
    broadcast_buffers,
    compile_backbone,
    cut_masks_by_kernel,
    distribute,
    profile_steps,
    typical_inputs,
    use_channels_last,
)
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from models.batched_step import use_batched_step
from models.object_block import BatchTargets, objects_of

CPU = torch.device("cpu")
NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]


LIGHT = ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]


class Detector(nn.Module):
    """What `compile_backbone` needs of a detector: a backbone that returns named feature maps."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        return {"0": self.norm(self.conv(images)).relu()}


@pytest.fixture
def detector():
    torch.compiler.reset()  # what one test has compiled belongs to the code, not to the object
    torch.manual_seed(0)
    return Detector().train()


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_and_leaves_no_trace(detector, caplog, monkeypatch):
    monkeypatch.setattr(inductor, "compile_threads", 1)  # more start processes of their own
    caplog.set_level(logging.INFO)
    before = copy.deepcopy(detector.state_dict())
    images = torch.rand(2, 3, 16, 16)
    expected = copy.deepcopy(detector).backbone(images)["0"]
    assert compile_backbone(detector, [torch.zeros(2, 3, 16, 16)], None)
    assert "backbone compiled in" in caplog.text and "instead of" in caplog.text
    assert list(detector.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert all(p.grad is None for p in detector.parameters())
    assert torch.allclose(detector.backbone(images)["0"], expected, atol=1e-5)


def test_a_backbone_that_cannot_be_compiled_stays_as_it_was(detector, caplog, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no C++ compiler\nand many more lines")

    monkeypatch.setattr(nn.Module, "compile", fail)
    before = copy.deepcopy(detector.state_dict())
    assert not compile_backbone(detector, [torch.zeros(1, 3, 16, 16)], None)
    assert "stays as it is: no C++ compiler" in caplog.text and "many more" not in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert detector.backbone(torch.rand(1, 3, 16, 16))["0"].shape == (1, 4, 14, 14)


def test_channels_last_weights_give_the_same_features(detector):
    images = torch.rand(2, 3, 16, 16)
    expected = detector.backbone(images)["0"]
    use_channels_last(detector)
    assert detector.backbone.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(detector.backbone(images)["0"], expected, atol=1e-5)


def _warnings_of_a_channels_last_step(rank, world_size):
    """Return what a step of SSDlite warns of; DDP says a thing once per process, and this process is new."""
    model = build_model(ModelSpec("ssdlite320_mobilenet_v3_large", 4)).train()
    use_channels_last(model)
    model = distribute(model)
    target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sum(model([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
    return [str(warning.message) for warning in caught if "stride" in str(warning.message)]


@pytest.mark.slow
def test_channels_last_depthwise_weights_give_no_warning_of_strides():
    assert run_on_ranks(1, _warnings_of_a_channels_last_step) == [[]]


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (ModelSpec("ssd300_vgg16", 3), [(300, 300)]),
        (ModelSpec("fcos_resnet50_fpn", 3), [(800, 1088), (576, 960), (1088, 800)]),
        (ModelSpec("fcos_resnet50_fpn", 3, min_size=(100, 200), max_size=240), [(224, 256), (160, 224), (256, 224)]),
    ],
)
def test_typical_inputs_are_batches_after_the_models_resize(spec, shapes):
    assert [example.shape for example in typical_inputs(spec, 2, CPU)] == [(2, 3, *shape) for shape in shapes]


@pytest.mark.slow
def test_after_the_typical_inputs_no_shape_is_compiled_any_more(detector, monkeypatch):
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    examples = typical_inputs(ModelSpec("fcos_resnet50_fpn", 3, min_size=(100,)), 2, CPU)
    assert compile_backbone(detector, examples, None)
    count = len(compiled)
    for shape in ((64, 160), (160, 64), (192, 224), (128, 128), (320, 96)):
        detector.backbone(torch.zeros(2, 3, *shape))["0"].mean().backward()
    assert len(compiled) == count >= 2


def test_a_shape_that_cannot_be_compiled_leaves_the_backbone_as_it_was(detector, caplog, monkeypatch):
    """The first shape compiles; without the others training would meet the failure."""

    def backend(graph, example_inputs):
        if any(isinstance(value, torch.SymInt) for value in example_inputs):
            raise RuntimeError("no code for shapes that vary")
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    assert not compile_backbone(
        detector, typical_inputs(ModelSpec("fcos_resnet50_fpn", 3, min_size=(64,)), 2, CPU), None
    )
    assert "stays as it is" in caplog.text
    assert detector.backbone(torch.rand(1, 3, 16, 16))["0"].shape == (1, 4, 14, 14)


def _targets(spec, empty):
    boxes = torch.zeros(0, 4) if empty else torch.tensor([[4.0, 6.0, 50.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}
    target["masks"] = torch.ones(len(boxes), 80, 80, dtype=torch.uint8)
    target["keypoints"] = torch.full((len(boxes), spec.num_keypoints, 3), 30.0)
    return target


def _train_in_ddp(rank, world_size, names):
    """Three steps: all ranks have objects, then one has none, then none has any; returns the parameters' sums."""
    sums = {}
    for name in names:
        sizes = {} if name.startswith("ssd") else {"min_size": (64,), "max_size": 96}
        spec = ModelSpec(name, 3, num_keypoints=3 if "keypoint" in name else 0, **sizes)
        torch.manual_seed(0)
        model = build_model(spec).train()
        use_batched_step(model)
        if hasattr(model, "roi_heads"):
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 8  # for the time
        for variant in ("static", "plain") if name in LIGHT else ("static",):
            bare = copy.deepcopy(model)
            wrapped = distribute(bare) if variant == "static" else DistributedDataParallel(bare)
            optimizer = torch.optim.SGD(bare.parameters(), lr=1e-3)
            for step, empty_on in enumerate([[], [1], [0, 1]]):
                torch.manual_seed(10 * step + rank)
                count = 2 if name.startswith("ssdlite") else 1  # its norms see one pixel
                losses = wrapped(list(torch.rand(count, 3, 80, 80)), [_targets(spec, rank in empty_on)] * count)
                sum(losses.values()).backward()
                optimizer.step()
                optimizer.zero_grad()
            sums[f"{name} {variant}"] = [float(p.double().abs().sum()) for p in bare.parameters()]
    return sums


@pytest.mark.slow
def test_a_static_graph_holds_for_all_models_with_and_without_objects():
    first, second = run_on_ranks(2, _train_in_ddp, NINE)
    for name in NINE:
        assert first[f"{name} static"] == second[f"{name} static"], name
    for name in LIGHT:
        assert first[f"{name} static"] == first[f"{name} plain"], name


class Keeping(nn.Module):
    """Keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images, targets):
        self.images, self.targets = images, targets
        return {"loss": self.weight.sum()}


def test_batches_reach_the_model_in_ddp_as_they_are(tmp_path):
    """With a device of its own DDP would move them, and hand lists and dicts of its own making on."""
    targets = [{"image_id": 7, "boxes": torch.rand(2, 4), "labels": torch.tensor([1, 2])}]
    batch = BatchTargets(targets, objects_of(targets))
    images = [torch.rand(3, 4, 4)]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = distribute(Keeping())
        sum(model(images, batch).values()).backward()
        assert isinstance(model, DistributedDataParallel) and model.device_ids is None
        assert model.module.targets is batch and model.module.images is images
    finally:
        torch.distributed.destroy_process_group()


def _share_buffers(rank, world_size):
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank + 1)
    broadcast_buffers(norm)
    return norm.running_mean.tolist()


@pytest.mark.slow
def test_all_processes_evaluate_with_the_first_ones_statistics():
    assert run_on_ranks(2, _share_buffers) == [[1.0, 1.0], [1.0, 1.0]]


def test_a_profile_names_the_largest_items_and_writes_a_trace(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with profile_steps(2, tmp_path, CPU) as after_step:
        for _ in range(10):
            torch.ones(64, 64) @ torch.ones(64, 64)
            after_step()
    assert "aten::mm" in caplog.text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_no_profile_is_no_cost():
    with profile_steps(0, None, CPU) as after_step:
        assert after_step() is None


def test_target_masks_are_cut_by_the_kernel_where_torchvision_takes_python_code(monkeypatch):
    """On a GPU deterministic algorithms lead to that code; here the lack of kernels does, which it asks for in the same place."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 60, 80, generator=generator) > 0.5).to(torch.uint8)
    corners = torch.rand(8, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 5 + torch.rand(8, 2, generator=generator) * 30], dim=1)
    arguments = masks, boxes, torch.arange(8) % 3, 28
    expected = roi_heads.project_masks_on_boxes(*arguments)
    torchvisions = importlib.import_module("torchvision.ops.roi_align")
    monkeypatch.setattr(torchvisions, "_has_ops", lambda: False)
    monkeypatch.setattr(torchvisions, "_roi_align", lambda *args: pytest.fail("the Python code"))
    with pytest.raises(pytest.fail.Exception, match="the Python code"):
        roi_heads.project_masks_on_boxes(*arguments)
    monkeypatch.setattr(roi_heads, "roi_align", roi_heads.roi_align)  # put back afterwards
    cut_masks_by_kernel()
    assert torch.equal(roi_heads.project_masks_on_boxes(*arguments), expected)


class UsedInAnotherOrder(nn.Module):
    """Its layers are used in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300) for _ in range(6))

    def forward(self, values):
        for n in (3, 0, 5, 1, 4, 2):
            values = self.layers[n](values).relu()
        return values.square().sum()


def _continue_often(rank, world_size, accumulate):
    """Return the weights after four updates: of one run, and of one that is wrapped anew before each."""
    ends = []
    for starts in ({0}, {0, 1, 2, 3}):
        torch.manual_seed(0)
        bare = UsedInAnotherOrder()
        for update in range(4):
            if update in starts:
                wrapped = distribute(bare, accumulate)
                optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
            torch.manual_seed(100 * update + rank)
            wrapped(torch.rand(3, 300)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in bare.parameters()]))
    return torch.equal(*ends), [p.grad for p in distribute(bare).parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_many_processes_are_added_in_the_same_order_after_a_new_start(accumulate):
    """With two the order is no matter; DDP would send the gradients of its first step in another one than later."""
    for is_equal, gradients in run_on_ranks(4, _continue_often, accumulate):
        assert is_equal and gradients == [None] * 12
