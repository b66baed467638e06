"""A folder of images with one json each: read as it stands, checked before the first step, trained and scored."""

import json
import logging
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import check_dataset
import train
from annotations.findings import BadDataError
from coco_utils import read_coco
from custom_dataset import DatasetInfo, read_dataset_info, read_folder
from helpers.drawn import draw_folder, edit
from helpers.ranks import run_on_ranks
from helpers.runs import QUICK, lines, train_on_rank
from helpers.thin import use_thin_models
from loading.splits import Source, load_custom_split, load_data

pytestmark = pytest.mark.usefixtures("restore_process")


def test_a_folder_is_read_as_it_stands(tmp_path):
    root = draw_folder(tmp_path / "custom")
    annotations = read_folder(root / "train", DatasetInfo())
    assert len(annotations) == 6 and annotations.num_keypoints == 2
    assert annotations.categories == ((1, "object"),)
    assert annotations.objects(5) == slice(annotations.num_objects, annotations.num_objects)  # the background image
    entry = json.loads((root / "train" / "annotations" / "im_000.json").read_text())
    x1, y1, x2, y2 = entry["bboxes"][0]
    assert annotations.boxes_xywh[0].tolist() == [x1, y1, x2 - x1, y2 - y1]
    assert annotations.areas[0] == (x2 - x1) * (y2 - y1)
    assert annotations.keypoints[0].tolist() == entry["keypoints"][0]
    assert (annotations.heights[0], annotations.widths[0]) == (60, 80)


def test_images_and_annotations_pair_by_stem_not_by_order(tmp_path):
    root = draw_folder(tmp_path / "custom")
    for name in ("images/im_001.png", "annotations/im_001.json"):
        (root / "train" / name).unlink()
    annotations = read_folder(root / "train", DatasetInfo())
    assert [annotations.file_name(i) for i in range(2)] == ["images/im_000.png", "images/im_002.png"]
    entry = json.loads((root / "train" / "annotations" / "im_002.json").read_text())
    assert annotations.boxes_xywh[annotations.objects(1)][:, 0].tolist() == [b[0] for b in entry["bboxes"]]


def test_null_points_and_missing_optional_fields(tmp_path):
    root = draw_folder(tmp_path / "custom", classes=["cat", "dog"], polygons=True)

    def change(entry):
        entry["keypoints"][0][1] = None
        entry["iscrowd"] = [1] + [0] * (len(entry["bboxes"]) - 1)
        entry["area"] = [123.5] + [None] * (len(entry["bboxes"]) - 1)

    edit(root, change)
    annotations = read_folder(root / "train", DatasetInfo(), uses=["segm"])
    assert annotations.keypoints[0, 1].tolist() == [0, 0, 0]
    assert annotations.is_crowd[0] and annotations.areas[0] == 123.5
    assert annotations.categories == ((1, "cat"), (2, "dog"))
    segmented = annotations.areas[annotations.objects(1)]
    assert (segmented > 0).all()


def _exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def test_exif_rotation_is_applied_and_boxes_of_the_unrotated_picture_are_reported(tmp_path):
    root = draw_folder(tmp_path / "custom", num_images=3)
    path = root / "train" / "images" / "im_000.png"
    Image.open(path).rotate(90, expand=True).save(path, exif=_exif(6))  # shown as before
    annotations = read_folder(root / "train", DatasetInfo())
    assert (annotations.heights[0], annotations.widths[0]) == (60, 80)
    split = load_custom_split(root, "train")
    assert split.images.read(split.annotations, 0).shape == (60, 80, 3)

    def far_right(entry):
        entry["bboxes"] = [[65, 5, 79, 30]]
        entry["keypoints"] = [[[70, 6, 2], [71, 7, 2]]]

    edit(root, far_right)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path, exif=_exif(6))
    with pytest.raises(
        BadDataError, match=r"im_000\.png: EXIF turns the picture to 60 x 80, but its boxes fit only 80 x 60"
    ):
        read_folder(root / "train", DatasetInfo())


def test_classes_come_from_the_dataset_file_and_labels_may_be_names_or_numbers(tmp_path):
    root = draw_folder(tmp_path / "custom", classes=["cat", "dog"], info={"classes": ["dog", "cat", "owl"]})
    edit(root, lambda entry: entry.update(labels=[2] * len(entry["bboxes"])))
    annotations = read_folder(root / "train", read_dataset_info(root))
    assert annotations.categories == ((1, "dog"), (2, "cat"), (3, "owl"))
    assert annotations.category_ids[annotations.objects(0)].tolist() == [2] * (annotations.objects(0).stop)


