"""The table of fields: what is taken in another form means the same, what is not needed may be broken, docs print it."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from annotations.fields import FIELDS, format_field_table
from annotations.findings import BadDataError
from annotations.forms import number_of_id, short
from coco_utils import read_coco
from helpers.drawn import draw_folder
from loading.splits import Source, label_map_for, load_data

ALL = ("segm", "keypoints")


def content():
    """A valid file with everything in it; one image has two objects."""
    point_sets = ([10, 12, 2, 14, 20, 1], [30, 22, 2, 0, 0, 0])
    boxes = ([5, 6, 20, 30], [25, 20, 20, 10])
    objects = [
        {
            "id": n + 1, "image_id": 7, "category_id": n + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            "keypoints": points, "num_keypoints": 2 - n,
            "segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3]]],
        }
        for n, (box, points) in enumerate(zip(boxes, point_sets))
    ]  # fmt: skip
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 50, "width": 60}],
        "annotations": objects,
        "categories": [
            {"id": 1, "name": "a", "keypoints": ["p", "q"], "skeleton": [[1, 2]]},
            {"id": 2, "name": "b"},
        ],
    }


def read(tmp_path, value, uses=ALL, **options):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(value))
    return read_coco(path, uses=uses, **options)


def each(section, name, change):
    """Return an edit of the field ``name`` in every record of ``section`` that has it."""

    def edit(value):
        for record in value[section]:
            if name in record:
                record[name] = change(record[name])

    return edit


def pairs(numbers, size):
    return [numbers[k : k + size] for k in range(0, len(numbers), size)]


OTHER_FORMS = {
    "digits as image ids": (each("images", "id", str), "id is '7', digits as text"),
    "digits as references": (each("annotations", "image_id", str), "image_id is '7', digits as text, and 1 more like it"),
    "floats as ids": (each("annotations", "category_id", float), "category_id is 1.0, a whole number with a decimal point"),
    "float sizes": (each("images", "height", float), "height is 50.0, a whole number"),
    "digits as size": (each("images", "width", str), "width is '60', digits as text"),
    "digits in boxes": (each("annotations", "bbox", lambda b: [str(v) for v in b]), "bbox is .*, digits as text"),
    "digits as area": (each("annotations", "area", str), "area is '600', digits as text"),
    "false as crowd flag": (each("annotations", "iscrowd", bool), "iscrowd is False, true or false"),
    "digits as crowd flag": (each("annotations", "iscrowd", str), "iscrowd is '0', digits as text"),
    "nested keypoints": (each("annotations", "keypoints", lambda k: pairs(k, 3)), "keypoints is .*brackets of their own"),
    "nested polygons": (
        each("annotations", "segmentation", lambda s: [pairs(p, 2) for p in s]), "segmentation is .*brackets of their own"
    ),
    "points as polygon": (
        each("annotations", "segmentation", lambda s: pairs(s[0], 2)), "segmentation is .*brackets of their own"
    ),
    "flat polygon": (each("annotations", "segmentation", lambda s: s[0]), "segmentation is .*without the outer brackets"),
    "digits in polygons": (
        each("annotations", "segmentation", lambda s: [[str(v) for v in p] for p in s]), "segmentation is .*digits as text"
    ),
    "skeleton of floats": (each("categories", "skeleton", lambda s: [[1.0, 2.0]]), "skeleton is .*decimal point"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_value_in_another_form_means_the_same_and_is_warned_of_once(tmp_path, name):
    change, message = OTHER_FORMS[name]
    plain = read(tmp_path, content())
    assert plain.warnings == ()
    value = content()
    change(value)
    other = read(tmp_path, value)
    for array in ("image_ids", "heights", "widths", "boxes_xywh", "category_ids", "areas", "is_crowd", "keypoints"):
        assert (getattr(other, array) == getattr(plain, array)).all(), array
    assert (other.polygon_points == plain.polygon_points).all() and (other.polygon_starts == plain.polygon_starts).all()
    assert other.skeleton == plain.skeleton and other.categories == plain.categories
    (warning,) = other.warnings
    assert re.search(message, warning.example), warning


NOT_NEEDED = {
    "masks": (each("annotations", "segmentation", lambda s: 5), ("keypoints",), "segmentation is 5"),
    "mask of another size": (
        each("annotations", "segmentation", lambda s: {"size": [5, 5], "counts": [25]}),
        (),
        "the mask has size [5, 5]",
    ),
    "keypoints": (each("annotations", "keypoints", lambda k: "x"), ("segm",), "keypoints is 'x'"),
    "visibility": (each("annotations", "keypoints", lambda k: [1, 2, 3, 4, 5, 6]), (), "visibilities 3, 6"),
    "names": (each("categories", "keypoints", lambda k: 2), (), "keypoints is 2"),
    "skeleton": (each("categories", "skeleton", lambda s: [[16, 14]]), ALL, "skeleton [(16, 14)]"),
    "annotation id": (each("annotations", "id", lambda s: [s]), ALL, "id is [1]"),
    "num_keypoints": (each("annotations", "num_keypoints", lambda s: "many"), ALL, "num_keypoints is 'many'"),
}


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_is_not_needed_may_be_broken_with_one_warning(tmp_path, name):
    change, uses, problem = NOT_NEEDED[name]
    value = content()
    change(value)
    annotations = read(tmp_path, value, uses)
    assert annotations.num_objects == 2
    (warning,) = annotations.warnings
    assert problem in warning.problem and "nothing here needs it" in warning.remedy


@pytest.mark.parametrize("name", [name for name, (_, uses, _) in NOT_NEEDED.items() if set(uses) != set(ALL)])
def test_what_is_needed_must_not_be_broken(tmp_path, name):
    change, _, problem = NOT_NEEDED[name]
    value = content()
    change(value)
    with pytest.raises(BadDataError) as caught:
        read(tmp_path, value)
    assert problem in str(caught.value)


def test_an_object_with_three_faults_gets_one_line(tmp_path):
    value = content()
    value["annotations"][0].update(bbox=[1, 2], area="big", keypoints=7, segmentation=5)
    with pytest.raises(BadDataError, match=r"^1 error\(s\)"):
        read(tmp_path, value)


def test_ids_of_text_get_the_same_numbers_in_every_file_and_keep_their_text(tmp_path):
    value = content()
    value["images"].append({"id": "007", "file_name": "b.jpg", "height": 50, "width": 60})
    for record in value["annotations"]:
        record["category_id"] = f"class-{record['category_id']}"
    value["annotations"][1]["image_id"] = "007"
    for record in value["categories"]:
        record["id"] = f"class-{record['id']}"
    annotations = read(tmp_path, value)
    assert annotations.image_ids.tolist() == [7, number_of_id("007")]
    assert annotations.own_id(number_of_id("007")) == "007" and annotations.own_id(7) == 7
    assert annotations.object_starts.tolist() == [0, 1, 2]
    alone = copy.deepcopy(value)
    alone["categories"].pop(0)
    alone["annotations"].pop(0)
    assert set(read(tmp_path, alone).category_ids.tolist()) <= set(annotations.category_ids.tolist())
    (warning,) = annotations.warnings
    assert "text that is no number, and 5 more like it" in warning.problem and "carry the text" in warning.remedy
    labels = label_map_for(annotations)
    assert dict(labels.id_texts) == {number_of_id(f"class-{k}"): f"class-{k}" for k in (1, 2)}
    again = type(labels).from_plain(json.loads(json.dumps(labels.to_plain())))
    assert again == labels


def test_one_class_with_another_number_of_keypoints_is_one_line(tmp_path):
    value = content()
    for n in range(5):
        value["annotations"].append({**value["annotations"][1], "id": 10 + n, "keypoints": [30, 22, 2]})
    value["annotations"].pop(1)
    with pytest.raises(
        BadDataError, match=r"^1 error\(s\).*\n.*5 object\(s\) of class 'b' have 1 keypoints, those of 'a' 2"
    ):
        read(tmp_path, value)
    skipped = read(tmp_path, value, on_bad_data="skip")
    assert skipped.num_objects == 1 and "left out" in skipped.warnings[0].remedy


def test_num_keypoints_that_contradict_the_points_are_remarked(tmp_path):
    value = content()
    value["annotations"][0]["num_keypoints"] = 0
    annotations = read(tmp_path, value)
    assert annotations.num_labelled_keypoints().tolist() == [2, 1]
    assert "num_keypoints is 0, but 2 points have v > 0" in annotations.warnings[0].problem


def test_two_entries_of_one_file_and_misspelt_entries_are_remarked(tmp_path):
    value = content()
    value["images"].append({**value["images"][0], "id": 8})
    value["annotations"][0]["isCrowd"] = value["annotations"][0].pop("iscrowd")
    value["annotations"][1]["isCrowd"] = value["annotations"][1].pop("iscrowd")
    value["annotations"][0]["attributes"] = {}
    twice, key = sorted(read(tmp_path, value).warnings, key=lambda finding: finding.kind)
    assert "images[1]: file_name 'a.jpg' is also that of" in twice.example and "used twice" in twice.remedy
    assert "unknown entry 'isCrowd', and 1 more like it" in key.problem and "is 'iscrowd' meant?" in key.remedy


def test_a_misspelt_entry_of_a_custom_json_is_remarked(tmp_path, caplog):
    root = draw_folder(tmp_path / "custom")
    path = root / "train" / "annotations" / "im_000.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "label": ["cat"] * len(entry["bboxes"]), "camera": 3}))
    with caplog.at_level("WARNING"):
        load_data(Source("custom", root), "box")
    assert (
        "unknown entry 'label' with a value for every box; it is not read; is 'labels' meant?" in caplog.text
        and "camera" not in caplog.text
    )


def test_numbers_among_names_have_no_meaning_without_a_dataset_json(tmp_path):
    root = draw_folder(tmp_path / "custom")
    for k, path in enumerate(sorted((root / "train" / "annotations").iterdir())):
        entry = json.loads(path.read_text())
        entry["labels"] = ["bolt" if k else 1] * len(entry["bboxes"])
        path.write_text(json.dumps(entry))
    with pytest.raises(BadDataError, match="label 1; expected one of bolt: numbers and names are mixed"):
        load_data(Source("custom", root), "box")


def test_values_are_shown_shortly_whatever_they_are():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 10**4000, {"a": {"b": {"c": {"d": [1]}}}}, "\ud800", list(range(10**6)), None):
        assert 0 < len(short(value)) <= 80 and short(value).encode()


def test_the_docs_print_the_table():
    lines = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text().splitlines()
    table = format_field_table()
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert len(table) == len(FIELDS) + 2


def test_empty_columns_and_records_are_read(tmp_path):
    value = content()
    value["annotations"] = []
    annotations = read(tmp_path, value)
    assert (
        annotations.num_objects == 0 and annotations.boxes_xywh.shape == (0, 4) and np.isfinite(annotations.areas).all()
    )
    with pytest.raises(BadDataError, match="objects, but no images"):
        read(tmp_path, {**content(), "images": []})
