"""export.py: a file appears only if it gives what PyTorch gives, and says what its numbers mean."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
import flags as command_line
from helpers.drawn import draw_coco
from helpers.formats import read_splits, same_classes, write_voc, write_yolo
from helpers.shaken import drawn_images, shaken_checkpoint
from helpers.thin import EXPORTS_PYRAMIDS, use_thin_models
from inference.compare_outputs import Agreement, compare_outputs, pair_detections
from inference.export_formats import ScriptedResize, TracedResize, with_resize
from inference.trained_model import load_trained_model
from models.architectures import ARCHITECTURES
from models.export_form import resized_shape
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model

SMALL = "ssdlite320_mobilenet_v3_large"
NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shaken_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pth", SMALL, score_threshold=0.4)


@pytest.fixture
def thin_checkpoint(tmp_path, monkeypatch):
    """Returns a function that writes the checkpoint of a thin model, which this process takes for the model named."""
    use_thin_models(monkeypatch)
    return lambda name=SMALL, **options: shaken_checkpoint(tmp_path / "best.pth", name, score_threshold=0.4, **options)


def detections(num=6, seed=0):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 50, (num, 2))
    return {
        "boxes": np.concatenate([corners, corners + 20], axis=1).astype(np.float32),
        "labels": rng.integers(1, 4, num),
        "scores": np.sort(rng.uniform(0.3, 1, num))[::-1].astype(np.float32),
        "masks": np.pad(np.full((num, 1, 30, 30), 0.7, dtype=np.float32), ((0, 0), (0, 0), (15, 15), (15, 15))),
        "keypoints": rng.uniform(0, 60, (num, 3, 3)).astype(np.float32),
    }


def changed(key, position, amount):
    found = {name: value.copy() for name, value in detections().items()}
    found[key][position] += amount
    return found


def test_equal_detections_agree_in_any_order():
    agreement, order = Agreement(), np.array([3, 1, 5, 0, 2, 4])
    compare_outputs(detections(), {name: value[order] for name, value in detections().items()}, agreement, "a.jpg")
    assert agreement == Agreement(detections=6)
    compare_outputs(detections(), changed("boxes", 2, 0.05), agreement, "a.jpg")
    assert agreement.detections == 12 and agreement.box == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "position", "amount", "text"),
    [
        ("boxes", (0, 2), 0.2, "no partner"),
        ("labels", 0, 1, "no partner"),
        ("scores", 0, -0.01, "no partner"),
        ("keypoints", (1, 2, 0), 0.3, "keypoint of detection 1 is off by 0.3 px"),
        ("masks", (2, 0, slice(50, 56)), 0.7, "mask of detection 2 differs"),
        ("masks", (2, 0, slice(20, 23)), -0.7, "mask of detection 2 differs"),
    ],
)
def test_what_differs_is_refused_and_named(key, position, amount, text):
    with pytest.raises(ValueError, match=f"^a.jpg: .*{text}"):
        compare_outputs(detections(), changed(key, position, amount), Agreement(), "a.jpg")


def tied(shift=0.0, second=0.0):
    """Two results, in each of which one of two overlapping boxes of (nearly) one score is left, and both candidates."""
    rivals = {
        "boxes": np.array([[10, 10, 50, 50], [10.3, 10, 50, 50.4], [70, 70, 90, 90]], dtype=np.float32),
        "labels": np.array([2, 2, 1]),
        "scores": np.array([0.6, 0.6 + second, 0.3], dtype=np.float32),
    }
    first, other = ({name: value[rows] for name, value in rivals.items()} for rows in ([0, 2], [1, 2]))
    other["boxes"][0, 0] += shift
    return first, other, lambda: rivals


def test_another_choice_among_equal_scores_is_a_near_tie():
    agreement = Agreement()
    first, other, candidates = tied()
    compare_outputs(first, other, agreement, "a.jpg", candidates)
    assert agreement == Agreement(detections=1, near_ties=1) and "1 others chosen where scores are equal" in str(
        agreement
    )


@pytest.mark.parametrize("difference", [{"shift": 0.2}, {"shift": -0.2}, {"second": 0.002}, {"second": -0.002}])
def test_a_wrong_box_or_another_score_is_no_near_tie(difference):
    first, other, candidates = tied(**difference)
    with pytest.raises(
        ValueError, match=r"no partner .*; the one that overlaps it most is 0\.\d+ px and .* of its score away"
    ):
        compare_outputs(first, other, Agreement(), "a.jpg", candidates)


def test_proposals_that_nearly_tie_may_get_other_scores_but_no_other_boxes():
    first, other, candidates = tied(second=-0.02)
    agreement = Agreement()
    compare_outputs(first, other, agreement, "a.jpg", candidates, has_proposals=True)
    assert agreement.near_ties == 1
    first, other, candidates = tied(shift=0.2, second=-0.02)
    with pytest.raises(ValueError, match="no partner"):
        compare_outputs(first, other, Agreement(), "a.jpg", candidates, has_proposals=True)


def test_a_box_that_was_no_candidate_is_no_near_tie():
    first, other, _ = tied()
    with pytest.raises(ValueError, match="no partner"):
        compare_outputs(first, other, Agreement(), "a.jpg", lambda: first)


def test_a_detection_that_is_missing_is_no_near_tie():
    first, other, candidates = tied()
    fewer = {name: value[1:] for name, value in other.items()}
    with pytest.raises(
        ValueError, match="a detection of score 0.6000 has no partner .*none with its label overlaps it"
    ):
        compare_outputs(first, fewer, Agreement(), "a.jpg", candidates)


@pytest.mark.parametrize("name", [SMALL, "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn"])
def test_what_is_suppressed_is_among_the_candidates(tmp_path, name):
    model, _ = rebuild_model(load_checkpoint(shaken_checkpoint(tmp_path / "a.pth", name)))
    model = export.OnePicture(model.requires_grad_(False)).eval()
    image = drawn_images(1)[0]
    kept, candidates = model(image), export.all_candidates(model, image)
    assert len(candidates["scores"]) > len(kept["scores"]) and "masks" not in candidates
    # Left as they were.
    assert all(torch.equal(kept[key], value) for key, value in model(image).items())
    as_arrays = {key: value.numpy() for key, value in kept.items()}
    assert (pair_detections(as_arrays, candidates) >= 0).all()


def test_a_mask_may_move_by_one_pixel_and_no_more():
    expected = detections()
    compare_outputs(expected, {**expected, "masks": np.roll(expected["masks"], 1, axis=3)}, Agreement(), "a.jpg")
    with pytest.raises(ValueError, match="mask of detection 0 differs"):
        compare_outputs(expected, {**expected, "masks": np.roll(expected["masks"], 2, axis=3)}, Agreement(), "a.jpg")


def test_only_the_end_of_a_list_may_lack_a_partner():
    agreement = Agreement()
    compare_outputs(detections(), {name: value[:-1] for name, value in detections().items()}, agreement, "a.jpg")
    assert agreement.left_over == 1
    for cut in (slice(1, None), slice(0, 0)):
        with pytest.raises(ValueError, match="no partner"):
            compare_outputs(detections(), {n: v[cut] for n, v in detections().items()}, Agreement(), "a.jpg")


def run_elsewhere(path, images):
    """Run a file by its format's own library; returns outputs of the first picture, and the metadata."""
    if path.suffix == ".torchscript":
        extra = {"metadata.json": ""}
        found = torch.jit.load(str(path), _extra_files=extra)(images[0])
        return {name: value.numpy() for name, value in found.items()}, json.loads(extra["metadata.json"])
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path))
        names = [output.name for output in session.get_outputs()]
        values = session.run(None, {"images": images.numpy()})
        metadata = {p.key: json.loads(p.value) for p in onnx.load(str(path)).metadata_props}
    else:
        extra = {"metadata.json": ""}
        values = [value.numpy() for value in torch.export.load(str(path), extra_files=extra).module()(images)]
        names, metadata = ["boxes", "labels", "scores", "counts"], json.loads(extra["metadata.json"])
    found = dict(zip(names, values))
    count = found.pop("counts")[0]
    return {name: value[0, :count] for name, value in found.items()}, metadata


