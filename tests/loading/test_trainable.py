"""What can be trained on is counted, and what is left out is named with its cause before the first step."""

import json
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import check_dataset
import train
from annotations.arrays import Annotations
from annotations.labels import LabelMap
from helpers.drawn import draw_coco, draw_folder
from loading.samples import trainable_objects
from loading.split import Split
from loading.splits import CocoPaths, label_map_for, load_coco_split, load_custom_split
from loading.trainable import CROWD, EMPTY, UNUSED, VANISHES, count_trainable, vanishing_images
from models.architectures import ModelSpec

pytestmark = pytest.mark.usefixtures("restore_process")

BOXES = ("--dataset", "coco", "--model", "fasterrcnn_mobilenet_v3_large_320_fpn")
SIZES = ("--min-size", "64", "--max-size", "96")
SPEC = ModelSpec("fasterrcnn_resnet50_fpn", 4, min_size=(64,), max_size=96)
PERSONS = ("--dataset", "coco_kp", "--model", "keypointrcnn_resnet50_fpn")


def change_objects(root, change, role="train", kind="instances"):
    """Call ``change`` with every object and the content of a COCO file."""
    path = root / "annotations" / f"{kind}_{role}2017.json"
    content = json.loads(path.read_text())
    for record in content["annotations"]:
        change(record, content)
    path.write_text(json.dumps(content))


def refusals(root, flags, capsys, *more):
    """Return what training and the doctor say, both ending with code 1."""
    flags = [*flags, *SIZES, "--data-path", str(root), *more]
    rest = ["--device", "cpu", "--workers", "0", "--dry-run", "--output-dir", ""]
    assert train.run_as_command([*flags, *rest]) == 1
    said = capsys.readouterr().err.partition("error: ")[2]
    assert check_dataset.run(flags) == 1
    return said.strip(), " ".join(capsys.readouterr().out.split())


def make_crowd(record, content):
    record["iscrowd"] = 1
    by_id = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    size = by_id[record["image_id"]]
    record["segmentation"] = {"size": list(size), "counts": [0, size[0] * size[1]]}


def make_empty(record, content):
    record["bbox"][2:] = [0, 0]


def make_normalised(record, content):
    image = next(i for i in content["images"] if i["id"] == record["image_id"])
    sides = [image["width"], image["height"]] * 2
    record["bbox"] = [value / side for value, side in zip(record["bbox"], sides)]


def make_tiny(record, content):
    record["bbox"][2:] = [0.5, 9]


CAUSES = {
    "all crowds": (make_crowd, r"no object is left to train on: of (\d+), \1 are crowds .*iscrowd 0"),
    "all empty": (make_empty, r"no object is left to train on: .* have a box without an inside.*above 0"),
    "all too small": (make_tiny, r"no object is left to train on: .* less than a pixel .*--min-size"),
    "all normalised": (make_normalised, r"boxes look normalised .*multiply x and width by the picture's width"),
}


@pytest.mark.parametrize("keep", ["--keep-negatives", "--no-keep-negatives"])
@pytest.mark.parametrize(("change", "expected"), CAUSES.values(), ids=CAUSES)
def test_where_no_object_is_left_training_and_doctor_stop_with_the_cause(change, expected, keep, tmp_path, capsys):
    change_objects(draw_coco(tmp_path), change)
    said, shown = refusals(tmp_path, BOXES, capsys, keep)
    assert re.search(expected, said) and len(said.splitlines()) == 1
    assert "keep-negatives" not in said
    assert " ".join(said.split()) in shown


def test_points_without_boxes_are_told_how_to_make_boxes(tmp_path, capsys):
    change_objects(draw_coco(tmp_path, num_keypoints=1), make_empty, kind="person_keypoints")
    said, _ = refusals(tmp_path, PERSONS, capsys)
    assert "give each object a box around its points" in said and "keep-negatives" not in said


def test_keep_negatives_is_advised_where_it_helps(tmp_path, capsys):
    def hide(record, content):
        record["keypoints"] = [v if k < 9 else 0 for k, v in enumerate(record["keypoints"])]
        record["num_keypoints"] = 3

    change_objects(draw_coco(tmp_path, num_keypoints=17), hide, kind="person_keypoints")
    said, _ = refusals(tmp_path, PERSONS, capsys)
    assert "without enough to train on; --keep-negatives trains on all pictures" in said


