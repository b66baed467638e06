"""predict.py: what it writes is what the model says, and nothing is lost or mixed."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

import predict
import score
from coco_utils import to_coco
from evaluation.results_files import read_results
from helpers.drawn import ROOT
from helpers.runs import run_train
from helpers.shaken import shaken_checkpoint
from inference.detector import Detector
from inference.picture_files import MAX_BATCH_PIXELS, find_images, reject_or_batch
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from models.architectures import ModelSpec
from pixels.images import read_image
from runtime.checkpoint import load_checkpoint
from runtime.saved_model import rebuild_model

MODELS = ("ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: shaken_checkpoint(folder / f"{name}.pth", name, score_threshold=0.3) for name in MODELS}


@pytest.fixture
def photos(tmp_path):
    """Drawn pictures in a folder with a folder inside."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    annotations = shapes_annotations("val", 4)
    for n in range(4):
        pixels = ShapeDrawer("val").read(annotations, n)
        Image.fromarray(pixels).save(folder / ("more" if n == 3 else "") / f"{n}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(*flags):
    return predict.run([*map(str, flags), "--device", "cpu", "--workers", "0"])


def read(folder):
    images = json.loads((folder / "images.json").read_text())
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return images, read_results(folder / "predictions.json")[0], rows


def shown_on(folder):
    """Return the content of the page."""
    text = (folder / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" class="v-content">(.*?)</script>', text, re.S)[1])


def directly(checkpoint, path):
    """Run torchvision's model as it is."""
    model, _ = rebuild_model(load_checkpoint(checkpoint))
    image = torch.from_numpy(read_image(path).copy()).permute(2, 0, 1).to(torch.float32).mul(1 / 255)
    with torch.inference_mode():
        return model.eval()([image])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_the_model(name, checkpoints, photos, tmp_path, few_proposals):
    source = photos if name == MODELS[0] else photos / "0.png"
    assert run("--checkpoint", checkpoints[name], source, "--output-dir", tmp_path / "out", "--batch-size", 1) == 0
    images, records, rows = read(tmp_path / "out")
    assert images["score_threshold"] == 0.3 and images["skipped"] == []
    assert [image["id"] for image in images["images"]] == ([1, 2, 3, 4] if source == photos else [1])
    assert len(records) == len(rows) > 4
    for image in images["images"]:
        expected = directly(checkpoints[name], image["file_name"])
        kept = expected["scores"] >= 0.3
        expected = {key: value[kept] for key, value in expected.items()}
        found = [record for record in records if record["image_id"] == image["id"]]
        assert len(found) == len(expected["scores"])
        order = expected["scores"].argsort(descending=True, stable=True)
        for n, record in zip(order.tolist(), found):
            x1, y1, x2, y2 = expected["boxes"][n].tolist()
            np.testing.assert_allclose(record["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=1e-4)
            assert record["score"] == pytest.approx(float(expected["scores"][n]), abs=1e-6)
            assert record["category_id"] == int(expected["labels"][n]) + 6
            if "masks" in expected:
                area = int((expected["masks"][n, 0] > 0.5).sum())
                row = [r for r in rows if float(r["score"]) == round(record["score"], 6)][0]
                assert record["segmentation"]["size"] == [image["height"], image["width"]]
                assert abs(int(row["mask_area"]) - area) <= max(1, 0.01 * area)
            if "keypoints" in expected:
                np.testing.assert_allclose(record["keypoints"], expected["keypoints"][n].reshape(-1), atol=1e-2)
        with Image.open(tmp_path / "out" / image["overlay"]) as overlay:
            assert overlay.size == (image["width"], image["height"])
            change = np.abs(np.asarray(overlay, dtype=int) - read_image(image["file_name"]).astype(int))
            assert (change.max() > 60) == bool(found)
    page = shown_on(tmp_path / "out")
    assert page["start"] == page["lowest"] == 0.3
    for image, picture in zip(images["images"], page["pictures"], strict=True):
        found = [record for record in records if record["image_id"] == image["id"]]
        assert (picture["source"], picture["name"]) == (image["picture"], image["file_name"])
        for record, (category, shown, *corners) in zip(found, picture["objects"], strict=True):
            x, y, w, h = record["bbox"]
            assert category == record["category_id"] and 0 <= record["score"] - shown < 1e-4
            np.testing.assert_allclose(corners[:4], [x, y, x + w, y + h], atol=0.051)
            if "keypoints" in record:
                np.testing.assert_allclose(corners[5][::3], record["keypoints"][::3], atol=0.051)
            assert bool("segmentation" in record and mask_util.area(record["segmentation"])) == bool(
                corners[4:] and corners[4]
            )
        with Image.open(tmp_path / "out" / image["picture"]) as plain:
            change = np.abs(np.asarray(plain, dtype=int) - read_image(image["file_name"]).astype(int))
            assert plain.size == (image["width"], image["height"]) and change.mean() < 6


@pytest.mark.slow
def test_every_detection_has_its_keypoints(checkpoints, photos):
    """More of one class than the twenty that a COCO score reads."""
    detector = Detector.load(checkpoints["keypointrcnn_resnet50_fpn"], device="cpu", score_threshold=0)
    results = [found for batch in detector.over_files([photos / "0.png"]) for found in batch]
    assert max(np.bincount(r.detections.category_ids).max() for r in results) > 20
    assert all(np.isfinite(r.detections.keypoints).all() for r in results)


@pytest.mark.slow
def test_csv_names_files_classes_and_keypoints(checkpoints, photos, tmp_path, few_proposals):
    run("--checkpoint", checkpoints[MODELS[2]], photos / "0.png", "--output-dir", tmp_path / "out", "--no-overlays")
    _, records, rows = read(tmp_path / "out")
    assert rows[0]["file_name"] == str(photos / "0.png") and rows[0]["class"] in ("disc", "square", "triangle")
    x, y, w, h = records[0]["bbox"]
    corners = [float(rows[0][key]) for key in ("x1", "y1", "x2", "y2")]
    np.testing.assert_allclose(corners, [x, y, x + w, y + h], atol=0.006)
    points = [float(rows[0][f"{name}_{axis}"]) for name in ("top", "left", "right") for axis in "xy"]
    np.testing.assert_allclose(points, np.array(records[0]["keypoints"]).reshape(3, 3)[:, :2].reshape(-1), atol=0.006)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images.json", "predictions.csv", "predictions.json",
    ]  # fmt: skip


def test_broken_and_bomb_files_are_reported_and_the_others_predicted(checkpoints, photos, tmp_path, capfd, monkeypatch):
    data = (photos / "0.png").read_bytes()
    (photos / "0a.png").write_bytes(data[: len(data) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    Image.new("L", (900, 800)).save(photos / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    code = run("--checkpoint", checkpoints[MODELS[0]], photos, "--output-dir", tmp_path / "out")
    assert code == predict.EXIT_SOME_SKIPPED == 4
    images, records, _ = read(tmp_path / "out")
    reasons = {entry["file_name"].rsplit("/")[-1]: entry["reason"] for entry in images["skipped"]}
    assert set(reasons) == {"0a.png", "empty.jpg", "bomb.png"} and "image bombs" in reasons["bomb.png"]
    # Ids count all files in order, so they do not depend on which can be read.
    assert {image["file_name"].rsplit("/")[-1]: image["id"] for image in images["images"]} == {
        "0.png": 1, "1.png": 3, "2.png": 4, "3.png": 7,
    }  # fmt: skip
    assert {record["image_id"] for record in records} <= {1, 3, 4, 7}
    error = capfd.readouterr().err
    assert "skipped: " in error and "0a.png" in error


def test_reasons_do_not_repeat_the_path_whatever_is_in_it(checkpoints, tmp_path, capfd):
    folder = tmp_path / "photos: new"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "good.png")
    (folder / "empty.png").write_bytes(b"")
    flags = ["--checkpoint", checkpoints[MODELS[0]], folder, "--output-dir", tmp_path / "out"]
    assert run(*flags) == predict.EXIT_SOME_SKIPPED
    (entry,) = read(tmp_path / "out")[0]["skipped"]
    assert entry["file_name"] == str(folder / "empty.png") and entry["reason"].startswith(
        "cannot read the image header"
    )
    assert f"skipped: {folder / 'empty.png'}: {entry['reason']}\n" in capfd.readouterr().err


def test_nothing_readable_is_an_error(checkpoints, tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(b"no")
    assert run("--checkpoint", checkpoints[MODELS[0]], tmp_path / "a.png", "--output-dir", tmp_path / "out") == 1
    assert "not one of the files could be read" in capfd.readouterr().err


def test_pictures_of_the_page_are_upright_and_no_larger_than_a_screen(checkpoints, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    Image.new("RGB", (2000, 300)).save(tmp_path / "100% #1.png", exif=exif)
    run("--checkpoint", checkpoints[MODELS[0]], tmp_path / "100% #1.png", "--output-dir", tmp_path / "out")
    (image,) = read(tmp_path / "out")[0]["images"]
    (picture,) = shown_on(tmp_path / "out")["pictures"]
    assert (picture["width"], picture["height"]) == (image["width"], image["height"]) == (300, 2000)
    assert unquote(picture["source"]) == image["picture"] and "#" not in picture["source"]
    with Image.open(tmp_path / "out" / image["picture"]) as plain:
        assert plain.size == (192, 1280) and not plain.getexif()


def test_pictures_are_turned_upright(checkpoints, photos, tmp_path):
    upright = Image.open(photos / "1.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for path, out in ((photos / "1.png", "a"), (tmp_path / "turned.png", "b")):
        run("--checkpoint", checkpoints[MODELS[0]], path, "--output-dir", tmp_path / out)
    (first, records, _), (second, turned, _) = read(tmp_path / "a"), read(tmp_path / "b")
    assert [(i["height"], i["width"]) for i in first["images"]] == [(i["height"], i["width"]) for i in second["images"]]
    assert records == turned


def test_results_of_two_runs_are_never_mixed(checkpoints, photos, tmp_path, capfd):
    flags = ("--checkpoint", checkpoints[MODELS[0]], photos / "0.png", "--output-dir", tmp_path / "out")
    assert run(*flags) == 0
    before = (tmp_path / "out" / "predictions.json").read_bytes()
    assert run(*flags, "--score-threshold", 0.9) == 1
    assert "expected a new or empty folder" in capfd.readouterr().err
    assert (tmp_path / "out" / "predictions.json").read_bytes() == before


@pytest.mark.parametrize(
    ("stored", "given", "expected"), [(0.4, None, 0.4), (None, None, 0.5), (0.4, 0.2, 0.2), (0.0, None, 0.5)]
)
def test_the_threshold_is_the_evaluations_unless_given(stored, given, expected, photos, tmp_path):
    checkpoint = shaken_checkpoint(tmp_path / "a.pth", MODELS[0], score_threshold=stored)
    flags = () if given is None else ("--score-threshold", given)
    run("--checkpoint", checkpoint, photos / "0.png", "--output-dir", tmp_path / "out", *flags)
    images, records, _ = read(tmp_path / "out")
    assert images["score_threshold"] == expected and all(record["score"] >= expected for record in records)


def test_files_folders_and_globs_are_found_once_and_in_order(photos):
    names = [path.relative_to(photos).as_posix() for path in find_images([str(photos)])]
    assert names == ["0.png", "1.png", "2.png", "more/3.png"]
    assert find_images([str(photos / "*.png"), str(photos / "0.png")]) == [photos / f"{n}.png" for n in range(3)]
    assert find_images([str(photos / "**" / "3.png")]) == [photos / "more" / "3.png"]
    for nothing, reason in (
        ("none.png", "no such file"),
        ("x*.png", "no file matches"),
        ("../empty", "no images in it"),
    ):
        (photos.parent / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=reason):
            find_images([str(photos / nothing)])


def test_formats_of_pillow_are_predicted_and_all_else_is_named(checkpoints, photos, tmp_path, capfd):
    for suffix in (".jfif", ".avif", ".jp2"):
        Image.open(photos / "0.png").save(photos / f"x{suffix}")
    (photos / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "more" / "gone.jpg").symlink_to("nothing.jpg")
    code = run("--checkpoint", checkpoints[MODELS[0]], photos, "--output-dir", tmp_path / "out")
    assert code == predict.EXIT_SOME_SKIPPED
    images, _, _ = read(tmp_path / "out")
    assert len(images["images"]) == 7 and images["not_reached"] == []
    (skipped,) = images["skipped"]
    assert skipped["file_name"].endswith("e.heic") and "Pillow does not open .heic" in skipped["reason"]
    assert {Path(entry["file_name"]).name: entry["reason"] for entry in images["left_out"]} == {
        "notes.txt": "no picture by its name", "gone.jpg": "a link to nothing",
    }  # fmt: skip
    output = "".join(capfd.readouterr())
    assert "no picture by its name (1): " in output and "e.heic" in output


def test_its_own_results_are_no_pictures_to_predict(checkpoints, photos, monkeypatch, capfd):
    monkeypatch.chdir(photos)
    for n in range(2):
        flags = ("--checkpoint", checkpoints[MODELS[0]], "--output-dir", f"runs/predict-{n}")
        assert run(*flags, ".") == 0
        assert len(read(photos / "runs" / f"predict-{n}")[0]["images"]) == 4
    assert "results of predict.py (1): runs/predict-0" in "".join(capfd.readouterr())
    for pattern in ("**", "**/*"):
        assert len([p for p in find_images([pattern]) if p.suffix in (".png", ".jpg")]) == 4
    assert len(find_images(["runs/predict-0/overlays"])) == len(find_images(["runs/predict-0/overlays/*"])) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_what_was_found_whole(checkpoints, tmp_path, workers):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    annotations = shapes_annotations("val", 1)
    Image.fromarray(ShapeDrawer("val").read(annotations, 0)).save(folder / "0000.png")
    for n in range(1, 3000):
        shutil.copy(folder / "0000.png", folder / f"{n:04d}.png")
    command = [sys.executable, "predict.py", folder, "--checkpoint", checkpoints[MODELS[0]], "--device", "cpu"]
    command += ["--workers", workers, "--batch-size", 1, "--output-dir", out]
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "overlays").is_dir() or len(list((out / "overlays").iterdir())) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: loading processes get it too
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error, error
    assert sum("stopped by SIGINT" in line for line in error.splitlines()) == 1
    images, records, rows = read(out)
    done = {image["id"] for image in images["images"]}
    assert 3 <= len(done) < 3000 and len(done) + len(images["not_reached"]) == 3000
    assert len(records) == len(rows) and {record["image_id"] for record in records} <= done
    assert not list(out.glob("**/*.tmp"))
    assert all((out / image[key]).is_file() for image in images["images"] for key in ("overlay", "picture"))
    page = shown_on(out)
    assert [picture["source"] for picture in page["pictures"]] == [image["picture"] for image in images["images"]]
    assert f"stopped before {len(images['not_reached'])} more files" in (out / "index.html").read_text()


def test_a_folder_too_long_for_sockets_is_one_line(monkeypatch, checkpoints, photos, tmp_path, capfd):
    """torch's loading processes would fail in silence there, and the command wait for ever."""
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    flags = ["--checkpoint", checkpoints[MODELS[0]], photos, "--output-dir", tmp_path / "out"]
    assert predict.run([*map(str, flags), "--device", "cpu", "--workers", "1"]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "expected at most 75 characters" in line]
    assert str(long) in line and "set TMPDIR to a shorter one" in line
    assert run(*flags) in (0, 4)  # without loading processes


def test_ctrl_c_before_the_first_picture_is_one_line(monkeypatch, photos, tmp_path, capfd):
    monkeypatch.setattr(predict, "load_trained_model", lambda path: signal.raise_signal(signal.SIGINT))
    assert run("--checkpoint", "none.pth", photos, "--output-dir", tmp_path / "out") == 130
    assert capfd.readouterr().err.strip().splitlines()[-1] == "predict.py: stopped by SIGINT before anything was found"


def test_large_pictures_come_in_smaller_batches(tmp_path):
    side = int(MAX_BATCH_PIXELS**0.5) + 1
    for n, size in enumerate([(8, 8), (8, 8), (side, side), (8, 8)]):
        Image.new("L", size).save(tmp_path / f"{n}.png")
    batches, bad = reject_or_batch(sorted(tmp_path.glob("*.png")), 3, ModelSpec(MODELS[0], 2))
    assert batches == [[0, 1], [2], [3]] and not bad


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--score-threshold", "1.5"], "from 0 to 1"),
        (["--batch-size", "0"], "at least 1"),
        (["--workers", "-1"], "0 or more"),
    ],
)
def test_values_out_of_range_are_refused(flags, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.run(["--checkpoint", "none.pth", "a.png", *flags])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_user_errors_are_one_line(photos, tmp_path, capfd):
    assert run("--checkpoint", tmp_path / "none.pth", photos) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("predict.py: error:") and "no such checkpoint" in error


@pytest.mark.slow
def test_as_a_command_with_loading_processes(checkpoints, photos, tmp_path):
    done = run_train(
        photos, "--checkpoint", checkpoints[MODELS[0]], "--output-dir", tmp_path / "out", "--device", "cpu",
        "--workers", 2, script="predict.py",
    )  # fmt: skip
    assert "objects in 4 pictures" in done.stdout + done.stderr and sys.executable
    run("--checkpoint", checkpoints[MODELS[0]], photos, "--output-dir", tmp_path / "here")
    assert read(tmp_path / "out")[1] == read(tmp_path / "here")[1]


def test_names_that_are_too_long_or_no_text_cost_no_other_file(checkpoints, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / ("x" * 240 + ".png")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    os.link(path, os.fsencode(folder) + b"/bad\xff.png")
    flags = ["--checkpoint", checkpoints[MODELS[0]], folder, "--output-dir", tmp_path / "out"]
    assert run(*flags) == predict.EXIT_SOME_SKIPPED
    images, _, _ = read(tmp_path / "out")
    assert len(images["images"]) == 1 and (tmp_path / "out" / images["images"][0]["overlay"]).is_file()
    assert "not UTF-8" in images["skipped"][0]["reason"]


def truth_of(photos, names):
    """A COCO file of the drawn pictures, numbered against the order of their names."""
    annotations = shapes_annotations("val", 4)
    content = to_coco(annotations)
    for n, record in enumerate(content["images"]):
        record.update(file_name=names[n], id=100 - n)
    for record in content["annotations"]:
        record["image_id"] = 100 - list(annotations.image_ids).index(record["image_id"])
    path = photos.parent / "truth.json"
    path.write_text(json.dumps(content))
    return path


def test_ids_come_from_an_annotation_file_by_the_names_of_files(tmp_path, photos, checkpoints):
    truth = truth_of(photos, ["0.png", "photos/1.png", "2.png", "more\\3.png"])
    flags = [
        photos,
        "--checkpoint",
        checkpoints[MODELS[0]],
        "--no-overlays",
        "--score-threshold",
        0,
        "--ids-from",
        truth,
    ]
    assert run(*flags, "--output-dir", tmp_path / "out") == 0
    images, results, rows = read(tmp_path / "out")
    numbered = {Path(entry["file_name"]).name: entry["id"] for entry in images["images"]}
    assert numbered == {"0.png": 100, "1.png": 99, "2.png": 98, "3.png": 97}
    assert {r["image_id"] for r in results} <= set(numbered.values()) and results
    assert {int(row["image_id"]) for row in rows} == {r["image_id"] for r in results}
    assert score.run(["--ground-truth", str(truth), "--predictions", str(tmp_path / "out" / "predictions.json")]) == 0


def test_pictures_that_the_annotation_file_lacks_stop_predict_before_it_starts(tmp_path, photos, checkpoints, capsys):
    flags = [photos, "--checkpoint", checkpoints[MODELS[0]], "--output-dir", tmp_path / "out", "--ids-from"]
    for names, message in (
        (
            ["0.png", "9.png", "2.png", "3.png"],
            "1 of 4 pictures are not among its images, such as .*1.png; leave them out",
        ),
        (["0.png", "else/1.png", "2.png", "3.png"], "1 of 4 pictures are not among its images"),
    ):
        assert run(*flags, truth_of(photos, names)) == 1
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()
    (photos / "more" / "0.png").write_bytes((photos / "0.png").read_bytes())
    assert run(*flags, truth_of(photos, [f"{n}.png" for n in range(4)])) == 1
    assert "both are its image 100" in capsys.readouterr().err