def _set(field, value):
    return lambda entry: entry.__setitem__(field, value)


def _first(field, value):
    return lambda entry: entry[field].__setitem__(0, value)


BAD_ENTRIES = {
    "x2 <= x1": (_first("bboxes", [40, 10, 20, 30]), r"im_000\.json: bboxes\[0\]: box \[40, 10, 20, 30\] has x2 <= x1"),
    "y2 <= y1": (_first("bboxes", [20, 30, 40, 30]), r"bboxes\[0\]: box \[20, 30, 40, 30\] has y2 <= y1"),
    "outside": (_first("bboxes", [100, 100, 120, 130]), r"lies outside the image of 80 x 60 pixels"),
    "partly outside": (_first("bboxes", [70, 10, 95, 30]), r"lies partly outside the image of 80 x 60 pixels"),
    "three numbers": (_first("bboxes", [1, 2, 3]), r"bboxes\[0\]: bbox is \[1, 2, 3\], expected 4 finite numbers"),
    "text": (_first("bboxes", "x"), r"bboxes\[0\]: bbox is 'x', expected 4 finite numbers"),
    "no boxes": (lambda entry: entry.pop("bboxes"), r"im_000\.json: expected an object with a list 'bboxes'"),
    "keypoint outside": (_first("keypoints", [[100, 5, 2], [5, 5, 2]]), r"labelled keypoint 0 at \(100, 5\) lies outside"),
    "visibility": (_first("keypoints", [[10, 5, 3], [5, 5, 2]]), r"visibilities 3, 2"),
    "point without v": (_first("keypoints", [[10, 5], [5, 5, 2]]), r"bboxes\[0\]: keypoints is .*, expected \[x, y, v\] for every point; point 0 is \[10, 5\]"),
    "other K": (_first("keypoints", [[10, 5, 2]]), r"keypoints"),
    "keypoints for other boxes": (lambda e: e["keypoints"].append([]), r"keypoints: \d entries for \d boxes"),
    "labels for other boxes": (_set("labels", ["a"] * 9), r"labels: 9 entries for \d boxes"),
    "label 0": (lambda e: e.update(labels=[0] * len(e["bboxes"])), r"label 0; 0 is background"),
    "polygons for other boxes": (_set("segmentations", []), r"segmentations: 0 entries for \d boxes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_bad_entry_is_refused_with_file_place_and_remedy(tmp_path, name):
    change, message = BAD_ENTRIES[name]
    root = draw_folder(tmp_path / "custom")
    edit(root, change)
    with pytest.raises(BadDataError, match=message) as caught:
        read_folder(root / "train", DatasetInfo(), uses=["keypoints"])
    assert "; " in str(caught.value)


def test_an_unknown_label_is_refused_with_the_known_ones(tmp_path):
    root = draw_folder(tmp_path / "custom", classes=["cat"], info={"classes": ["cat", "dog"]})
    edit(root, lambda entry: entry.update(labels=["bird"] * len(entry["bboxes"])))
    with pytest.raises(BadDataError, match=r"label 'bird'; expected a number from 1 to 2 or one of cat, dog"):
        read_folder(root / "train", read_dataset_info(root))


def test_xywh_boxes_are_recognized(tmp_path):
    root = draw_folder(tmp_path / "custom")
    for index in range(6):
        edit(root, lambda e: e.update(bboxes=[[a, b, c - a, d - b] for a, b, c, d in e["bboxes"]]), index=index)
    with pytest.raises(BadDataError, match=r"these look like \[x, y, width, height\]"):
        read_folder(root / "train", DatasetInfo())


def test_files_that_cannot_be_read_are_named_all_at_once(tmp_path):
    root = draw_folder(tmp_path / "custom")
    images, jsons = root / "train" / "images", root / "train" / "annotations"
    (jsons / "im_000.json").write_text('{"bboxes": [')
    (images / "im_001.png").write_bytes(b"")
    (jsons / "im_002.json").unlink()
    (images / "im_003.png").unlink()
    shutil.copy(images / "im_004.png", images / "im_004.jpg")
    (jsons / "im_005.json").write_text('{"bboxes": [[NaN, 1, 2, 3]]}')
    with pytest.raises(BadDataError) as caught:
        read_folder(root / "train", DatasetInfo())
    text = str(caught.value)
    for part in (
        "im_000.json: not valid json at line 1 column 13",
        "im_001.png: cannot read the image header",
        "im_002.png: no annotation",
        "im_003.json: no image",
        "im_004.png: im_004.jpg has the same stem",
        "im_005.json: the number NaN at line 1 column 14 is not allowed",
    ):
        assert part in text, part
    assert text.startswith("6 error(s)")


def test_truncated_images_are_found_before_the_first_step(tmp_path):
    root = draw_folder(tmp_path / "custom")
    path = root / "train" / "images" / "im_001.png"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadDataError, match=r"im_001\.png: cannot decode the image: image file is truncated"):
        load_custom_split(root, "train")
    split = load_custom_split(root, "train", on_bad_data="skip")
    assert len(split.indices) == 5 and 1 not in split.indices


def test_files_found_good_are_not_decoded_again(tmp_path, monkeypatch):
    from annotations import image_checks

    root = draw_folder(tmp_path / "custom")
    load_custom_split(root, "train", cache_dir=tmp_path / "c")
    decoded = []
    monkeypatch.setattr(image_checks, "read_image", lambda path, *_: decoded.append(path.name))
    load_custom_split(root, "train", cache_dir=tmp_path / "c")
    assert decoded == []
    path = root / "train" / "images" / "im_002.png"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path)
    load_custom_split(root, "train", cache_dir=tmp_path / "c")
    assert decoded == ["im_002.png"]