@pytest.mark.slow
@pytest.mark.parametrize("to_format", ["onnx", "pt2", "torchscript"])
def test_the_exported_file_runs_elsewhere_and_knows_its_classes(to_format, thin_checkpoint, tmp_path):
    output, checkpoint = tmp_path / f"model.{to_format}", thin_checkpoint()
    flags = ["--checkpoint", str(checkpoint), "--format", to_format, "--output", str(output)]
    assert export.run(flags) == 0
    images = torch.rand(2, 3, 50, 90)
    model, _ = rebuild_model(load_checkpoint(checkpoint))
    with torch.inference_mode():
        expected = model.eval()([images[0]])[0]
    found, metadata = run_elsewhere(output, images)
    np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), atol=1e-4)
    assert metadata["classes"][0] == {"label": 1, "name": "disc", "category_id": 7}
    assert metadata["resized_to"] == {"height": 320, "width": 320} and metadata["score_threshold"] == 0.4
    assert metadata["input"].startswith("image: [3," if to_format == "torchscript" else "images: [batch, 3,")
    # An existing file is never replaced.
    before = output.read_bytes()
    assert export.run(flags) == 1 and output.read_bytes() == before


@pytest.mark.slow
def test_a_fixed_size_fixes_all_shapes(thin_checkpoint, tmp_path):
    output, checkpoint = tmp_path / "fixed.onnx", thin_checkpoint(detections_per_img=7)
    flags = ["--checkpoint", str(checkpoint), "--format", "onnx", "--output", str(output), "--size", "64", "80"]
    assert export.run(flags) == 0
    session = onnxruntime.InferenceSession(str(output))
    assert [(given.name, given.shape) for given in session.get_inputs()] == [("images", [1, 3, 64, 80])]
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {"boxes": [1, 7, 4], "labels": [1, 7], "scores": [1, 7], "counts": [1]}
    assert run_elsewhere(output, torch.rand(1, 3, 64, 80))[1]["input"].startswith("images: [1, 3, 64, 80], float32")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--format", "torchscript", "--size", "64", "80"], "--size goes with --format onnx and pt2"),
        (["--format", "pt2", "--size", "64", "8"], "--size 64 8: expected 16 pixels or more"),
    ],
)
def test_a_size_that_no_file_can_have_is_refused(flags, text, checkpoint, capfd):
    assert export.run(["--checkpoint", str(checkpoint), *flags]) == 1
    assert text in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not EXPORTS_PYRAMIDS, reason="torch 2.10 does not export pyramids of any size")