@pytest.mark.parametrize("centres", [False, True])
def test_normalised_boxes_of_a_folder_are_named_too(centres, tmp_path, capsys):
    draw_folder(tmp_path, num_keypoints=0)
    for path in (tmp_path / "train" / "annotations").glob("*.json"):
        entry = json.loads(path.read_text())
        boxes = [[v / side for v, side in zip(box, (80, 60, 80, 60))] for box in entry["bboxes"]]
        if centres:  # as YOLO: many have x2 < x1 when read as corners
            boxes = [[(a + c) / 2, (b + d) / 2, c - a, d - b] for a, b, c, d in boxes]
        path.write_text(json.dumps({"bboxes": boxes}))
    said, _ = refusals(tmp_path, ("--dataset", "custom", *BOXES[2:]), capsys)
    assert "boxes look normalised to the picture's size" in said


def test_a_class_without_objects_and_few_objects_are_warned_of(tmp_path, capsys):
    root = draw_coco(tmp_path, 2)
    change_objects(root, lambda record, _: record.update(category_id=1))
    flags = [*BOXES, *SIZES, "--data-path", str(root), "--device", "cpu"]
    assert train.run_as_command([*flags, "--workers", "0", "--batch-size", "1", "--dry-run", "--output-dir", ""]) == 0
    text = capsys.readouterr().out
    assert "2 of 3 classes have no object to train on: bicycle, car" in text
    assert re.search(r"only \d object\(s\) to train on", text)
    assert re.search(r"objects  \d to train on, 1 left out: 1 are crowds", text)


def split_of(root):
    paths = CocoPaths(root / "train2017", root / "annotations" / "instances_train2017.json")
    return load_coco_split(paths, cache_dir=root / "cache")


def test_counts_are_those_of_the_samples(tmp_path):
    root = draw_coco(tmp_path, 8)
    for number, change in ((2, make_empty), (3, make_tiny)):
        change_objects(root, lambda r, c, n=number, f=change: f(r, c) if r["id"] == n else None)
    split = split_of(root)
    annotations = split.annotations
    images = split.indices[:-1]
    found = count_trainable(split, label_map_for(annotations), SPEC, images)
    assert found.reasons[CROWD] == found.reasons[EMPTY] == found.reasons[VANISHES] == 1
    assert found.reasons[UNUSED] == len(trainable_objects(annotations, int(split.indices[-1]))[0])
    numbers = np.concatenate([trainable_objects(annotations, int(i))[0] for i in images])
    assert found.num_objects == len(numbers) - 1  # samples have the tiny one; the model's resize leaves nothing of it
    assert found.num_objects + sum(found.reasons.values()) == annotations.num_objects


def test_an_unknown_class_is_left_out(tmp_path):
    split = split_of(draw_coco(tmp_path, 8))
    ids = split.annotations.category_ids[~split.annotations.is_crowd]
    found = count_trainable(split, LabelMap((1, 2), ("person", "bicycle")), SPEC, split.indices)
    assert found.num_objects == int((ids < 3).sum()) < len(ids)


def test_what_was_dropped_while_reading_is_counted_object_by_object(tmp_path, caplog):
    root = draw_coco(tmp_path, 8)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for record in content["annotations"][1:-1]:
        del record["segmentation"]  # reported at once, where nearly none has one
    content["images"][-1]["width"] = 0  # takes its objects along
    path.write_text(json.dumps(content))
    num_objects = len(content["annotations"])

    options = {"on_bad_data": "skip", "uses": ("segm",), "cache_dir": root / "cache"}
    for _ in range(2):  # read, then from the cache
        split = load_coco_split(CocoPaths(root / "train2017", path), **options)
        found = count_trainable(split, label_map_for(split.annotations), SPEC, split.indices)
        assert split.annotations.num_objects == 1 and found.dropped == num_objects - 1
    change_objects(root, lambda record, _: record.update(iscrowd=0, segmentation=[[0, 0, 9, 0, 9, 9]]))
    split = load_coco_split(CocoPaths(root / "train2017", path), **options)
    count_trainable(split, label_map_for(split.annotations), SPEC, split.indices).check()
    assert "most objects are left out" not in caplog.text
    change_objects(root, lambda record, _: record.pop("segmentation") if record["id"] > 1 else None)
    split = load_coco_split(CocoPaths(root / "train2017", path), **options)
    count_trainable(split, label_map_for(split.annotations), SPEC, split.indices).check()
    assert "most objects are left out, 1 to train on" in caplog.text


