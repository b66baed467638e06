"""The same objects in another format are the same run: to the last bit of the weights, on two processes."""

import json

import pytest
import torch

from helpers.drawn import draw_coco
from helpers.formats import by_image, read_splits, same_classes, write_voc, write_yolo
from helpers.ranks import run_on_ranks
from helpers.runs import lines, train_on_rank
from runtime.checkpoint import load_checkpoint

NAMES = ["left_front", "right_front", "left_rear", "right_rear"]
FLIP = {4: [1, 0, 3, 2], 17: [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]}


def write_coco_again(root, splits, kind):
    """Write what the other formats get, with their numbers: images from 1 in the order of names."""
    (root / "annotations").mkdir(parents=True)
    for role, (content, pictures) in splits.items():
        (root / f"{role}2017").symlink_to(pictures)
        pairs = by_image(content)
        images = [{**image, "id": n + 1} for n, (image, _) in enumerate(pairs)]
        objects = [{**record, "image_id": n + 1} for n, (_, records) in enumerate(pairs) for record in records]
        objects = [{**record, "id": n + 1, "iscrowd": 0} for n, record in enumerate(objects)]
        content = {"images": images, "annotations": objects, "categories": content["categories"]}
        (root / "annotations" / f"{kind}_{role}2017.json").write_text(json.dumps(content))
    return root


def train_resume_and_score(rank, world_size, flags, out):
    """Train an epoch, then another after a resume, then only score; returns the exit codes."""
    stages = (
        ["--epochs", 1, "--output-dir", out],
        ["--epochs", 2, "--output-dir", out, "--resume", "auto"],
        [
            "--test-only",
            "--resume",
            out / "weights" / "checkpoint.pth",
            "--output-dir",
            out.with_name(f"{out.name}-again"),
        ],
    )
    return [train_on_rank(rank, world_size, [*flags, *stage], True) for stage in stages]


def run_of(dataset, path, out, model):
    """Return (losses and figures of every epoch and of the last scoring, weights, the dataset as stored)."""
    flags = ["--dataset", dataset, "--data-path", path, "--model", model, "--device", "cpu", "--workers", 0]
    flags += ["--keep-negatives", "--min-size", 64, "--max-size", 96, "--lr", 0.01, "--warmup-iters", 0]
    flags += ["--eval-every", 2, "--no-save-predictions"]
    assert run_on_ranks(2, train_resume_and_score, flags, out) == [[0, 0, 0]] * 2
    found = [*lines(out), *lines(out.with_name(f"{out.name}-again"))]
    content = load_checkpoint(out / "weights" / "checkpoint.pth")
    figures = [{k: line.get(k) for k in ("bbox", "keypoints", "per_class")} for line in found]
    losses = [{k: v for k, v in line["train"].items() if "loss" in k} for line in found if line.get("train")]
    assert len(losses) == 2 and figures[-2] == figures[-1]
    return figures, losses, content["model"], content["dataset"]


@pytest.mark.slow
def test_boxes_as_yolo_and_voc_train_resume_and_score_as_coco_does(tmp_path):
    splits = same_classes(read_splits(draw_coco(tmp_path / "drawn"), crowds=False))
    for content, _ in splits.values():
        for record in content["annotations"]:
            del record["segmentation"]
    paths = {
        "coco": write_coco_again(tmp_path / "coco", splits, "instances"),
        "yolo": write_yolo(tmp_path / "yolo", splits),
        "voc": write_voc(tmp_path / "voc", splits),
    }
    runs = {
        kind: run_of(kind, path, tmp_path / f"run-{kind}", "fasterrcnn_resnet50_fpn") for kind, path in paths.items()
    }
    for kind in ("yolo", "voc"):
        assert runs[kind][:2] == runs["coco"][:2] and runs[kind][3] == runs["coco"][3]
        assert all(torch.equal(value, runs["coco"][2][key]) for key, value in runs[kind][2].items())


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 17])
def test_keypoints_as_yolo_pose_train_resume_and_score_as_coco_does(tmp_path, count):
    splits = read_splits(draw_coco(tmp_path / "drawn", num_keypoints=count), "person_keypoints", crowds=False)
    for content, _ in splits.values():
        if count == 4:
            content["categories"][0]["keypoints"] = NAMES
        for record in content["annotations"]:
            del record["segmentation"]
    info = {"kpt_shape": [count, 3], "flip_idx": FLIP[count]}
    if count == 4:
        info["kpt_names"] = NAMES
    coco = write_coco_again(tmp_path / "coco", splits, "person_keypoints")
    yolo = write_yolo(tmp_path / "yolo", splits, rows="points", info=info)
    model = "keypointrcnn_resnet50_fpn"
    expected = run_of("coco_kp", coco, tmp_path / "run-coco", model)
    found = run_of("yolo", yolo, tmp_path / "run-yolo", model)
    assert found[:2] == expected[:2]
    assert {k: v for k, v in found[3].items() if k != "skeleton"} == {
        k: v for k, v in expected[3].items() if k != "skeleton"
    }
    assert all(torch.equal(value, expected[2][key]) for key, value in found[2].items())