def test_what_no_graph_can_do_goes_to_the_old_exporter_with_a_line(thin_checkpoint, tmp_path, few_proposals, capfd):
    output = tmp_path / "model.onnx"
    checkpoint = thin_checkpoint("keypointrcnn_resnet50_fpn", detections_per_img=5)
    assert export.run(["--checkpoint", str(checkpoint), "--format", "onnx", "--output", str(output)]) == 0
    printed = capfd.readouterr()
    _, line, last = printed.out.splitlines()
    assert not printed.err  # torch prints a thousand lines of the graph there
    assert "keypointrcnn_resnet50_fpn cannot be exported to onnx: heatmaps_to_keypoints (torchvision/" in line
    assert "agrees with PyTorch" in last and line.endswith(
        "written by the exporter that torch calls deprecated, for one picture at a time"
    )
    pt2 = tmp_path / "model.pt2"
    assert export.run(["--checkpoint", str(checkpoint), "--format", "pt2", "--output", str(pt2)]) == 1
    assert "; --format torchscript takes any model" in capfd.readouterr().err and not pt2.exists()
    found, metadata = run_elsewhere(output, torch.rand(1, 3, 50, 90))
    assert found["keypoints"].shape[1:] == (3, 3) and metadata["input"].startswith("images: [1, 3, height, width]")


@pytest.mark.slow
def test_a_file_that_disagrees_is_not_left_behind(checkpoint, tmp_path, monkeypatch, capfd):
    honest = export.run_torchscript

    def dishonest(path):
        run = honest(path)
        return lambda images: [{**found, "boxes": found["boxes"] + 1} for found in run(images)]

    monkeypatch.setattr(export, "run_torchscript", dishonest)
    flags = ["--checkpoint", str(checkpoint), "--format", "torchscript", "--output", str(tmp_path / "out" / "a.bin")]
    assert export.run(flags) == 1
    assert "no partner" in capfd.readouterr().err and list((tmp_path / "out").iterdir()) == []


