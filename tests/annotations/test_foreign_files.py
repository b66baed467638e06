"""What lies in an annotation or results file's place is called what it is, with what to do."""

import bz2
import gzip
import io
import json
import pickle
import zipfile

import pytest
import torch

from annotations.findings import BadDataError
from coco_utils import read_coco, read_json
from custom_dataset import DatasetInfo, read_folder
from evaluation.results_files import read_results
from helpers.drawn import draw_folder


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.json", "[]")
    return file.getvalue()


def checkpoint():
    file = io.BytesIO()
    torch.save({"model": torch.ones(3)}, file)
    return file.getvalue()


NO_JSON = {
    "empty": (b"", "line 1 column 1: the file is empty; copy or load it again"),
    "gzip": (gzip.compress(b"{}"), "packed with gzip, expected json; unpack it first"),
    "bzip2": (bz2.compress(b"{}"), "packed with bzip2, expected json; unpack it first"),
    "zip": (zipped(), r"a zip archive of 1 file\(s\), a.json, expected json; unpack it first"),
    "checkpoint": (checkpoint(), "a checkpoint of torch, expected json"),
    "pickle": (pickle.dumps([1.5]), "pickled Python objects, expected json"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a picture \(PNG\), expected json; give the json file"),
    "UTF-16": ("[1]".encode("utf-16"), "text in UTF-16, expected json; save it as UTF-8"),
    "UTF-16 without a mark": ('{"\u00e4": 1}'.encode("utf-16-le"), "text in UTF-16, expected json; save it as UTF-8"),
    "Latin-1": ('["\u00e4"]'.encode("latin-1"), r"not UTF-8 text \(byte 2\); save the file as UTF-8"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a git LFS pointer.*git lfs pull"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page, not the file itself"),
    "XML": (b"<?xml version='1.0'?><annotation/>", "XML text; give the json file"),
    "table": (b"image_id,score\n1,0.5\n", "line 1 column 1: a text file; give the json file"),
    "a json per line": (b'{"a": 1}\n{"a": 2}\n', "line 2 column 1: a second value, as in files with one json per line"),
    "cut off": (b'[{"a": 1}, {"b', "the text ends in the middle; the file is cut off"),
    "comma": (b"[1, 2,\n]", r"line \d column \d: a comma before .*; remove the comma"),
    "comment": (b"// boxes\n[1]", "line 1 column 1: json has no comments; remove them"),
    "comment inside": (b"[1, # one\n 2]", "line 1 column 5: json has no comments"),
    "Python's print": (b"[{'a': 1}]", "line 1 column 3: Python's way to print values; write the file with json.dump"),
    "Python's None": (b'[{"a": None}]', "line 1 column 8: Python's way to print values"),
}


@pytest.mark.parametrize("name", NO_JSON)
def test_a_file_that_is_no_json_is_called_what_it_is(tmp_path, name):
    data, message = NO_JSON[name]
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BadDataError, match=message):
        read_json(tmp_path / "a.json")


RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
OTHER_TOOLS = {
    "LabelMe": ({"version": "5", "shapes": [], "imagePath": "a.png"}, "LabelMe's json of one picture"),
    "VIA project": ({"_via_settings": {}, "_via_img_metadata": {}}, "a project of the VGG Image Annotator"),
    "VIA": ({"a.png12": {"filename": "a.png", "regions": []}}, "annotations of the VGG Image Annotator"),
    "FiftyOne": ({"samples": [{"filepath": "a.png"}]}, "a dataset of FiftyOne"),
    "Datumaro": ({"categories": {"label": {}}, "items": []}, "Datumaro's json"),
    "VoTT": ({"asset": {}, "regions": []}, "VoTT's json"),
    "GeoJSON": ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
    "Supervisely": ({"size": {}, "objects": []}, "Supervisely's json"),
    "Label Studio": ([{"id": 1, "data": {"image": "a"}, "annotations": []}], "Label Studio's own json"),
    "CreateML": ([{"image": "a.png", "annotations": []}], "CreateML's json"),
    "Detectron2": ([{"file_name": "a", "image_id": 1, "annotations": []}], "as Detectron2 registers them"),
}


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_the_json_of_another_tool_is_called_by_its_name(tmp_path, name):
    content, message = OTHER_TOOLS[name]
    root = draw_folder(tmp_path / "custom", num_images=1)
    (own,) = (root / "train" / "annotations").iterdir()
    own.write_text(json.dumps(content))
    for read in (read_coco, read_results, lambda path: read_folder(root / "train", DatasetInfo())):
        with pytest.raises(BadDataError, match=rf"{own.name}: expected .*, got .*{message}.*; \w"):
            read(own)


def test_truth_and_results_in_each_other_s_place_are_told_apart(tmp_path):
    truth = {"images": [{"id": 1, "file_name": "a", "height": 9, "width": 9}], "annotations": [], "categories": []}
    for read, content, message in (
        (read_results, truth, "expected a list of results, got a COCO annotation file; give the file of results here"),
        (read_coco, [RESULT], "got a list of results, as detectors write them; give the annotation file here"),
        (read_coco, [{"image_id": 1, "category_id": 1}], "a list of annotations alone; ground truth has it under"),
        (read_coco, {"bboxes": []}, "the json of one picture of a custom folder; --dataset custom"),
        (
            read_results,
            [{"image_id": 1, "conf": 1}],
            "1 entries without a score, the first with 'image_id', 'conf'; call 'conf' 'score' if it says how sure",
        ),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(BadDataError, match=message):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("key", ["annotations", "predictions"])
def test_results_under_a_key_of_their_own_are_taken_with_a_warning(tmp_path, caplog, key):
    (tmp_path / "a.json").write_text(json.dumps({"info": [], key: [RESULT]}))
    records, _ = read_results(tmp_path / "a.json")
    assert records == [RESULT] and f"the results stand under '{key}'" in caplog.text