def test_links_in_the_image_folder_are_followed_and_counted(tmp_path, caplog):
    root = draw_folder(tmp_path / "custom")
    images = root / "train" / "images"
    elsewhere = tmp_path / "pool.png"
    shutil.move(images / "im_001.png", elsewhere)
    (images / "im_001.png").symlink_to(elsewhere)
    split = load_custom_split(root, "train")
    assert len(split.indices) == 6
    assert f"1 image(s) are links to files outside it, such as images/im_001.png -> {elsewhere}" in caplog.text


def test_sub_folders_are_read_and_ids_follow_their_paths(tmp_path):
    root = draw_folder(tmp_path / "custom")
    for kind, suffix in (("images", "png"), ("annotations", "json")):
        folder = root / "train" / kind
        for day, n in (("day2", 0), ("day1/noon", 3)):
            (folder / day).mkdir(parents=True)
            shutil.move(folder / f"im_00{n}.{suffix}", folder / day)
    annotations = read_folder(root / "train", DatasetInfo())
    assert [annotations.file_name(i) for i in range(3)] == [
        "images/day1/noon/im_003.png", "images/day2/im_000.png", "images/im_001.png",
    ]  # fmt: skip
    entry = json.loads((root / "train" / "annotations" / "day2" / "im_000.json").read_text())
    assert annotations.boxes_xywh[annotations.objects(1)][:, 0].tolist() == [b[0] for b in entry["bboxes"]]
    assert len(load_custom_split(root, "train").indices) == 6 and annotations.warnings == ()


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".jp2", ".avif", ".tga", ".QOI"])
def test_whatever_pillow_opens_is_a_picture(tmp_path, suffix):
    root = draw_folder(tmp_path / "custom")
    path = root / "train" / "images" / "im_001.png"
    Image.open(path).save(path.with_suffix(suffix))
    path.unlink()
    split = load_custom_split(root, "train")
    assert len(split.indices) == 6 and split.annotations.warnings == ()
    assert split.annotations.file_name(1) == f"images/im_001{suffix}"


def test_jsons_may_have_upper_case_suffixes(tmp_path):
    root = draw_folder(tmp_path / "custom")
    for path in (root / "train" / "annotations").iterdir():
        path.rename(path.with_suffix(".JSON"))
    annotations = read_folder(root / "train", DatasetInfo())
    assert len(annotations) == 6 and annotations.warnings == ()


def test_stems_pair_however_their_accents_are_stored(tmp_path):
    root = draw_folder(tmp_path / "custom")
    train = root / "train"
    (train / "images" / "im_000.png").rename(train / "images" / "U\u0308bung.png")
    (train / "annotations" / "im_000.json").rename(train / "annotations" / "\u00dcbung.json")
    assert len(read_folder(train, DatasetInfo())) == 6


def test_a_phones_original_beside_its_jpeg_is_named_not_taken(tmp_path):
    root = draw_folder(tmp_path / "custom")
    (root / "train" / "images" / "im_000.heic").write_bytes(b"\0\0\0\x18ftypheic")
    annotations = read_folder(root / "train", DatasetInfo())
    assert len(annotations) == 6
    (finding,) = annotations.warnings
    assert "im_000.png has the same stem, and the installed Pillow does not open .heic" in str(finding)


