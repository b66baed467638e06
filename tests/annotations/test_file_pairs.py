"""A folder whose pictures and jsons do not belong together: one line each, with advice that fits the cause."""

import re

import pytest

from annotations.findings import BadDataError
from helpers.drawn import draw_folder, edit
from loading.splits import Source, load_data


def lines_of(root):
    with pytest.raises((BadDataError, FileNotFoundError)) as caught:
        load_data(Source("custom", root, cache_dir=root / "cache"), "box")
    lines = str(caught.value).replace(str(root), ".").splitlines()
    return lines[1:] if isinstance(caught.value, BadDataError) else lines


def rename_all(folder, change, target=None):
    for path in list(folder.iterdir()):
        path.rename((target or folder) / change(path.name))


def swap(root):
    (root / "train/images").rename(root / "x")
    (root / "train/annotations").rename(root / "train/images")
    (root / "x").rename(root / "train/annotations")


JSONS, IMAGES = "./train/annotations", "./train/images"
FAULTS = {
    "labels of YOLO": (
        lambda root: rename_all(root / "train/annotations", lambda name: name.replace(".json", ".txt")),
        [f"{JSONS}: no json for any of 6 pictures; .*im_000.txt.*; --dataset yolo reads such files"],
    ),
    "xmls of VOC": (
        lambda root: rename_all(root / "train/annotations", lambda name: name.replace(".json", ".XML")),
        [f"{JSONS}: no json for any .*; --dataset voc reads such files, see docs/own_data.md"],
    ),
    "jsons beside the pictures": (
        lambda root: rename_all(root / "train/annotations", str, root / "train/images"),
        [f"{JSONS}: no json for any .* holds nothing; the jsons in {IMAGES} belong there"],
    ),
    "pictures beside the jsons": (
        lambda root: rename_all(root / "train/images", str, root / "train/annotations"),
        [f"{IMAGES}: no pictures there; {JSONS} has 6 of them: move them there"],
    ),
    "folders swapped": (swap, [f"{IMAGES}: no pictures there; {JSONS} has 6 of them: move them there"]),
    "a picture's suffix in the jsons' names": (
        lambda root: rename_all(root / "train/annotations", lambda name: name.replace(".json", ".png.json")),
        [
            f"{JSONS}: 6 of 6 belong to no file, .*; {IMAGES}/im_000.png differs by a picture's suffix in its name; add",
            f"{IMAGES}: 6 of 6 belong to no file, .*; {JSONS}/im_000.png.json differs by a picture's suffix in its name",
        ],
    ),
    "val for test": (
        lambda root: (root / "test").rename(root / "val"),
        ["./test/images: no such folder; expected ./test/images and .* per image; is ./val meant?"],
    ),
    "another case": (
        lambda root: (root / "train").rename(root / "Train"),
        ["./train/images: no such folder, but ./Train differs in upper and lower case; expected"],
    ),
    "another name for boxes": (
        lambda root: edit(root, lambda entry: entry.update(boxes=entry.pop("bboxes"))),
        [f"{JSONS}/im_000.json: expected an object with a list 'bboxes', .*; call 'boxes' 'bboxes', with"],
    ),
    "one label for all": (
        lambda root: edit(root, lambda entry: entry.update(labels="a")),
        [f"{JSONS}/im_000.json: labels is 'a' for 1 boxes; give labels one entry per box"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_advice_fits_the_cause(tmp_path, name):
    """Both splits number their pictures alike, so the other split always seems to have what is missing."""
    root = draw_folder(tmp_path / "custom", num_keypoints=0)
    change, expected = FAULTS[name]
    change(root)
    lines = lines_of(root)
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected):
        assert re.match(pattern, line), line
