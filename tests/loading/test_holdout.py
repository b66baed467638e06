"""A validation split held out: every picture's side follows from its content, copies stay together, runs keep theirs."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import check_dataset
from helpers.drawn import draw_coco
from helpers.formats import plain_coco, write_voc, write_yolo
from helpers.runs import QUICK, run
from loading.holdout import Holdout
from loading.splits import Source, load_data

NAMES = ("cat", "dog", "owl")


def draw_picture(path, seed):
    """Draw a picture that looks like no other; returns its box."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    coarse.resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return [*rng.integers(0, 20, 2).tolist(), *rng.integers(10, 25, 2).tolist()]


def draw_pool(root, num_images=24, *, first=0):
    """Write a COCO file of pictures without a validation split; every twelfth has the class owl."""
    pictures = root / "train2017"
    pictures.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for k in range(first, first + num_images):
        box = draw_picture(pictures / f"{k:03d}.png", k)
        images.append({"id": k + 1, "file_name": f"{k:03d}.png", "height": 48, "width": 64})
        objects.append({"id": k + 1, "image_id": k + 1, "category_id": 3 if k % 12 == 5 else 1 + k % 2, "bbox": box})
    return write_pool(root, images, objects)


def write_pool(root, images, objects):
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return content


def add_copy(root, content, name, of):
    """Add a picture that was saved anew, with the box of the first."""
    Image.open(root / "train2017" / of).save(root / "train2017" / name, quality=60)
    number = max(image["id"] for image in content["images"]) + 1
    (old,) = (image for image in content["images"] if image["file_name"] == of)
    (box,) = (record for record in content["annotations"] if record["image_id"] == old["id"])
    content["images"].append({**old, "id": number, "file_name": name})
    content["annotations"].append({**box, "id": number, "image_id": number})
    write_pool(root, content["images"], content["annotations"])


def load(root, fraction=0.25, dataset="coco", **options):
    source = Source(dataset, root, cache_dir=root.parent / "cache", val_fraction=fraction, seed=options.pop("seed", 0))
    return load_data(source, "box", **options)


def names_of(split):
    return {split.annotations.file_name(i).rpartition("/")[2] for i in split.indices.tolist()}


def random_digests(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(8).hex() for _ in range(count)]


def test_a_side_follows_from_content_seed_and_share_alone():
    digests = random_digests(3000)
    alone = np.arange(len(digests))
    is_val = Holdout(0.2, 0).place(digests, alone)
    assert abs(is_val.mean() - 0.2) < 3 * np.sqrt(0.2 * 0.8 / len(digests))
    some = np.random.default_rng(1).permutation(len(digests))[:700]  # fewer, in another order
    np.testing.assert_array_equal(Holdout(0.2, 0).place([digests[k] for k in some], alone[:700]), is_val[some])
    assert (Holdout(0.3, 0).place(digests, alone) >= is_val).all()
    assert 0.05 < (Holdout(0.2, 1).place(digests, alone) & is_val).mean() / 0.2 < 0.35


def test_the_smallest_digest_decides_for_a_group_and_known_pictures_stay():
    digests = sorted(random_digests(60))
    alone = Holdout(0.5, 0).place(digests, np.arange(60))
    first_val, first_train = int(np.flatnonzero(alone)[0]), int(np.flatnonzero(~alone)[0])
    for smallest in (first_val, first_train):
        groups = np.where(np.arange(60) < smallest, np.arange(60), 99)
        assert (Holdout(0.5, 0).place(digests, groups)[smallest:] == alone[smallest]).all()
    # A new picture with a smaller digest joins a known one: that one's side, whatever the draw.
    one, other = digests[first_val], digests[first_train]
    known = Holdout(0.5, 0, train=frozenset([one]), val=frozenset([other]))
    smaller = "0" * 16
    assert known.place([smaller, one], np.zeros(2)).tolist() == [False, False]
    assert known.place([other, smaller], np.zeros(2)).tolist() == [True, True]
    # It links two known ones of different sides: both stay.
    assert known.place([one, smaller, other], np.zeros(3))[[0, 2]].tolist() == [False, True]


def test_a_checkpoint_keeps_the_sides_in_plain_values():
    digests = random_digests(9)
    kept = Holdout(0.3, 7, frozenset(digests[:5]), frozenset(digests[5:]))
    known = {"holdout": json.loads(json.dumps(kept.to_plain()))}
    assert Holdout.asked(None, 0, known) == Holdout.asked(0.3, 0, known) == kept
    assert (
        Holdout.asked(None, 0, {"holdout": None}) is Holdout.asked(None, 0, {}) is Holdout.asked(None, 0, None) is None
    )
    assert Holdout.asked(0.3, 7, {}) == Holdout(0.3, 7)
    with pytest.raises(
        ValueError, match=r"--val-fraction 0\.2: the checkpoint's is 0\.3; .*: give the same, or leave it"
    ):
        Holdout.asked(0.2, 0, known)


