"""Pictures of which the model's resize leaves nothing are named and skipped; the others are predicted and compared."""

import json

import pytest
from PIL import Image

import export
import predict
from helpers.shaken import shaken_checkpoint
from inference.trained_model import load_trained_model

MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model that resizes to 96, at most 160 pixels."""
    return shaken_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.pth", MODEL)


def draw(folder):
    """Draw two pictures that keep a pixel or more along each side, and two that do not."""
    for name, size in (("a", (7, 1280)), ("b", (8, 1280)), ("c", (1200, 3)), ("d", (60, 80))):
        Image.linear_gradient("L").resize(size).save(folder / f"{name}.png")


def test_predict_skips_and_names_them(checkpoint, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    draw(tmp_path / "photos")
    flags = [tmp_path / "photos", "--checkpoint", checkpoint, "--output-dir", tmp_path / "out", "--device", "cpu"]
    code = predict.run([*map(str, flags), "--workers", "0", "--no-overlays"])
    assert code == predict.EXIT_SOME_SKIPPED
    said = capfd.readouterr().err
    assert f"skipped: {tmp_path}/photos/c.png: 1200 x 3 pixels, the model's resize leaves nothing of it\n" in said
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [entry["id"] for entry in content["skipped"]] == [1, 3] and "7 x 1280" in content["skipped"][0]["reason"]
    assert [entry["id"] for entry in content["images"]] == [2, 4]


def test_a_turned_picture_counts_as_it_is_shown(checkpoint, tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (3, 1200)).save(tmp_path / "a.png", exif=exif)
    flags = [tmp_path / "a.png", "--checkpoint", checkpoint, "--output-dir", tmp_path / "out", "--device", "cpu"]
    assert predict.run([*map(str, flags), "--workers", "0"]) == 1
    assert "1200 x 3 pixels" in capfd.readouterr().err


def test_an_export_is_checked_without_them(checkpoint, tmp_path, caplog):
    draw(tmp_path)
    pictures = export.load_pictures([str(tmp_path)], load_trained_model(checkpoint))
    assert [name.rpartition("/")[2] for name, _ in pictures] == ["b.png", "d.png", "b.png, turned"]
    assert "c.png: 1200 x 3 pixels" in caplog.text
    with pytest.raises(ValueError, match="can use none of these pictures"):
        export.load_pictures([str(tmp_path / "c.png")], load_trained_model(checkpoint))
