"""Anything that json can hold gets an answer: valid files, changed in one or two places, thousands of times.

A command ends with 0 or 1, never with a traceback; every finding is one line with file and place; and where there is no
warning, the file means what a plain reading of it says. ``--fuzz-cases 20000`` looks longer, ``--fuzz-seed`` elsewhere.
"""

import contextlib
import dataclasses
import io
import json
import logging
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image

import score
from annotations.fields import FIELDS
from annotations.forms import Form
from annotations.record_reader import RecordReader
from evaluation.coco_metrics import SCORE_KINDS
from helpers.coco_cases import oracle_of_files
from helpers.mutations import dump, mutations
from loading.samples import DetectionDataset
from loading.splits import Source, label_map_for, load_data

HEIGHT, WIDTH = 40, 50
USES = {"box": (), "mask": ("segm",), "keypoint": ("keypoints",)}


def truth():
    """A valid COCO file with all fields: three images, one of them empty."""
    boxes = [[5, 6, 20, 30], [25, 20, 20, 10.5], [0, 0, 49, 39]]
    points = [[10, 12, 2, 14, 20, 1], [30, 22, 2, 0, 0, 0], [20, 20, 1, 30, 30, 2]]
    shapes = [
        [[5, 6, 25, 6, 25, 36]], [[25, 20, 45, 20, 45, 30, 25, 30], [26, 21, 30, 21, 30, 25]],
        {"size": [HEIGHT, WIDTH], "counts": [400, 1000, 600]},
    ]  # fmt: skip
    objects = [
        {
            "id": n + 1, "image_id": (7, 7, 9)[n], "category_id": (1, 2, 2)[n], "bbox": boxes[n], "iscrowd": 0,
            "area": boxes[n][2] * boxes[n][3], "keypoints": points[n], "num_keypoints": (2, 1, 2)[n], "segmentation": shapes[n],
        }
        for n in range(3)
    ]  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 8, 9)]
    first = {"id": 1, "name": "a", "supercategory": "s", "keypoints": ["p", "q"], "skeleton": [[1, 2]]}
    return {"info": {}, "images": images, "annotations": objects, "categories": [first, {"id": 2, "name": "b"}]}


def results():
    """Detections near the truth, one of them on the empty image."""
    found = []
    for n, record in enumerate([*truth()["annotations"], {**truth()["annotations"][0], "image_id": 8}]):
        shape = record["segmentation"]
        if isinstance(shape, list):
            shape = {"size": [HEIGHT, WIDTH], "counts": [300 + n, 1000, 700 - n]}
        found.append(
            {
                "image_id": record["image_id"], "category_id": record["category_id"], "score": 0.9 - 0.2 * n,
                "bbox": [v + 1 for v in record["bbox"]], "segmentation": shape,
                "keypoints": [v + 1 for v in record["keypoints"]],
            }
        )  # fmt: skip
    return found


def custom():
    """A valid json of a custom folder."""
    return {
        "bboxes": [[5, 6, 25, 36], [25, 20, 45, 30.5]],
        "labels": ["a", "b"],
        "keypoints": [[[10, 12, 2], [14, 20, 1]], [[30, 22, 2], None]],
        "segmentations": [[[5, 6, 25, 6, 25, 36]], [[25, 20, 45, 20, 45, 30]]],
        "area": [600, 210],
        "iscrowd": [0, 0],
    }