def write_as(dataset, root, pool):
    """Write the pool in the layout of a dataset; returns its ``--data-path``."""
    content = json.loads((pool / "annotations" / "instances_train2017.json").read_text())
    splits = {"train": (plain_coco(content), pool / "train2017")}
    if dataset == "yolo":
        path = write_yolo(root, splits)
        path.write_text(path.read_text().replace("val: images/val\n", ""))
        return path
    if dataset == "voc":
        return write_voc(root, splits, ("train",))
    if dataset == "custom":
        for folder in ("images", "annotations"):
            (root / "train" / folder).mkdir(parents=True)
        for image, record in zip(content["images"], content["annotations"]):
            x, y, w, h = record["bbox"]
            shutil.copy(pool / "train2017" / image["file_name"], root / "train" / "images")
            entry = {"bboxes": [[x, y, x + w, y + h]], "labels": [NAMES[record["category_id"] - 1]]}
            (root / "train" / "annotations" / image["file_name"]).with_suffix(".json").write_text(json.dumps(entry))
        return root
    return pool


@pytest.mark.parametrize("dataset", ["coco", "custom", "yolo", "voc"])
def test_the_same_pictures_are_held_out_whatever_the_format(tmp_path, dataset):
    draw_pool(tmp_path / "pool")
    expected = load(tmp_path / "pool")
    path = write_as(dataset, tmp_path / "set", tmp_path / "pool")
    with pytest.raises(FileNotFoundError, match=r"; or give --val-fraction 0\.2 to hold out a fifth"):
        load(path, None, dataset)
    data = load(path, dataset=dataset)
    held = {name.removeprefix("train_") for name in names_of(data.val)}
    assert held == names_of(expected.val) and 0 < len(held) < 12
    assert {name.removeprefix("train_") for name in names_of(data.train)} == names_of(expected.train)
    assert len(data.train.indices) + len(data.val.indices) == 24
    test_only = load(path, dataset=dataset, test_only=True)
    assert test_only.train is None and names_of(test_only.val) == names_of(data.val)


@pytest.mark.parametrize("dataset", ["coco", "shapes"])
def test_data_with_a_validation_split_are_not_divided(tmp_path, dataset):
    draw_coco(tmp_path / "set")
    with pytest.raises(ValueError, match=r"--val-fraction is for data without a validation split, and .*val.* is one"):
        load(tmp_path / "set", dataset=dataset)


def test_annotations_that_flags_name_wrongly_are_no_missing_split(tmp_path):
    draw_pool(tmp_path / "pool")
    paths = {"val": (None, str(tmp_path / "val.json"))}
    with pytest.raises(FileNotFoundError, match=r"no val annotations: .*val\.json does not exist.*val-annotations$"):
        load_data(Source("coco", tmp_path / "pool", paths=paths, val_fraction=0.2), "box")


