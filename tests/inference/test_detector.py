"""The interface for Python: whatever form a picture comes in, what is found is what predict.py finds."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from helpers.drawn import ROOT
from helpers.shaken import shaken_checkpoint
from helpers.thin import use_thin_models
from inference.detector import Detector
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from models.architectures import ARCHITECTURES
from pixels.images import BadImageError

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
SSDLITE = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four drawn pictures; the last is a JPEG that is shown turned."""
    folder = tmp_path_factory.mktemp("photos")
    annotations = shapes_annotations("val", 5)
    for n, drawn in enumerate((0, 2, 3, 1)):
        picture = Image.fromarray(ShapeDrawer("val").read(annotations, drawn))
        exif = Image.Exif()
        if n == 3:
            exif[0x0112] = 6
        picture.save(folder / f"{n}.{'jpg' if n == 3 else 'png'}", exif=exif)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shaken_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.pth", SSDLITE, score_threshold=0.3)


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.load(checkpoint, device="cpu")


def same(a, b):
    """Tell whether two results are the same to the last bit."""
    parts = [(x.boxes, x.scores, x.category_ids, x.picture) for x in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*parts))


@pytest.mark.slow
@pytest.mark.parametrize("name", NINE)
def test_what_is_found_is_what_predict_writes(name, photos, tmp_path, monkeypatch):
    if ARCHITECTURES[name].has_proposals:
        use_thin_models(monkeypatch)
    checkpoint = shaken_checkpoint(tmp_path / "a.pth", name)
    detector = Detector.load(checkpoint, device="cpu", score_threshold=0.1)
    paths = sorted(photos.iterdir())[-2:]
    records = [record for n, found in enumerate(detector(paths)) for record in found.to_coco(n + 1)]
    assert len(records) > 3
    flags = ["--score-threshold", "0.1", "--output-dir", tmp_path / "out", "--checkpoint", checkpoint]
    flags += ["--device", "cpu", "--workers", "0", "--batch-size", "1", "--no-overlays"]
    assert predict.run([str(flag) for flag in [*paths, *flags]]) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == json.loads(json.dumps(records))


def test_a_path_a_picture_an_array_and_a_tensor_are_the_same(detector, photos):
    path = photos / "0.png"
    pixels = np.asarray(Image.open(path))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = detector(str(path))
    assert len(expected) > 3
    # v2's to_dtype multiplies by 1 / 255, and so does the suite.
    for form in (path, Image.open(path), pixels, tensor, tensor.float().mul(1 / 255)):
        assert same(detector(form), expected)


def test_a_turned_picture_is_found_upright(detector, photos):
    found = detector(photos / "3.jpg")
    assert same(detector(Image.open(photos / "3.jpg")), found)
    with Image.open(photos / "3.jpg") as stored:
        assert found.size == (stored.width, stored.height) != (stored.height, stored.width)