def test_a_refusal_says_the_largest_differences_of_all_pictures(checkpoint):
    model = export.OnePicture(rebuild_model(load_checkpoint(checkpoint))[0].requires_grad_(False)).eval()
    pictures = [(f"{n}.jpg", image) for n, image in enumerate(drawn_images(3))]

    cases = export.build_cases(model, pictures)

    def off_in(case, amount=0.25):
        def run(images):
            found = [{key: value.numpy() for key, value in model(image).items()} for image in images]
            return [{**f, "boxes": f["boxes"] + (amount if images is case.images else 0.01)} for f in found]

        return run

    figures = r"All pictures: largest difference of boxes 0\.25 px \(at most 0\.1\)"
    with pytest.raises(ValueError, match=rf"differs on 1 of 3 pictures: 1\.jpg: .*\. {figures}"):
        export.check_file(model, off_in(cases[1]), cases[:-1])
    # The first one again, and its mirror image.
    with pytest.raises(ValueError, match=rf"differs on 2 of 5 pictures: 0\.jpg and its mirror image: .*\. {figures}"):
        export.check_file(model, off_in(cases[-1]), cases)
    assert export.check_file(model, off_in(cases[-1], 0.01), cases).pictures == 5


def test_detections_without_any_partner_are_no_agreement(checkpoint):
    model = export.OnePicture(rebuild_model(load_checkpoint(checkpoint))[0].requires_grad_(False)).eval()
    cases = export.build_cases(model, [("a.jpg", drawn_images(1)[0])])[:1]
    lowest = {key: values[-1:] for key, values in cases[0].expected[0].items()}
    cases = [export.Case("a.jpg", cases[0].images, [lowest])]
    with pytest.raises(ValueError, match="has a partner in PyTorch, so nothing was compared"):
        export.check_file(model, lambda images: [{**lowest, "labels": lowest["labels"] + 1}], cases)


def test_pictures_of_the_dataset_are_compared_where_they_are_at_hand(tmp_path, checkpoint, monkeypatch, caplog):
    detector = load_trained_model(checkpoint)

    def names_with(flags):
        return [name for name, _ in export.load_pictures(None, dataclasses.replace(detector, flags=flags))]

    root = draw_coco(tmp_path / "coco")
    flags = {"dataset": "coco", "data_path": str(root), "val_images": None, "val_annotations": None}
    names = names_with(flags)
    assert 2 <= len(names) <= 7 and all(name.startswith(str(root / "val2017")) for name in names)
    custom = tmp_path / "custom"
    (root / "val2017").rename((custom / "test").parent.mkdir() or custom / "test")
    found = names_with({"dataset": "custom", "data_path": str(custom)})
    assert [name.replace("custom/test", "coco/val2017") for name in found] == names
    monkeypatch.chdir(tmp_path)
    parsed = command_line.get_args_parser().parse_args(["--dataset", "custom"])  # ./custom by default
    assert names_with(vars(parsed)) == [str(Path(name).relative_to(tmp_path)) for name in found]
    held_out = names_with({**flags, "val_fraction": 0.2})  # some of all pictures
    assert 2 <= len(held_out) <= 7 and all(name.startswith(str(root / "train2017")) for name in held_out)
    caplog.set_level("INFO")
    for gone in ({}, flags, {"dataset": "shapes", "data_path": str(root)}):
        caplog.clear()
        assert names_with(gone)[0] == "drawn picture 0" and "drawn shapes are compared" in caplog.text