def test_copies_stay_together_and_on_the_side_that_a_checkpoint_knows(tmp_path, caplog, monkeypatch):
    root = tmp_path / "pool"
    content = draw_pool(root)
    before = load(root)
    doubled = [*sorted(names_of(before.val)), *sorted(names_of(before.train))]
    for name in doubled:  # of so many some copies have the smaller digest, and their draw decides in a new run
        add_copy(root, content, f"{name[:3]}_copy.jpg", name)
    for data, known in ((load(root), None), (load(root, None, known=before.to_plain()), before)):
        sides = [{name[:3] for name in names_of(split)} for split in (data.train, data.val)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 24
        if known is None:
            assert sides[1] != {name[:3] for name in names_of(before.val)}
        else:
            assert sides[1] == {name[:3] for name in names_of(before.val)}
    with caplog.at_level(logging.INFO):
        again = load(root, None, known=before.to_plain())
    assert "holds out" in caplog.text and "of 48 pictures" in caplog.text and "24 of them as in the ch" in caplog.text
    assert "48 pictures in 24 group(s) of (nearly) the same stay together, the largest has 2" in caplog.text
    with monkeypatch.context() as patch:  # all are known now
        patch.setattr("loading.holdout.group_equal", lambda prints: pytest.fail("compared"))
        assert names_of(load(root, None, known=again.to_plain()).val) == names_of(again.val)


def test_pictures_that_are_added_move_no_other(tmp_path):
    content = draw_pool(tmp_path / "few")
    before = load(tmp_path / "few")
    more = draw_pool(tmp_path / "many", 40, first=100)
    shutil.copytree(tmp_path / "few" / "train2017", tmp_path / "many" / "train2017", dirs_exist_ok=True)
    write_pool(tmp_path / "many", *(content[key] + more[key] for key in ("images", "annotations")))
    after = load(tmp_path / "many")
    assert names_of(before.val) == names_of(after.val) & {f"{k:03d}.png" for k in range(24)}
    assert len(names_of(after.val)) > len(names_of(before.val))
    # A picture that a checkpoint knows stays where it is even if it is drawn in another way now.
    known = before.to_plain()
    known["holdout"] = {**known["holdout"], "train": known["holdout"]["val"], "val": known["holdout"]["train"]}
    assert names_of(load(tmp_path / "few", None, known=known).val) == names_of(before.train)


def test_a_share_that_leaves_one_side_empty_is_one_line(tmp_path):
    content = draw_pool(tmp_path / "pool", 2)
    shutil.copy(tmp_path / "pool/train2017/000.png", tmp_path / "pool/train2017/001.png")
    write_pool(tmp_path / "pool", content["images"], content["annotations"])
    with pytest.raises(
        ValueError, match=r"holds out 0 of 2 pictures; 2 pictures in 1 group.*: choose another --val-fr"
    ):
        load(tmp_path / "pool", 0.01)


def test_classes_on_one_side_only_are_warned_of(tmp_path, caplog):
    draw_pool(tmp_path / "pool", 24)
    data = load(tmp_path / "pool", 0.1, seed=3)
    annotations = data.train.annotations
    has_owl = {annotations.file_name(int(i)) for i in annotations.object_images()[annotations.category_ids == 3]}
    assert (
        not has_owl & names_of(data.val) and "1 of 3 classes have no object among the pictures held out" in caplog.text
    )
    caplog.clear()
    known = data.to_plain()  # the same, the other way round
    known["holdout"] = {**known["holdout"], "train": known["holdout"]["val"], "val": known["holdout"]["train"]}
    load(tmp_path / "pool", None, known=known)
    assert "1 of 3 classes have all their objects on pictures held out, and cannot be learned: owl" in caplog.text


def test_a_run_trains_on_one_side_scores_the_other_and_goes_on_so(tmp_path, capsys):
    root, out = tmp_path / "pool", tmp_path / "run"
    content = draw_pool(root, 12)
    held = names_of(load(root).val)
    flags = ["--device", "cpu", "--workers", "0", "--data-path", root, "--cache-dir", tmp_path / "cache"]
    model = ["--model", "ssdlite320_mobilenet_v3_large"]
    assert run(*QUICK, *flags, *model, "--output-dir", out, "--val-fraction", "0.25", "--eval-every", "0") == 0
    text, number = capsys.readouterr().out, len(held)
    assert f"trains on {12 - number} of {12 - number} images, is scored on {number}\n" in text
    pattern = (
        rf"split +{12 - number} pictures \+ {number} held out \(--val-fraction 0\.25, seed 0\), objects: \w+ \d+ \+"
    )
    assert re.search(pattern, text)
    assert f"objects: {12 - number} to train on\n" in text  # those of pictures held out are not among those left out
    add_copy(root, content, "copy.jpg", min(held))
    checkpoint = ["--resume", out / "weights/checkpoint.pth", "--output-dir", tmp_path / "test"]
    assert run(*flags, "--test-only", *checkpoint) == 0
    assert "of 13 pictures by their content and seed 0, 12 of them as in the checkpoint" in capsys.readouterr().out
    results = json.loads((tmp_path / "test/predictions_bbox.json").read_text())
    ids = {image["id"] for image in content["images"] if image["file_name"] in held | {"copy.jpg"}}
    assert {record["image_id"] for record in results} == ids


def test_the_doctor_divides_alike_and_writes_both_sides(tmp_path, capsys):
    draw_pool(tmp_path / "pool")
    flags = [
        "--data-path",
        str(tmp_path / "pool"),
        "--model",
        "fasterrcnn_resnet50_fpn",
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    assert check_dataset.run([*flags, "--workers", "1"]) == 1 and "--val-fraction 0.2" in capsys.readouterr().out
    assert check_dataset.run([*flags, "--val-fraction", "0.25", "--write-coco", str(tmp_path / "out")]) == 0
    data = load(tmp_path / "pool")
    text, held = capsys.readouterr().out, len(data.val.indices)
    assert f"--val-fraction 0.25 holds out {held} of 24 pictures" in text
    for number in (24 - held, held):
        assert f"  {number} images ({number} of 64 x 48 pixels), 0 without objects\n  {number} objects: " in text
    for role, split in (("train", data.train), ("val", data.val)):
        written = json.loads((tmp_path / "out" / f"{role}.json").read_text())
        assert {image["file_name"] for image in written["images"]} == names_of(split)