def test_the_program_in_the_docs_runs(checkpoint, photos, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "predict_export.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    for place, source in (("runs/first/weights/best.pth", checkpoint), ("photos/street.jpg", photos / "3.jpg")):
        (tmp_path / place).parent.mkdir(parents=True)
        shutil.copy(source, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert (
        re.match(r"(disc|square|triangle) \d\.\d\d: ", capsys.readouterr().out) and (tmp_path / "drawn.jpg").is_file()
    )


def test_grey_pictures_are_taken(detector, photos):
    grey = Image.open(photos / "0.png").convert("L")
    array = np.asarray(grey)
    expected = detector(Image.merge("RGB", [grey] * 3))
    assert same(detector(grey), expected) and same(detector(array), expected)
    assert same(detector(torch.from_numpy(array.copy())[None]), expected)
    sixteen = Image.fromarray(array.astype(np.uint16) * 257)
    assert same(detector(sixteen), expected)


def test_a_list_gives_a_list_in_its_order(detector, photos):
    paths = sorted(photos.iterdir())
    alone = [detector(path) for path in paths]
    together = detector(paths)
    assert [found.index for found in together] == [0, 1, 2, 3] and all(map(same, together, alone))
    assert detector([]) == []
    assert all(map(same, detector(tuple(paths), batch_size=3), alone))  # SSDs resize all to one size: no padding


def test_eight_threads_find_what_one_finds(detector, photos):
    pictures = [Image.open(path).copy() for path in sorted(photos.iterdir())] * 6
    alone = [detector(picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(same, pool.map(detector, pictures), alone))


@pytest.mark.slow
def test_threads_do_not_mix_masks_or_keypoints(photos, tmp_path, monkeypatch):
    use_thin_models(monkeypatch)
    for name in ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
        detector = Detector.load(shaken_checkpoint(tmp_path / "a.pth", name), device="cpu", score_threshold=0.1)
        pictures = sorted(photos.iterdir()) * 2
        alone = [detector(picture).to_coco(1) for picture in pictures]
        with ThreadPoolExecutor(8) as pool:
            assert [found.to_coco(1) for found in pool.map(detector, pictures)] == alone


def test_masks_and_keypoints_are_arrays_of_the_picture(photos, tmp_path, monkeypatch):
    use_thin_models(monkeypatch)
    found = {}
    for name in ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
        detector = Detector.load(shaken_checkpoint(tmp_path / "a.pth", name), device="cpu", score_threshold=0.1)
        found[name] = detector(photos / "1.png")
        assert len(found[name]) > 0
    masked, pointed = found.values()
    assert masked.masks.shape == (len(masked), *masked.size) and masked.masks.dtype == bool and masked.masks.any()
    assert masked.keypoints is None and pointed.masks is None
    assert pointed.keypoints.shape == (len(pointed), len(pointed.keypoint_names), 2)
    for mask, record in zip(masked.masks, masked.to_coco(1)):
        from pycocotools import mask as coco_masks

        assert np.array_equal(coco_masks.decode(record["segmentation"]), mask)


def test_a_result_draws_and_shows_itself(detector, photos, tmp_path):
    found = detector(photos / "1.png")
    drawn = found.draw()
    before = np.asarray(Image.open(photos / "1.png"))
    assert drawn.size == (before.shape[1], before.shape[0]) and not np.array_equal(np.asarray(drawn), before)
    assert np.array_equal(found.picture, before)  # the picture itself is not drawn into
    found.save(tmp_path / "drawn.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(drawn))
    assert found._repr_jpeg_().startswith(b"\xff\xd8")
    height, width = found.size
    counted = sum(int(part.split()[0]) for part in repr(found).split(" in a ")[0][len("<Found: ") :].split(", "))
    assert counted == len(found) and f"{width} x {height} pixels" in repr(found)
    assert SSDLITE in repr(detector)


def test_the_threshold_is_the_checkpoints_unless_given(checkpoint, detector, photos):
    assert detector.score_threshold == 0.3 and detector(photos / "0.png").scores.min() >= 0.3
    all_ = detector(photos / "0.png")
    middle = float(np.median(all_.scores))
    few = Detector.load(checkpoint, device="cpu", score_threshold=middle)(photos / "0.png")
    kept = all_.scores >= middle
    assert 0 < kept.sum() < len(all_) and np.array_equal(all_.boxes[kept], few.boxes)
    with pytest.raises(ValueError, match="score_threshold 30: expected a number from 0 to 1"):
        Detector.load(checkpoint, score_threshold=30)


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"picture 0: .*uint8 \[H, W, 3\] .* got uint8 \[3, 40, 60\]"),
        (np.zeros((40, 60, 3)), r"got float64 \[40, 60, 3\]"),
        (torch.full((3, 4, 4), 200.0), r"picture 0: .*in 0\.\.1, got 200 to 200; divide by 255"),
        (torch.full((3, 4, 4), float("nan")), r"in 0\.\.1, got nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 or of floating-point"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\[3, H, W\] or \[1, H, W\], got \[4, 4, 3\]"),
        (np.zeros((0, 0, 3), np.uint8), "expected an array"),
        (7, "a file's path, a Pillow picture, an array or a tensor, got int"),
    ],
)
def test_what_is_no_picture_is_said_in_one_line(detector, picture, text):
    with pytest.raises(ValueError, match=text) as caught:
        detector(picture)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_picture_is_named(detector, photos, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(BadImageError, match=r"a\.png: "):
        detector([photos / "0.png", tmp_path / "a.png"])
    with pytest.raises(BadImageError, match="b.png: .*No such file"):
        detector(tmp_path / "b.png")
    with pytest.raises(ValueError, match="batch_size 0"):
        detector([photos / "0.png"], batch_size=0)
