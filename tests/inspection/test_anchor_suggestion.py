"""The doctor's anchors reach more objects, by its own count: the flags it prints are those that give the gain."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import check_dataset
from inspection.anchor_reach import AnchorGrids, build_skeleton_model, reach_of_anchors, resize_objects
from inspection.anchor_suggestion import MIN_OBJECTS, suggest_anchors
from models.architectures import ModelSpec

SIDE = 160


def long_boxes(count, seed=0):
    """Boxes of 1:8 to 1:12, half of them upright, float64 [N, 4] xyxy on square pictures."""
    rng = np.random.default_rng(seed)
    long = rng.uniform(60, 150, count)
    sides = np.stack([long, long / rng.uniform(8, 12, count)], axis=1)
    upright = rng.random(count) < 0.5
    sides[upright] = sides[upright][:, ::-1]
    corners = rng.uniform(0, 1, (count, 2)) * (SIDE - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def square_boxes(count):
    corners = np.random.default_rng(0).uniform(0, SIDE - 60, (count, 2))
    return np.concatenate([corners, corners + 52], axis=1)


def reach_and_advice(spec, boxes):
    grids = AnchorGrids(build_skeleton_model(spec))
    sides = np.full(len(boxes), SIDE)
    objects = resize_objects(grids.model, boxes, sides, sides)
    reach = reach_of_anchors(grids, objects)
    return reach, suggest_anchors(spec, grids, objects, reach)


def with_flags(spec, flags):
    args = check_dataset.get_args_parser().parse_args(shlex.split(flags))
    sizes, ratios = args.anchor_sizes and tuple(args.anchor_sizes), args.anchor_ratios and tuple(args.anchor_ratios)
    return replace(spec, anchor_sizes=sizes, anchor_ratios=ratios)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("retinanet_resnet50_fpn", 0.02), ("fasterrcnn_resnet50_fpn", 0.05), ("ssdlite320_mobilenet_v3_large", 0.4)],
)
def test_long_objects_get_anchors_that_reach_them(name, limit):
    spec, boxes = ModelSpec(name, 2), long_boxes(300)
    reach, advice = reach_and_advice(spec, boxes)
    assert np.mean(reach.best < reach.wanted) > 0.9 and advice.missed <= limit and "--anchor-ratios" in advice.flags
    again, more = reach_and_advice(with_flags(spec, advice.flags), boxes)
    assert np.mean(again.best < again.wanted) == advice.missed and more is None


def test_nothing_is_suggested_where_anchors_fit_or_objects_are_few_or_there_are_no_anchors():
    assert reach_and_advice(ModelSpec("retinanet_resnet50_fpn", 2), square_boxes(100))[1] is None
    assert reach_and_advice(ModelSpec("retinanet_resnet50_fpn", 2), long_boxes(MIN_OBJECTS - 1))[1] is None
    assert reach_and_advice(ModelSpec("retinanet_resnet50_fpn", 2), long_boxes(MIN_OBJECTS))[1] is not None
    assert reach_and_advice(ModelSpec("fcos_resnet50_fpn", 2), long_boxes(300))[1] is None


def test_the_doctors_line_can_be_pasted_and_shows_the_gain(tmp_path, capsys):
    boxes = long_boxes(60)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "bar"}]}
    for n in range(20):
        Image.new("RGB", (SIDE, SIDE), (12 * n, 90, 90)).save(tmp_path / f"{n}.png")
        content["images"].append({"id": n + 1, "file_name": f"{n}.png", "height": SIDE, "width": SIDE})
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        record = {"id": n + 1, "image_id": n % 20 + 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        content["annotations"].append(record)
    (tmp_path / "a.json").write_text(json.dumps(content))
    flags = ["--dataset", "coco", "--no-images", "--model", "retinanet_resnet50_fpn", "--cache-dir", str(tmp_path)]
    for role in ("train", "val"):
        flags += [f"--{role}-images", str(tmp_path), f"--{role}-annotations", str(tmp_path / "a.json")]
    assert check_dataset.run(flags) == 0
    text = capsys.readouterr().out
    # Of the training pictures alone; the line is whole, however long.
    (pasted,) = re.findall(r"^ {6,}(--anchor-.*)$", text, flags=re.M)
    assert re.search(r"100% of the objects have none with IoU 0\.5", " ".join(text.split()))
    assert re.search(r"with 2 anchors a place it is 0%; add to the flags of training", " ".join(text.split()))
    assert check_dataset.run([*flags, *shlex.split(pasted)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"anchors: 0% of the objects have none", text) and "--anchor-" not in text
