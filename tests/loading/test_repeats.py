"""Repeat factors equal LVIS's formula; only what is trained on counts."""

import json

import numpy as np
import pytest

from annotations.findings import Findings
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from helpers.drawn import draw_coco
from helpers.runs import run
from loading.repeats import Repeats, find_repeats
from loading.samples import DetectionDataset
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from loading.split import Split
from loading.splits import label_map_for
from models.architectures import ModelSpec
from presets import build_transforms

SSD = ModelSpec("ssdlite320_mobilenet_v3_large", 4)


def split_of(shown, num_images, *, crowds=()):
    """Return a split whose images show classes, as (image, class) pairs from 0; ``crowds`` are numbers of pairs."""
    images = [{"id": k + 1, "file_name": f"{k}.png", "height": 160, "width": 160} for k in range(num_images)]
    objects = [
        {"image_id": i + 1, "category_id": 10 * (c + 1), "bbox": [5, 5, 60, 60], "iscrowd": int(n in crowds)}
        for n, (i, c) in enumerate(shown)
    ]
    categories = [{"id": 10 * (c + 1), "name": name} for c, name in enumerate(("cat", "dog", "owl"))]
    annotations = annotations_from_records(images, objects, categories, Rules("test", str, str), Findings())
    return Split("test", annotations, ShapeDrawer("train"), np.arange(num_images))


def test_factors_equal_the_formula_on_a_case_made_by_hand():
    """Of ten pictures 8 show cat, 2 dog, 1 owl, with threshold 0.4: 1, sqrt(0.4 / 0.2) = 1.414, sqrt(0.4 / 0.1) = 2."""
    shown = [*((i, 0) for i in range(8)), (0, 0), (0, 1), (8, 1), (8, 1), (8, 2)]  # doubles count once; 9 shows nothing
    split = split_of(shown, 10)
    repeats = find_repeats(split, label_map_for(split.annotations), SSD, split.indices, 0.4)
    assert repeats.pictures.tolist() == [8, 2, 1]
    assert repeats.of_class.tolist() == pytest.approx([1, 2**0.5, 2])
    assert repeats.of_picture.tolist() == pytest.approx([2**0.5, *[1] * 7, 2, 1])
    assert repeats.drawn.tolist() == pytest.approx([7 + 2**0.5, 2 + 2**0.5, 2])
    assert repeats.format_rows(["cat", "dog", "owl"]) == [
        "cat 8 -> 8 (x 1.00)",
        "dog 2 -> 3 (x 1.41)",
        "owl 1 -> 2 (x 2.00)",
    ]


def test_factors_equal_a_plain_loop_over_the_formula():
    rng = np.random.default_rng(0)
    for threshold in (0.001, 0.05, 1.0):
        pictures, classes = rng.integers(0, 40, 90), np.minimum(rng.geometric(0.4, 90), 6) - 1
        found = Repeats.of(threshold, pictures, classes, (40, 7))  # no picture shows class 6
        shown = [{c for p, c in zip(pictures, classes) if p == i} for i in range(40)]
        share = [sum(c in s for s in shown) / 40 for c in range(7)]
        factor = [max(1.0, (threshold / f) ** 0.5) if f else 1.0 for f in share]
        assert found.of_class.tolist() == pytest.approx(factor)
        assert found.of_picture.tolist() == pytest.approx([max([factor[c] for c in s], default=1.0) for s in shown])


def test_only_pictures_and_objects_that_are_trained_on_count(caplog):
    shown = [*((i, 0) for i in range(8)), (0, 1), (1, 1), (2, 2)]
    split = split_of(shown, 10, crowds=(9,))  # that of picture 1
    labels = label_map_for(split.annotations)
    repeats = find_repeats(split, labels, SSD, np.array([7, 0, 1, 3, 4]), 0.8)
    assert repeats.pictures.tolist() == [5, 1, 0]
    assert repeats.of_picture.tolist() == pytest.approx([1, 2, 1, 1, 1])
    none = find_repeats(split, labels, SSD, split.indices, 0.05)
    assert (none.of_picture == 1).all()
    assert not caplog.messages
    none.log()
    assert caplog.messages == ["--repeat-threshold 0.05 repeats no picture: each class is on at least 0.1 of them"]


def test_an_image_that_comes_again_is_augmented_anew():
    annotations = shapes_annotations("train", 1)
    transforms = build_transforms("ssdlite", hflip_prob=0.5, min_size=320, max_size=320, fixed_size=(320, 320))
    dataset = DetectionDataset(annotations, ShapeDrawer("train"), label_map_for(annotations), transforms=transforms)
    samples = [dataset[item].pixels.tobytes() for item in ((3, 0), (3, 0, 1), (3, 0, 2))]
    assert len(set(samples)) == 3 and dataset[3, 0, 1].pixels.tobytes() == samples[1]


def test_the_plan_says_how_often_each_class_is_seen(tmp_path, capsys):
    root = draw_coco(tmp_path / "coco")
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    trained = [o for o in content["annotations"] if not o["iscrowd"]]
    names = {c["id"]: c["name"] for c in content["categories"]}
    shown = [{o["category_id"] for o in trained if o["image_id"] == image["id"]} for image in content["images"]]
    factor = {c: (1 / (sum(c in s for s in shown) / len(shown))) ** 0.5 for c in names}
    draws = [max([factor[c] for c in classes], default=1) for classes in shown]
    flags = ["--data-path", root, "--device", "cpu", "--workers", "0", "--output-dir", ""]
    assert run(*flags, "--model", "ssdlite320_mobilenet_v3_large", "--repeat-threshold", "1", "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"repeats  {sum(draws):.0f} pictures drawn per epoch of {len(shown)}; those with each class: " in text
    for c, name in names.items():
        number, drawn = sum(c in s for s in shown), sum(d for d, s in zip(draws, shown) if c in s)
        assert f"{name} {number} -> {drawn:.0f} (x {factor[c]:.2f})" in text
    assert f"{int(sum(draws)) // 2} updates per epoch" in text