def test_every_file_that_is_not_used_is_named(tmp_path):
    root = draw_folder(tmp_path / "custom")
    train = root / "train"
    (train / "images" / "notes.txt").write_text("x")
    (train / "annotations" / "im_000.xml").write_text("x")
    (train / "images" / "round").symlink_to(train / "images")
    (train / "images" / ".DS_Store").write_text("x")
    results = train / "images" / "runs" / "predict-1"
    (results / "overlays").mkdir(parents=True)
    (results / "predictions.json").write_text("[]")
    shutil.copy(train / "images" / "im_000.png", results / "overlays" / "1.png")
    text = "\n".join(map(str, read_folder(train, DatasetInfo()).warnings))
    for part in ("notes.txt: not an image", "im_000.xml: not a json", "round: a link to a folder above it",
                 "predict-1: results of predict.py"):  # fmt: skip
        assert part in text, part
    assert len(text.splitlines()) == 4


def test_a_missing_partner_says_which_file_may_be_meant(tmp_path):
    root = draw_folder(tmp_path / "custom")
    images = root / "train" / "images"
    (images / "day2").mkdir()
    shutil.move(images / "im_000.png", images / "day2")
    (images / "im_001.png").rename(images / "IM_001.png")
    (images / "im_002.png").unlink()
    (images / "im_002.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(BadDataError) as caught:
        read_folder(root / "train", DatasetInfo())
    lines = str(caught.value).splitlines()
    for place, part in (
        ("im_000.json: no image", "day2/im_000.png lies in another sub-folder"),
        ("im_001.json: no image", "IM_001.png differs in upper and lower case"),
        ("im_002.heic: ", "the installed Pillow does not open .heic files; save it as JPEG or PNG"),
    ):
        assert [line for line in lines if place in line and part in line], (place, part, lines)


BAD_INFO = {
    "unknown entry": ({"class": ["a"]}, "unknown entry 'class'"),
    "same class twice": ({"classes": ["a", "a"]}, "expected different names"),
    "pair of unknown point": ({"keypoint_names": ["a"], "flip_pairs": [["a", "b"]]}, "'b' is not among keypoint_names"),
    "no list of pairs": (
        {"flip_pairs": 5},
        "flip_pairs: expected a list of pairs, got 5; give pairs of keypoint names",
    ),
    "a pair of three": ({"flip_pairs": [[0, 1], [0, 1, 2]]}, r"a list of pairs, got \[0, 1, 2\] at position 1; give"),
    "pair of a number": ({"flip_pairs": [0, 1]}, "flip_pairs: expected a list of pairs, got 0 at position 0"),
    "half a point": ({"flip_pairs": [[0, 0.5]]}, "flip_pairs: expected a list of pairs, but 0.5 is no keypoint"),
    "sigma of zero": ({"oks_sigmas": [0.1, 0]}, "give one positive number per keypoint"),
    "a list": ([], "expected an object"),
}


# An entry -> (value, what is wrong with it); objects have two keypoints.
BAD_KEYS = {
    "classes": (["a", "a"], r"dataset\.json: classes: expected different names"),
    "keypoint_names": (
        ["a", "b", "c"],
        r"dataset\.json: keypoint_names: 3 keypoint names for objects with 2 keypoints",
    ),
    "skeleton": ([[0, "x"]], r"dataset\.json: skeleton: .*'x' is not among keypoint_names; .*nothing here needs it"),
    "flip_pairs": ([[0, 1], [1, 0]], r"dataset\.json: flip_pairs: flip pair \[1, 0\]: a keypoint is in two pairs"),
    "oks_sigmas": ([0.1, 0.1, 0.1], r"dataset\.json: oks_sigmas: 3 OKS sigmas for objects with 2 keypoints"),
    "clases": (["a"], r"dataset\.json: unknown entry 'clases'"),
}


@pytest.mark.parametrize(("task", "needed"), [("keypoint", 6), ("box", 3)])
def test_all_faults_of_the_dataset_file_are_reported_at_their_keys_in_one_run(tmp_path, caplog, task, needed):
    """Faults of what the model does not learn, and of the lines in drawings, are warnings."""
    root = draw_folder(tmp_path / "custom", info={key: value for key, (value, _) in BAD_KEYS.items()})
    edit(root, lambda e: e["bboxes"].__setitem__(0, [50, 10, 20, 40]))
    with pytest.raises(BadDataError) as caught:
        load_data(Source("custom", root), task)
    text = str(caught.value)
    for key in BAD_KEYS if task == "keypoint" else ("classes", "clases"):
        assert key == "skeleton" or re.search(BAD_KEYS[key][1], text), (key, text)
    assert "im_000.json: bboxes[0]" in text and text.startswith(f"{needed} error(s)") and "categories[" not in text


def test_faults_of_what_is_not_learnt_are_warnings(tmp_path, caplog):
    info = {"keypoint_names": ["a", 1], "skeleton": [[0, "q"]], "flip_pairs": 5, "oks_sigmas": [0.1, 0, 10**400]}
    root = draw_folder(tmp_path / "custom", info=info)
    with caplog.at_level("WARNING"):
        assert load_data(Source("custom", root), "box").train.annotations.num_objects
    assert "keypoint_names: ['a', 1], a number as a name; taken as what it says" in caplog.text
    for key in ("skeleton", "flip_pairs", "oks_sigmas"):
        assert f"dataset.json: {key}: " in caplog.text, key
    with pytest.raises(BadDataError, match="2 error"):
        load_data(Source("custom", root), "keypoint")
    (root / "dataset.json").write_text(json.dumps({"skeleton": [[0, 5]]}))
    with caplog.at_level("WARNING"):
        assert load_data(Source("custom", root), "keypoint").train.skeleton.links == ()
    assert "links points 0 and 5" in caplog.text


def test_a_wrong_list_of_names_is_one_fault_where_pairs_go_by_name(tmp_path):
    info = {"keypoint_names": ["a", "a"], "skeleton": [["a", "b"]], "flip_pairs": [["a", "b"]]}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(BadDataError, match=r"^1 error\(s\) .*\n.*dataset\.json: keypoint_names: expected different"):
        read_dataset_info(tmp_path)


@pytest.mark.parametrize("name", BAD_INFO)
def test_a_bad_dataset_file_is_refused(tmp_path, name):
    value, message = BAD_INFO[name]
    (tmp_path / "dataset.json").write_text(json.dumps(value))
    with pytest.raises(BadDataError, match=message):
        read_dataset_info(tmp_path)


def run(root, *flags, model="keypointrcnn_resnet50_fpn", batch=2):
    common = [*QUICK, "--dataset", "custom", "--data-path", root, "--model", model, "--batch-size", batch]
    size = [] if model.startswith("ssd") else ["--min-size", "48", "--max-size", "64"]
    return train.run_as_command([str(flag) for flag in (*common, *size, *flags)])


@pytest.mark.slow
def test_boxes_alone_train_a_box_model_and_background_images_stay(tmp_path, capsys, monkeypatch):
    use_thin_models(monkeypatch)
    root = draw_folder(tmp_path / "custom", num_keypoints=0)
    assert run(root, model="fasterrcnn_mobilenet_v3_large_fpn") == 0
    assert "training on 6 of 6 images" in capsys.readouterr().out
    assert (root / "result" / "weights" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_polygons_train_mask_rcnn(tmp_path, monkeypatch):
    use_thin_models(monkeypatch)
    root = draw_folder(tmp_path / "custom", num_keypoints=0, polygons=True)
    assert run(root, model="maskrcnn_resnet50_fpn") == 0
    assert "segm" in lines(root / "result")[0]


def test_without_polygons_mask_rcnn_says_so(tmp_path, capsys):
    root = draw_folder(tmp_path / "custom", num_keypoints=0)
    assert run(root, model="maskrcnn_resnet50_fpn") == 1
    assert "no segmentation, but masks are used" in capsys.readouterr().err


@pytest.mark.slow
def test_three_classes_are_reported_by_name(tmp_path):
    root = draw_folder(tmp_path / "custom", classes=["cat", "dog", "owl"], info={"classes": ["cat", "dog", "owl"]})
    assert run(root, model="ssdlite320_mobilenet_v3_large") == 0
    assert list(lines(root / "result")[0]["per_class"]["bbox"]) == ["cat", "dog", "owl"]
    content = torch.load(root / "result" / "weights" / "checkpoint.pth", weights_only=True)
    assert content["dataset"]["label_names"] == ["cat", "dog", "owl"] and content["model_spec"]["num_classes"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("num_keypoints", [1, 21])
def test_any_number_of_keypoints_trains_scores_and_repeats_its_score(tmp_path, capsys, num_keypoints, monkeypatch):
    use_thin_models(monkeypatch)
    root = draw_folder(tmp_path / "custom", num_images=3, num_keypoints=num_keypoints)
    assert run(root, "--kpt-oks-sigmas", "0.07") == 0
    out = capsys.readouterr().out
    assert "no mirroring in training" in out and "OKS sigmas from --kpt-oks-sigmas: 0.07" in out
    (line,) = lines(root / "result")
    assert line["settings"]["kpt_oks_sigmas"] == [0.07] * num_keypoints
    assert line["settings"]["oks_area"] == "annotation"
    checkpoint = root / "result" / "weights" / "checkpoint.pth"
    content = torch.load(checkpoint, weights_only=True)
    assert content["model_spec"]["num_keypoints"] == num_keypoints
    shutil.rmtree(root / "train")
    again = tmp_path / "again"
    assert run(root, "--test-only", "--resume", checkpoint, "--kpt-oks-sigmas", "0.07", "--output-dir", again) == 0
    (repeated,) = lines(again)
    assert repeated["keypoints"] == line["keypoints"] and repeated["bbox"] == line["bbox"]
    assert repeated["keypoint_errors"] == line["keypoint_errors"]
    written = [(folder / "predictions_keypoints.json").read_bytes() for folder in (root / "result", again)]
    assert written[0] == written[1] and len(written[0]) > 1000


def test_a_wrong_number_of_sigmas_is_refused(tmp_path, capsys):
    root = draw_folder(tmp_path / "custom")
    assert run(root, "--kpt-oks-sigmas", "0.1", "0.1", "0.1") == 1
    assert "3 OKS sigmas (from --kpt-oks-sigmas) for objects with 2 keypoints" in capsys.readouterr().err


def sided_folder(tmp_path, info):
    """Keypoints nose, left, right, with left always on the picture's right."""
    root = draw_folder(tmp_path / "custom", num_images=20, num_keypoints=3, info=info)
    for index in range(20):

        def change(entry):
            for k, (x1, y1, x2, y2) in enumerate(entry["bboxes"]):
                w, h = x2 - x1, y2 - y1
                at = [(0.5, 0.1), (0.85, 0.6), (0.15, 0.6)]
                entry["keypoints"][k] = [[int(x1 + a * w), int(y1 + b * h), 2] for a, b in at]

        edit(root, change, index=index)
    return root


@pytest.mark.parametrize(
    ("info", "expected", "order"),
    [
        ({"flip_pairs": [[1, 2]]}, "swap in a mirror: 1-2", [0, 2, 1]),
        ({"keypoint_names": ["nose", "left_wing", "right_wing"]}, "swap in a mirror: left_wing-right_wing", [0, 2, 1]),
    ],
)
def test_flip_pairs_are_taken_or_inferred(tmp_path, caplog, info, expected, order):
    caplog.set_level(logging.INFO)
    data = load_data(Source("custom", sided_folder(tmp_path, info)), "keypoint")
    assert expected in caplog.text and data.flip_order.tolist() == order


def test_no_flip_pairs_are_taken_where_no_point_has_a_side(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = load_data(Source("custom", draw_folder(tmp_path / "custom", info={"flip_pairs": []})), "keypoint")
    assert "swap in a mirror: none" in caplog.text and data.flip_order.tolist() == [0, 1]


SIDED = ["nose", "left_wing", "right_wing"]
# What dataset.json says -> what is wrong with it.
IGNORING_MAPS = {
    "names imply pairs": (
        {"keypoint_names": SIDED, "flip_pairs": []},
        r"dataset\.json: flip_pairs: expected \['left_wing', 'right_wing'\] among them, as keypoint_names say, "
        r"got no pairs; leave flip_pairs out",
    ),
    "names imply other pairs": (
        {"keypoint_names": SIDED, "flip_pairs": [["nose", "left_wing"]]},
        r"dataset\.json: flip_pairs: expected \['left_wing', 'right_wing'\] .*got \[0, 1\]",
    ),
    "labels show pairs": (
        {"flip_pairs": []},
        r"train: flip_pairs look wrong: expected \[1, 2\] .*add what is missing, or leave flip_pairs out",
    ),
}


@pytest.mark.parametrize("name", IGNORING_MAPS)
def test_a_mirror_map_that_ignores_sides_stops_training_dry_run_and_doctor_alike(tmp_path, capsys, name):
    info, expected = IGNORING_MAPS[name]
    root = sided_folder(tmp_path, info)
    doctor = ["--dataset", "custom", "--data-path", str(root), "--model", "keypointrcnn_resnet50_fpn"]
    assert check_dataset.run(doctor) == 1
    assert re.search(expected, capsys.readouterr().out.partition("ERRORS")[2])
    assert run(root, "--dry-run") == 1
    assert re.search(expected, capsys.readouterr().err)
    assert run(root, "--output-dir", "") == 1
    assert re.search(expected, capsys.readouterr().err)


def test_wrong_flip_pairs_are_refused(tmp_path, capsys):
    root = sided_folder(tmp_path, {"flip_pairs": [[0, 1]]})
    assert run(root, "--eval-every", "0", "--output-dir", "", "--epochs", "1") == 1
    assert "flip_pairs look wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_real_photographs_train_on_two_processes_and_repeat_their_score(glue_tubes):
    """A thin keypoint R-CNN on the glue tubes, at a small size, with a few images for the time."""
    for split, keep in (("train", 6), ("test", 4)):
        for path in sorted((glue_tubes / split / "annotations").iterdir())[keep:]:
            path.unlink()
            (glue_tubes / split / "images" / f"{path.stem}.jpg").unlink()
    flags = ["--dataset", "custom", "--data-path", glue_tubes, "--model", "keypointrcnn_resnet50_fpn"]
    flags += ["--device", "cpu", "--min-size", "96", "--max-size", "160", "--workers", "1", "--epochs", "1"]
    flags += ["--batch-size", "1"]
    assert run_on_ranks(2, train_on_rank, flags, True) == [0, 0]
    result = glue_tubes / "result"
    (line,) = lines(result)
    assert {"bbox", "keypoints", "keypoint_errors"} <= set(line)
    assert line["keypoint_errors"]["all"]["labelled"] > 0
    again = result / "again"
    resume = ["--test-only", "--resume", result / "weights" / "checkpoint.pth", "--output-dir", again]
    assert run_on_ranks(1, train_on_rank, [*flags, *resume], True) == [0]
    (repeated,) = lines(again)
    assert repeated["bbox"] == line["bbox"] and repeated["keypoints"] == line["keypoints"]


def test_the_real_folder_gives_no_false_alarm(glue_tubes):
    split = load_custom_split(glue_tubes, "train")
    assert len(split.annotations) == 89 and split.annotations.num_keypoints == 2
    assert split.annotations.warnings == ()


@pytest.mark.parametrize(
    ("change", "info", "expected"),
    [
        (lambda e: e.update(labels=[300_000] * len(e["bboxes"])), None, "label 300000 would make as many classes"),
    ],
)
def test_what_would_fail_later_is_refused(tmp_path, capsys, change, info, expected):
    root = draw_folder(tmp_path / "custom", info=info)
    edit(root, change)
    assert run(root) == 1
    assert expected in capsys.readouterr().err


def test_a_name_that_seems_to_have_a_side_stops_no_training(tmp_path, caplog):
    root = draw_folder(tmp_path / "custom", info={"keypoint_names": ["L1", "L2"]})
    data = load_data(Source("custom", root), "keypoint")
    assert data.flip_order is None and "'L1' has no partner" in caplog.text
    assert load_data(Source("custom", root), "box").train is not None


def test_a_file_name_that_is_not_text_is_named(tmp_path):
    root = draw_folder(tmp_path / "custom")
    os.link(os.fsencode(root / "train/images/im_000.png"), os.fsencode(root / "train/images") + b"/bad\xff.png")
    with pytest.raises(BadDataError, match=r"bad\\udcff\.png': the file's name is not UTF-8"):
        load_custom_split(root, "train")


def test_train_and_test_call_a_class_by_one_name(drawn_coco):
    path = drawn_coco / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"bicycle"', '"tricycle"'))
    with pytest.raises(ValueError, match="category 2 is 'tricycle', but 'bicycle' in .*instances_train2017.json"):
        load_data(Source("coco", drawn_coco), "box")


def test_entries_with_a_value_per_box_that_are_not_read_are_named(tmp_path):
    root = draw_folder(tmp_path / "custom", num_images=3)
    for index in range(2):
        edit(root, lambda e: e.update(classes=["x"] * len(e["bboxes"]), tags=[], width=80), index=index)
    messages = [str(warning) for warning in read_folder(root / "train", DatasetInfo()).warnings]
    (message,) = [text for text in messages if "unknown entry" in text]
    assert (
        "im_000.json: unknown entry 'classes' with a value for every box, and 1 more like it; it is not read" in message
    )


def test_a_folder_of_other_files_than_jsons_is_one_line(tmp_path):
    root = draw_folder(tmp_path / "custom", num_images=3)
    for path in (root / "train" / "annotations").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(
        BadDataError, match="no json for any of 3 pictures; the folder holds 3 other.*im_000.txt"
    ) as caught:
        read_folder(root / "train", DatasetInfo())
    assert len(caught.value.findings) == 3 + 1  # a stray file is a warning


def test_dataset_json_in_other_letters_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "Dataset.JSON").write_text('{"classes": ["dog", "cat"]}')
    with pytest.raises(BadDataError, match=r"Dataset\.JSON: expected the name dataset\.json; rename the file"):
        read_dataset_info(tmp_path)


def test_a_label_in_other_letters_than_the_class_says_so(tmp_path):
    root = draw_folder(tmp_path / "custom", num_images=2)
    edit(root, lambda e: e.update(labels=["Bolt "] * len(e["bboxes"])))
    with pytest.raises(BadDataError, match="label 'Bolt '; differs from 'bolt' in upper and lower case or blanks"):
        read_folder(root / "train", DatasetInfo(classes=("nut", "bolt")))


def read_lines(split, **options):
    with pytest.raises(BadDataError) as caught:
        read_folder(split, DatasetInfo(), **options)
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("on_bad_data", ["error", "skip"])
def test_jsons_of_the_other_split_are_said_once_for_all(tmp_path, on_bad_data):
    root = draw_folder(tmp_path / "custom", num_images=4)
    for path in (root / "test" / "images").iterdir():
        path.rename(path.with_name(f"t_{path.name}"))
    for path in (root / "test" / "annotations").iterdir():
        path.rename(path.with_name(f"t_{path.name}"))
    (root / "train" / "annotations").rename(root / "x")
    (root / "test" / "annotations").rename(root / "train" / "annotations")
    (root / "x").rename(root / "test" / "annotations")
    jsons, pictures = read_lines(root / "train", on_bad_data=on_bad_data)
    start = f"{root / 'train' / 'annotations'}: 4 of 4 belong to no file, such as "
    assert jsons.startswith(start) and f"; {root / 'test' / 'images'} has them: are files of two splits" in jsons
    assert f"images: 4 of 4 belong to no file, such as {root / 'train' / 'images' / 'im_000.png'}: no anno" in pictures
    assert f"; {root / 'test' / 'annotations'} has them: " in pictures
    (root / "test" / "annotations").rename(root / "gone")
    assert '; add it ({"bboxes": []} for' in read_lines(root / "train", on_bad_data=on_bad_data)[1]


def test_a_coco_file_among_the_jsons_is_called_that_with_the_flags_for_it(tmp_path):
    root = draw_folder(tmp_path / "custom", num_images=4)
    coco = root / "train" / "annotations" / "instances.json"
    coco.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    expected = f"{coco}: expected the json of one picture, got a COCO annotation file; train on it with --dataset coco "
    expected += f"--train-annotations {coco} --train-images {root / 'train' / 'images'}"
    (line,) = read_lines(root / "train")
    assert line.startswith(expected)
    for path in (root / "train" / "annotations").glob("im_*"):
        path.unlink()
    (line,) = read_lines(root / "train")
    assert line.startswith(expected)
    coco.rename(coco.with_name("im_000.json"))
    for path in (root / "train" / "images").glob("im_00[123].png"):
        path.unlink()
    (line,) = read_lines(root / "train")
    assert (
        "expected an object with a list 'bboxes', got a COCO annotation file; train on it with --dataset coco" in line
    )


def test_outlines_without_boxes_have_the_boxes_around_them(tmp_path):
    root = draw_folder(tmp_path / "custom", polygons=True, num_keypoints=0)
    before = read_folder(root / "train", DatasetInfo())
    edit(root, lambda e: e.pop("bboxes"))
    edit(root, lambda e: e.update(bboxes=[None] * len(e["bboxes"])), index=1)
    after = read_folder(root / "train", DatasetInfo())
    assert after.boxes_xywh.tolist() == before.boxes_xywh.tolist()
    (warning,) = map(str, after.warnings)
    assert "an object with a mask and no box" in warning and "the box around the mask is taken" in warning


def test_classes_that_differ_in_case_only_are_warned_of(tmp_path, caplog):
    root = draw_folder(tmp_path / "custom", classes=["nut", "Bolt"], num_keypoints=0)
    load_data(Source("custom", root), "box")
    assert "names that differ in case" not in caplog.text
    edit(root, lambda e: e.update(labels=["bolt "] * len(e["bboxes"])))
    load_data(Source("custom", root), "box")
    assert (
        "1 group(s) of classes have names that differ in case, blanks or dashes only: 'Bolt' and 'bolt '" in caplog.text
    )


def test_a_file_in_a_folder_s_place_is_called_that(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"images: no such folder, as .*x\.json is a file; expected"):
        load_data(Source("custom", tmp_path / "x.json"), "box")
    with pytest.raises(FileNotFoundError, match=r"exists \(a file, expected a folder\); set --data-path"):
        load_data(Source("coco", tmp_path / "x.json"), "box")


def test_a_custom_folder_without_its_flag_is_told_of_it(tmp_path):
    (tmp_path / "train" / "annotations").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="exists; add --dataset custom, whose folders these look like$"):
        load_data(Source("coco", tmp_path), "box")


def test_a_folder_in_place_of_a_coco_file_is_told_what_writes_one(tmp_path):
    with pytest.raises(
        BadDataError, match="a folder, but expected one file in COCO's format; check_dataset.py --write"
    ):
        read_coco(tmp_path)