def test_a_picture_whose_objects_cannot_be_read_counts_as_one_that_is_dropped(tmp_path):
    root = draw_folder(tmp_path, num_keypoints=0)
    broken = sorted((root / "train" / "annotations").glob("*.json"))[0]
    rest = sum(len(json.loads(path.read_text())["bboxes"]) for path in broken.parent.glob("*.json") if path != broken)
    broken.write_text("{")
    annotations = load_custom_split(root, "train", on_bad_data="skip", cache_dir=root / "cache").annotations
    assert annotations.num_objects == rest and annotations.num_dropped == 1


def thin(root):
    """Put two thin pictures into a drawn set."""
    for role, (width, height) in (("train", (600, 3)), ("val", (3, 600))):
        path = root / "annotations" / f"instances_{role}2017.json"
        content = json.loads(path.read_text())
        content["images"][1].update(width=width, height=height)
        for record in content["annotations"]:
            if record["image_id"] == 11:
                record.update(bbox=[0, 0, 3, 3], segmentation=[[0, 0, 3, 0, 3, 3]])
        path.write_text(json.dumps(content))
        Image.new("RGB", (width, height)).save(root / f"{role}2017" / "000001.png")
    return root


def test_pictures_that_the_resize_shrinks_to_nothing_are_named_or_skipped(tmp_path, capsys):
    root = thin(draw_coco(tmp_path))
    said, shown = refusals(root, BOXES, capsys)
    assert said.count("000001.png: ") == 2 and "600 x 3 pixels" in said and "3 x 600 pixels" in said
    assert "600 x 3 pixels" in shown and "3 x 600 pixels" in shown
    flags = [*BOXES, *SIZES, "--data-path", str(root), "--device", "cpu"]
    more = ["--workers", "0", "--batch-size", "2", "--epochs", "1", "--output-dir", "", "--on-bad-data", "skip"]
    assert train.run_as_command([*flags, *more]) == 0
    text = capsys.readouterr().out
    assert "000001.png: 600 x 3 pixels" in text and "the image is left out" in text


def empty_annotations(heights, widths):
    """Return annotations of images alone."""
    number, none = len(heights), np.zeros(0)
    starts = np.zeros(number + 1, dtype=np.int64)
    return Annotations(
        np.arange(number), np.array(heights, np.int32), np.array(widths, np.int32), np.zeros(0, np.uint8), starts,
        starts, np.zeros((0, 4)), none.astype(int), none, none.astype(bool), np.zeros((0, 0, 3)), none,
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint8), np.zeros(1, np.int64), ((1, "a"),),
    )  # fmt: skip


@pytest.mark.parametrize("max_size", [41, 96, 333, 1333])
def test_vanishing_is_what_torchvision_cannot_resize(max_size):
    transform = GeneralizedRCNNTransform(64, max_size, [0.0] * 3, [1.0] * 3).eval()
    sizes = [(k, max_size * n + d) for k in (1, 2, 3, 7, 25, 41) for n in (k, k + 1) for d in (-1, 0, 1)]
    sizes = [(h, w) for h, w in sizes if w > 0]

    def fails(height, width):
        try:
            transform([torch.zeros(3, height, width)])
        except RuntimeError:
            return True
        return False

    spec = ModelSpec("fasterrcnn_resnet50_fpn", 2, min_size=(64,), max_size=max_size)
    found = vanishing_images(empty_annotations(*zip(*sizes)), spec)
    expected = [i for i, size in enumerate(sizes) if fails(*size)]
    assert found.tolist() == expected and expected


def test_all_of_coco_is_counted_in_a_fraction_of_a_second():
    images, objects = 118_000, 860_000
    rng = np.random.default_rng(0)
    bare = empty_annotations(np.full(images, 480), np.full(images, 640))
    starts = np.zeros(images + 1, dtype=np.int64)
    starts[1:] = np.cumsum(np.bincount(rng.integers(0, images, objects), minlength=images))
    arrays = {name: getattr(bare, name) for name in bare.__dataclass_fields__}
    arrays |= {"object_starts": starts, "boxes_xywh": rng.uniform(1, 200, (objects, 4))}
    arrays |= {"category_ids": np.ones(objects, np.int64), "areas": np.ones(objects)}
    arrays |= {"is_crowd": np.zeros(objects, bool), "keypoints": np.zeros((objects, 0, 3))}
    split = Split("all", Annotations(**arrays), None, np.arange(images))
    start = time.process_time()
    found = count_trainable(split, LabelMap((1,), ("a",)), ModelSpec("fcos_resnet50_fpn", 2), split.indices)
    assert time.process_time() - start < 2 and found.num_objects > 0