def test_pictures_that_yolo_and_voc_list_are_compared(tmp_path, checkpoint):
    trained = load_trained_model(checkpoint)
    splits = same_classes(read_splits(draw_coco(tmp_path / "coco"), crowds=False))
    yolo, voc = write_yolo(tmp_path / "yolo", splits), write_voc(tmp_path / "voc", splits)
    (voc / "ImageSets/Main/val.txt").write_text("val_000002\n")
    for dataset, path, expected in (
        ("yolo", yolo, sorted((tmp_path / "yolo/images/val").iterdir())),
        ("voc", voc, [voc / "JPEGImages/val_000002.png"]),
    ):
        flags = {"dataset": dataset, "data_path": str(path)}
        found = export.load_pictures(None, dataclasses.replace(trained, flags=flags))
        assert [name for name, _ in found[:-1]] == list(map(str, expected))[: export.NUM_PICTURES]
        shutil.move(path, tmp_path / "gone")
        assert export.dataset_pictures(flags) == []
        shutil.move(tmp_path / "gone", path)


@pytest.mark.slow
def test_nothing_to_compare_is_a_failure(tmp_path, monkeypatch, capfd, checkpoint):
    content = load_checkpoint(checkpoint)
    for key in content["model"]:
        if "classification_head" in key and content["model"][key].is_floating_point():
            content["model"][key].fill_(float("nan"))
    from runtime.checkpoint import save_checkpoint

    save_checkpoint(content, tmp_path / "nothing.pth")
    flags = ["--checkpoint", str(tmp_path / "nothing.pth"), "--format", "torchscript"]
    assert export.run(flags) == 1 and "nothing was compared" in capfd.readouterr().err
    assert not (tmp_path / "nothing.torchscript").exists()


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_its_pip_command(name, checkpoint, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    assert export.run(["--checkpoint", str(checkpoint), "--format", "onnx"]) == 1
    assert "pip install onnx onnxscript onnxruntime" in capfd.readouterr().err


def test_sizes_that_float32_rounds_down_are_resized_as_in_pytorch(tmp_path):
    """427 x 640 to a short side of 160: in float32 the height comes out as 159."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    content = load_checkpoint(shaken_checkpoint(tmp_path / "a.pth", name))
    content["model_spec"]["min_size"], content["model_spec"]["max_size"] = [160], 256
    model, _ = rebuild_model(content)
    rng = np.random.default_rng(0)
    for height, width in ((427, 640), (640, 427), (375, 500), (333, 201)):
        image = torch.from_numpy(rng.random((3, height, width), dtype=np.float32))
        expected = model.transform.eval()([image])[0]
        for kind in (TracedResize, ScriptedResize):
            resize = with_resize(model, kind).model.transform
            found = (torch.jit.script(resize) if kind is ScriptedResize else resize)([image])[0]
            assert found.image_sizes == expected.image_sizes
            assert torch.allclose(found.tensors, expected.tensors, atol=1e-5)


def test_traced_sizes_are_those_of_plain_division():
    for short in range(60, 1000):
        long = short * 3 // 2
        scale = min(96 / short, 160 / long)
        expected = [int(short * scale), int(long * scale)]
        assert resized_shape(torch.tensor([short, long]), 96, 160).tolist() == expected
        # The height that torchvision has when it computes in Python, for pictures that only their short side limits.
        assert resized_shape(torch.tensor([short, short]), 96, 160).tolist() == [int(short * (96 / short))] * 2


@pytest.fixture(scope="module")
def one_of_nine(request, tmp_path_factory):
    """The checkpoint of a model, for both formats."""
    path = tmp_path_factory.mktemp(request.param) / "a.pth"
    found = 5 if "keypoint" in request.param else 15  # the keypoint head takes long
    yield shaken_checkpoint(path, request.param, detections_per_img=found)
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("to_format", ["onnx", "torchscript"])
@pytest.mark.parametrize("one_of_nine", NINE, indirect=True)
def test_all_nine_models_are_exported(one_of_nine, to_format, tmp_path, monkeypatch, few_proposals):
    monkeypatch.setattr(export, "NUM_PICTURES", 2)  # and one turned; TorchScript optimises after the first
    # The new exporter is tested with thin models: it takes half a minute for one of these.
    monkeypatch.setitem(export.WAYS, "onnx", [export.Export.to_traced_onnx])
    output = tmp_path / "exported"
    assert export.run(["--checkpoint", str(one_of_nine), "--format", to_format, "--output", str(output)]) == 0
    assert output.is_file()
