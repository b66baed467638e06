"""Models built from a record equal those of torchvision's builders, and weights land where they belong."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_weights

from files import read_torch_file
from models import weights
from models.architectures import ARCHITECTURES, VGG16, ModelSpec, backbone_keys, build_model
from models.weights import (
    find_backbone_weights,
    find_model_weights,
    load_backbone,
    load_model_weights,
    read_weights,
    structure_of_weights,
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A torch hub folder; torchvision's loader takes a file that is already in it."""
    return tmp_path_factory.mktemp("torch_home")


@pytest.fixture(autouse=True)
def torch_home(hub, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(hub))
    (hub / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)


def backbone_entry(backbone):
    return backbone.weights["IMAGENET1K_FEATURES" if backbone is VGG16 else "IMAGENET1K_V1"]


def put(hub, entry, state):
    path = hub / "hub" / "checkpoints" / entry.url.rsplit("/", 1)[1]
    if not path.exists():
        torch.save(state, path)
    return path


def random_state(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.rand(v.shape, generator=generator) * 0.02 + 0.01 if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }


def put_backbone(hub, backbone):
    entry = backbone_entry(backbone)
    name = entry.url.rsplit("/", 1)[1]
    if not (hub / "hub" / "checkpoints" / name).exists():
        put(hub, entry, random_state(get_model(backbone.name, weights=None)))
    return entry


def small(spec):
    """The options that keep a model's test cheap."""
    return {} if ARCHITECTURES[spec].fixed_size else {"min_size": (64,), "max_size": 96}


def spec_for(name, num_classes=5, num_keypoints=3, **options):
    is_keypoint = ARCHITECTURES[name].task == "keypoint"
    return ModelSpec(name, num_classes, num_keypoints if is_keypoint else 0, **{**small(name), **options})


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_on_a_pretrained_backbone_equals_the_builders(hub, name, layers):
    architecture = ARCHITECTURES[name]
    entry = put_backbone(hub, architecture.backbone)
    theirs = get_model(name, weights=None, weights_backbone=entry, num_classes=91, trainable_backbone_layers=layers)
    spec = ModelSpec(
        name,
        91,
        17 if architecture.task == "keypoint" else 0,
        frozen_norm=architecture.freezes_norm,
        full_tail=name.startswith("ssdlite"),
        trainable_layers=architecture.trainable_layers if layers is None else layers,
    )
    ours = build_model(spec)
    load_backbone(ours, architecture.backbone, find_backbone_weights(str(entry), name))
    assert str(ours) == str(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(a[k].shape == b[k].shape for k in a)
    for key in backbone_keys(ours, architecture.backbone).values():
        assert torch.equal(a[key], b[key])
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert p.requires_grad == q.requires_grad, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn"])
def test_published_weights_give_the_builders_model(hub, name):
    entry = get_model_weights(name)["COCO_V1"]
    put(hub, entry, _published_state(name))
    theirs = get_model(name, weights=entry)
    source = find_model_weights("COCO_V1", name)
    state = read_weights(source)
    fields = structure_of_weights(source, state, name)
    spec = ModelSpec(name, 91, trainable_layers=ARCHITECTURES[name].trainable_layers, **fields)
    ours = build_model(spec)
    assert load_model_weights(ours, state, source, spec) == []
    assert str(ours) == str(theirs)  # the epsilon of frozen norms is part of it
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def _published_state(name):
    """What torchvision publishes: frozen norms where the builder has them, the reduced tail for SSDlite."""
    frozen = ARCHITECTURES[name].freezes_norm
    return random_state(build_model(ModelSpec(name, 91, frozen_norm=frozen)))


def test_a_local_copy_of_published_weights_needs_no_other_flag(hub, tmp_path):
    """The hash in the published name tells that a file is torchvision's, whatever it is called here."""
    import hashlib

    name = "retinanet_resnet50_fpn"
    path = tmp_path / "mine.pth"
    torch.save(_published_state(name), path)
    source = find_model_weights(str(path), name)
    state = read_weights(source)
    assert structure_of_weights(source, state, name)["frozen_norm_eps"] == 1e-5
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    entry = get_model_weights(name)["COCO_V1"]
    original = type(entry).url.fget
    try:
        type(entry).url = property(lambda self: f"https://host/{name}_coco-{digest}.pth")
        assert structure_of_weights(source, state, name)["frozen_norm_eps"] == 0.0
    finally:
        type(entry).url = property(original)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_models_train_on_negatives_alone(name, few_proposals):
    torch.manual_seed(0)
    model = build_model(spec_for(name)).train()
    images = [torch.rand(3, 64, 80), torch.rand(3, 80, 64)]
    targets = []
    for image in images:
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if ARCHITECTURES[name].task == "mask":
            target["masks"] = torch.zeros((0, *image.shape[-2:]), dtype=torch.uint8)
        if ARCHITECTURES[name].task == "keypoint":
            target["keypoints"] = torch.zeros(0, 3, 3)
        targets.append(target)
    loss = sum(model(images, targets).values())
    loss.backward()
    assert torch.isfinite(loss)
    unused = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # DDP needs every parameter to take part


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "ssd300_vgg16", "fcos_resnet50_fpn"]
)
def test_other_numbers_of_classes_keep_everything_but_the_heads(tmp_path, name, caplog):
    old_spec = spec_for(name, num_classes=4, num_keypoints=7)
    state = random_state(build_model(old_spec))
    path = tmp_path / "old.pth"
    torch.save({"model": state, "args": __import__("argparse").Namespace(lr=0.1)}, path)
    source = find_model_weights(str(path), name)
    state = read_weights(source)
    spec = spec_for(name, num_classes=9)
    model = build_model(spec)
    with caplog.at_level("INFO"):
        fresh = load_model_weights(model, state, source, spec)
    heads = {"maskrcnn_resnet50_fpn": 6, "keypointrcnn_resnet50_fpn": 6, "ssd300_vgg16": 12, "fcos_resnet50_fpn": 2}
    assert len(fresh) == heads[name]
    assert "re-initialised for 9 classes" in caplog.text and fresh[0] in caplog.text
    for key, value in model.state_dict().items():
        assert key in fresh or torch.equal(value, state[key]), key


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "ssd.pth"
    torch.save(build_model(spec_for("ssdlite320_mobilenet_v3_large")).state_dict(), path)
    source = find_model_weights(str(path), "fcos_resnet50_fpn")
    spec = spec_for("fcos_resnet50_fpn")
    with pytest.raises(ValueError, match=r"ssd\.pth: these are not weights of fcos_resnet50_fpn: \d+ entries"):
        load_model_weights(build_model(spec), read_weights(source), source, spec)