def dataset_json():
    return {
        "classes": ["a", "b"],
        "keypoint_names": ["left", "right"],
        "flip_pairs": [["left", "right"]],
        "skeleton": [[0, 1]],
        "oks_sigmas": [0.05, 0.1],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of both layouts and the files that stay valid."""
    root = tmp_path_factory.mktemp("fuzz")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for i in (7, 8, 9):
            picture.save(root / split / f"{i}.png")
    for split in ("train", "test"):
        for name in ("images", "annotations"):
            (root / "custom" / split / name).mkdir(parents=True)
        for i in (1, 2):
            picture.save(root / "custom" / split / "images" / f"{i}.png")
            (root / "custom" / split / "annotations" / f"{i}.json").write_text(json.dumps(custom()))
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(truth()))
    (root / "truth.json").write_text(json.dumps(truth()))
    (root / "results.json").write_text(json.dumps(results()))
    return root


class Outcome:
    """How a reading of data ended: its lines, whether it was refused, and what warnings there were."""

    def __init__(self, call):
        self.value, self.error = None, ""
        log = io.StringIO()
        handler = logging.StreamHandler(log)
        handler.setLevel(logging.WARNING)
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        root.handlers[:] = [handler]
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()) as self.out,
                contextlib.redirect_stderr(io.StringIO()) as err,
            ):
                self.value = call()
        except (ValueError, FileNotFoundError) as error:  # what the commands turn into one line and exit code 1
            self.error = str(error)
        finally:
            root.handlers[:], root.level = handlers, level
        self.error = self.error or err.getvalue()
        self.warnings = log.getvalue()


def check_lines(text, files):
    """Assert that a refusal is one line a finding, with the file, the place, and nothing of Python's own."""
    lines = text.strip().splitlines()
    assert lines, "refused without a word"
    header = re.search(r"^(score\.py: error: )?\d+ error\(s\) in the data:$", lines[0])
    for line in lines[1:] if header else lines:
        assert len(line) < 1500, line
        assert "Traceback" not in line and "object at 0x" not in line
        assert re.match(r"\.\.\. and \d+ more of kind", line) or any(str(file) in line for file in files), line
    assert header or len(lines) == 1, text


def plain_numbers(values, count=None):
    assert type(values) is list and (count is None or len(values) == count)
    assert all(type(v) in (int, float) for v in values)
    return [float(v) for v in values]


def plain_id(value):
    assert type(value) is int
    return value


def plain_reading(content, uses):
    """Read a COCO file as somebody would who knows its format and trusts it; asserts that it has that format.

    Returns {image id: [(class, box, area, crowd, keypoints, polygons or run lengths)]}.
    """
    names = {plain_id(c["id"]): c["name"] for c in content["categories"]}
    assert all(type(name) is str for name in names.values()) and len(names) == len(content["categories"])
    images = {plain_id(i["id"]): (plain_id(i["height"]), plain_id(i["width"])) for i in content["images"]}
    assert len(images) == len(content["images"]) and all(type(i["file_name"]) is str for i in content["images"])
    read = {image_id: [] for image_id in images}
    for record in content.get("annotations", []):
        box = plain_numbers(record["bbox"], 4)
        crowd = record.get("iscrowd")
        assert crowd is None or (type(crowd) is int and crowd in (0, 1))
        area = None if record.get("area") is None else plain_numbers([record["area"]])[0]
        points = plain_numbers(record["keypoints"]) if record.get("keypoints") is not None else []
        shape = record.get("segmentation")
        if isinstance(shape, list):
            shape = [plain_numbers(polygon) for polygon in shape]
        elif shape is not None:
            assert shape["size"] == list(images[record["image_id"]])
        named = names[plain_id(record["category_id"])]
        entry = (named, box, area, bool(crowd), points, shape if "segm" in uses else None)
        read[plain_id(record["image_id"])].append(entry if "keypoints" in uses else (*entry[:4], None, entry[5]))
    return read


def same_meaning(split, content, uses):
    """Compare what was read with the plain reading."""
    arrays, names = split.annotations, dict(split.annotations.categories)
    plain = plain_reading(content, uses)
    assert arrays.image_ids.tolist() == list(plain)
    for i, image_id in enumerate(plain):
        span = arrays.objects(i)
        assert span.stop - span.start == len(plain[image_id]), "objects were lost or won without a warning"
        for n, (name, box, area, crowd, points, shape) in zip(range(span.start, span.stop), plain[image_id]):
            assert names[int(arrays.category_ids[n])].startswith(name) and bool(arrays.is_crowd[n]) == crowd
            assert arrays.boxes_xywh[n].tolist() == box
            assert area is None or arrays.areas[n] == area
            if points:
                assert arrays.keypoints[n].reshape(-1).tolist() == points
            elif points is not None:
                assert not arrays.keypoints[n].any()
            if isinstance(shape, list):
                assert [polygon.tolist() for polygon in arrays.polygons(n)] == shape
            elif shape is not None:
                assert arrays.rle(n)


def fuzz(request, base, times=1):
    """Return a function that tries something on changes of ``base``: fixed seed, no files of its own, as many as asked for."""
    cases = times * request.config.getoption("--fuzz-cases")
    quick = settings(
        max_examples=cases, deadline=None, database=None, phases=(Phase.generate,), report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def run(attempt):
        def test(case):
            attempt(case[0])

        seed(request.config.getoption("--fuzz-seed"))(quick(given(mutations(base))(test)))()

    return run


def try_coco(folder, task, value):
    """Load a changed annotation file as training does, look at every target, and check the answer."""
    path = folder / "annotations" / f"{'person_keypoints' if task == 'keypoint' else 'instances'}_train2017.json"
    path.write_text(dump(value), encoding="utf-8")
    source = Source("coco", folder, cache_dir=folder / f"cache-{task}", paths={
        "train": (str(folder / "train2017"), str(path)),
        "val": (str(folder / "val2017"), str(folder / "annotations" / "instances_val2017.json")),
    })  # fmt: skip

    def load():
        split = source.load("train", task=task)
        dataset = DetectionDataset(
            split.annotations, split.images, label_map_for(split.annotations),
            needs_masks=task == "mask", needs_keypoints=task == "keypoint",
        )  # fmt: skip
        for i in range(len(dataset)):
            dataset[i]
        return split

    outcome = Outcome(load)
    if outcome.error:
        check_lines(outcome.error, [path, folder / "train2017"])
    elif not outcome.warnings:
        same_meaning(outcome.value, json.loads(dump(value)), USES[task])
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("task", list(USES))
def test_a_changed_annotation_file_is_read_as_it_says_or_named(folder, request, task):
    fuzz(request, truth())(lambda value: try_coco(folder, task, value))


def try_score(folder, kind, changed, value):
    """Score a changed file; without a warning the figures are pycocotools'."""
    paths = {name: folder / f"{name}.json" for name in ("truth", "results")}
    given_files = {name: folder / f"{name}-{kind}.json" if name == changed else path for name, path in paths.items()}
    given_files[changed].write_text(dump(value), encoding="utf-8")
    flags = ["--ground-truth", given_files["truth"], "--predictions", given_files["results"], "--iou-types", kind]
    flags += ["--json", folder / f"figures-{kind}.json"] + (["--kpt-oks-sigmas", "0.1"] if kind == "keypoints" else [])
    outcome = Outcome(lambda: score.run([str(flag) for flag in flags]))
    assert outcome.value in (0, 1), outcome.value
    if outcome.value == 1:
        check_lines(outcome.error, list(given_files.values()))
    elif not outcome.warnings and str(folder) not in outcome.out.getvalue():
        figures = json.loads((folder / f"figures-{kind}.json").read_text())[kind]
        contents = [json.loads(given_files[name].read_text()) for name in ("truth", "results")]
        plain_reading(contents[0], (kind,))
        for record in contents[1]:
            plain_id(record["image_id"]), plain_id(record["category_id"]), plain_numbers([record["score"]])
            assert kind != "bbox" or plain_numbers(record["bbox"], 4)
            assert kind != "keypoints" or plain_numbers(record["keypoints"], 6)
        for record in contents[0].get("annotations", []):  # pycocotools takes null for more than no keypoint
            points = record.get("keypoints") or []
            record["num_keypoints"] = record.get("num_keypoints") or sum(v > 0 for v in points[2::3])
        field = SCORE_KINDS[kind].field  # where there are boxes, pycocotools takes their areas for those of masks
        contents[1] = [
            {k: v for k, v in record.items() if k in ("image_id", "category_id", "score", field)}
            for record in contents[1]
        ]
        expected = oracle_of_files(*contents, kind)
        if expected is not None:
            assert [-1 if v is None else v for v in figures.values()] == expected, (figures, expected)
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["truth", "results"])
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_a_changed_file_gets_pycocotools_score_or_is_named(folder, request, kind, changed):
    base = truth() if changed == "truth" else results()
    fuzz(request, base)(lambda value: try_score(folder, kind, changed, value))


def try_custom(folder, task, name, value):
    """Load a custom folder with a changed json."""
    root = folder / "custom"
    path = root / ("dataset.json" if name == "dataset.json" else "train/annotations/1.json")
    path.write_text(dump(value), encoding="utf-8")
    try:
        outcome = Outcome(lambda: load_data(Source("custom", root, cache_dir=folder / "cache-custom"), task))
    finally:
        path.unlink()
        (root / "train" / "annotations" / "1.json").write_text(json.dumps(custom()))
    if outcome.error:
        check_lines(outcome.error, [root])
    elif not outcome.warnings and name != "dataset.json":
        same_objects(outcome.value.train.annotations, json.loads(dump(value)))
    return outcome


def same_objects(arrays, content):
    """Compare the first picture of a folder with a plain reading of its json."""
    span, names = arrays.objects(0), dict(arrays.categories)
    assert [arrays.boxes_xywh[n].tolist() for n in range(span.start, span.stop)] == [
        [a, b, x - a, y - b] for a, b, x, y in (plain_numbers(box, 4) for box in content["bboxes"])
    ]
    for k, n in enumerate(range(span.start, span.stop)):
        label, area, crowd = ((content.get(name) or [None] * 9)[k] for name in ("labels", "area", "iscrowd"))
        assert type(label) is str and names[int(arrays.category_ids[n])] == label
        assert area is None or plain_numbers([area])[0] == arrays.areas[n]
        assert crowd is None or (type(crowd) is int and bool(arrays.is_crowd[n]) == bool(crowd))


@pytest.mark.slow
@pytest.mark.parametrize("task", list(USES))
@pytest.mark.parametrize("name", ["picture.json", "dataset.json"])
def test_a_changed_json_of_a_folder_is_read_or_named(folder, request, task, name):
    base = dataset_json() if name == "dataset.json" else custom()
    fuzz(request, base)(lambda value: try_custom(folder, task, name, value))


def test_unchanged_files_are_read_without_a_word(folder):
    for task in USES:
        outcome = try_coco(folder, task, truth())
        assert not outcome.error and not outcome.warnings and outcome.value is not None
        assert not try_custom(folder, task, "dataset.json", dataset_json()).error
        assert not try_custom(folder, task, "picture.json", custom()).error
    for kind in ("bbox", "segm", "keypoints"):
        assert try_score(folder, kind, "truth", truth()).value == 0
        assert try_score(folder, kind, "results", results()).value == 0


def unchecked(field):
    """Return the field with a form that takes everything as it is."""
    return dataclasses.replace(field, form=Form(field.form.expected, lambda value: (value, "")))


def plant_area_used_before_its_type_is_known(monkeypatch):
    monkeypatch.setitem(FIELDS, ("object", "area"), unchecked(FIELDS["object", "area"]))


def plant_score_used_before_its_type_is_known(monkeypatch):
    monkeypatch.setitem(FIELDS, ("result", "score"), unchecked(FIELDS["result", "score"]))


def plant_no_remark_on_other_forms(monkeypatch):
    monkeypatch.setattr(RecordReader, "note", lambda *args: None)


def plant_wrong_values_left_out_in_silence(monkeypatch):
    monkeypatch.setattr(RecordReader, "wrong", lambda *args, **kwargs: None)


PLANTED = {
    plant_area_used_before_its_type_is_known: (truth, lambda folder, value: try_coco(folder, "box", value)),
    plant_score_used_before_its_type_is_known: (
        results,
        lambda folder, value: try_score(folder, "bbox", "results", value),
    ),
    plant_no_remark_on_other_forms: (truth, lambda folder, value: try_coco(folder, "box", value)),
    plant_wrong_values_left_out_in_silence: (truth, lambda folder, value: try_coco(folder, "keypoint", value)),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(folder, request, monkeypatch, bug):
    base, attempt = PLANTED[bug]
    bug(monkeypatch)
    with pytest.raises((AssertionError, TypeError, ValueError, AttributeError)):
        fuzz(request, base(), times=10)(lambda value: attempt(folder, value))  # ends at the first that is found