def test_backbone_files_and_wrong_ones(hub, tmp_path):
    name = "ssdlite320_mobilenet_v3_large"
    backbone = ARCHITECTURES[name].backbone
    state = random_state(torchvision.models.mobilenet_v3_large())
    path = tmp_path / "backbone.pth"
    torch.save({k: state[k] for k in sorted(state, reverse=True)}, path)  # the order in the file does not matter
    model = build_model(spec_for(name, full_tail=True))
    load_backbone(model, backbone, find_backbone_weights(str(path), name))
    assert torch.equal(model.backbone.features[0][0][0].weight, state["features.0.0.weight"])
    reduced = build_model(spec_for(name, full_tail=False))
    with pytest.raises(ValueError, match="has shape .* expected"):
        load_backbone(reduced, backbone, find_backbone_weights(str(path), name))
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(ValueError, match="not weights of mobilenet_v3_large: 'features.0.0.weight' is missing"):
        load_backbone(model, backbone, find_backbone_weights(str(path), name))


def test_too_many_trainable_layers_are_refused():
    with pytest.raises(ValueError, match="--trainable-backbone-layers 6: resnet50 has 0 to 5"):
        build_model(spec_for("fcos_resnet50_fpn", trainable_layers=6))


def test_unknown_weights_are_refused_with_the_known_names(tmp_path):
    with pytest.raises(ValueError, match=r"--weights nowhere\.pth: no such file.*FCOS_ResNet50_FPN_Weights\.COCO_V1"):
        find_model_weights("nowhere.pth", "fcos_resnet50_fpn")
    with pytest.raises(ValueError, match=r"--weights-backbone VGG.*ResNet50_Weights\.IMAGENET1K_V1"):
        find_backbone_weights("VGG16_Weights.IMAGENET1K_V1", "fcos_resnet50_fpn")
    with pytest.raises(ValueError, match="URLs are not fetched"):
        find_model_weights("https://host/file.pth", "fcos_resnet50_fpn")


class Evil:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_files_with_python_objects_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil\.pth.*Python objects .*which are not loaded"):
        read_torch_file(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_torch_file(path)


def test_the_spec_survives_plain_values():
    import json

    spec = spec_for("keypointrcnn_resnet50_fpn", frozen_norm=True)
    assert ModelSpec.from_plain(json.loads(json.dumps({**spec.to_plain(), "a_later_field": 1}))) == spec


def test_the_iou_types_follow_the_task():
    assert spec_for("maskrcnn_resnet50_fpn").iou_types == ("bbox", "segm")
    assert spec_for("keypointrcnn_resnet50_fpn").iou_types == ("bbox", "keypoints")
    assert spec_for("ssd300_vgg16").iou_types == ("bbox",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", [32, 32]),
        ("maskrcnn_resnet50_fpn", [4, 8, 16, 32]),
        ("keypointrcnn_resnet50_fpn", [4, 8, 16, 32]),
    ],
)
def test_pooling_knows_its_strides_whatever_comes_first(name, strides):
    """torchvision's own model takes 33 pixels, padded to 64, for another stride; the order of batches then counts."""
    spec = ModelSpec(name, 3, num_keypoints=2 if "keypoint" in name else 0, min_size=(33,), max_size=33)
    model = build_model(spec).eval()
    model([torch.rand(3, 33, 33)])
    heads = [getattr(model.roi_heads, kind, None) for kind in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool")]
    found = [pool.scales for pool in heads if pool is not None]
    assert found == [[1 / stride for stride in strides]] * len(found) and found


def test_a_cached_file_that_is_not_what_its_name_says_is_named(tmp_path, caplog):
    """torchvision's names end with the start of the file's SHA-256."""
    content = tmp_path / "content"
    torch.save({"a": torch.zeros(3)}, content)
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    for start, is_named in ((digest[:8], False), ("0" * 8, True)):
        path = content.rename(tmp_path / f"resnet50-{start}.pth")
        entry = SimpleNamespace(url=f"https://download.pytorch.org/models/{path.name}", get_state_dict=lambda **_: {})
        (Path(torch.hub.get_dir()) / "checkpoints" / path.name).write_bytes(path.read_bytes())
        weights._download(entry)
        assert (f"their SHA-256 begins with {start}, the file's with {digest[:8]}" in caplog.text) == is_named
        content = path
