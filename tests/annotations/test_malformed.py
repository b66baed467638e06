"""A corpus of malformed datasets: each is refused before the first step, by a line that names the file and the field."""

import json
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

import coco_utils
from helpers.drawn import draw_coco, draw_folder
from loading.splits import Source, load_data

CUSTOM, COCO = "custom", "coco"


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    """A PNG of a few bytes that claims to be enormous."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


class Custom:
    """Edits of a drawn custom folder; the first training image is the victim."""

    def __init__(self, root):
        self.root = root
        self.json = root / "train" / "annotations" / "im_000.json"
        self.image = root / "train" / "images" / "im_000.png"

    def text(self, text):
        self.json.write_text(text)

    def entry(self, change):
        entry = json.loads(self.json.read_text())
        change(entry)
        self.json.write_text(json.dumps(entry))

    def box(self, box):
        self.entry(lambda e: e["bboxes"].__setitem__(0, box))

    def raw_box(self, text):
        self.box("HERE")
        self.text(self.json.read_text().replace('"HERE"', text))

    def per_box(self, name, values):
        self.entry(lambda e: e.__setitem__(name, [values] + [values] * (len(e["bboxes"]) - 1)))

    def points(self, points):
        self.entry(lambda e: e["keypoints"].__setitem__(0, points))

    def swap_image(self, data):
        self.image.write_bytes(data)

    def save_as(self, suffix, **image):
        self.image.unlink()
        Image.fromarray(**image).save(self.image.with_suffix(suffix))


def classes(root, *names):
    (root / "dataset.json").write_text(json.dumps({"classes": names}))


def rotate(c):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(c.image, exif=exif)
    c.entry(lambda e: e.update(bboxes=[[65, 5, 79, 30]], keypoints=[[[70, 6, 2], [71, 7, 2]]]))


def link_to(target):
    def edit(c):
        c.image.unlink()
        c.image.symlink_to(target)

    return edit


def corrupt_middle(c):
    data = bytearray(c.image.read_bytes())
    data[len(data) // 2] ^= 0xFF
    c.swap_image(bytes(data))


def to_xywh(c):
    for path in c.json.parent.iterdir():
        entry = json.loads(path.read_text())
        entry["bboxes"] = [[a, b, x - a, y - b] for a, b, x, y in entry["bboxes"]]
        path.write_text(json.dumps(entry))


def clear(c, boxes_only):
    for path in c.json.parent.iterdir():
        if boxes_only:
            path.write_text('{"bboxes": []}')
        else:
            path.unlink()
            (c.image.parent / f"{path.stem}.png").unlink()


def one_keypoint_in_val(c):
    for path in (c.root / "test" / "annotations").iterdir():
        entry = json.loads(path.read_text())
        entry["keypoints"] = [points[:1] for points in entry["keypoints"]]
        path.write_text(json.dumps(entry))


AT = r"im_000\.json: bboxes\[0\]"
POINTS_AT = r"im_000\.json: (bboxes|keypoints)\[0\]"

CUSTOM_CASES = {
    "A1 cut-off json": (lambda c: c.text('{"bboxes": ['), r"im_000\.json: not valid json at line 1 column 13"),
    "A1 empty json": (lambda c: c.text(""), r"im_000\.json: not valid json at line 1 column 1"),
    "A1 not UTF-8": (lambda c: c.json.write_bytes(b'{"bboxes": "\xe9"}'), r"im_000\.json: not UTF-8"),
    "A1 binary": (lambda c: c.json.write_bytes(bytes(range(256))), r"im_000\.json: not"),
    "A3 NaN": (lambda c: c.raw_box("[NaN, 1, 20, 20]"), r"im_000\.json: the number NaN at line 1 column \d+ is not allowed"),
    "A3 Infinity": (lambda c: c.raw_box("[1, 1, Infinity, 20]"), r"im_000\.json: the number Infinity at line 1 column \d+ is not allowed"),
    "A3 1e999": (lambda c: c.raw_box("[1, 1, 1e999, 20]"), AT + r": bbox is .*inf.*finite"),
    "A3 400 digits": (lambda c: c.raw_box(f"[1, 1, {'9' * 400}, 20]"), AT),
    "A3 5000 digits": (lambda c: c.raw_box(f"[1, 1, {'9' * 5000}, 20]"), r"im_000\.json: "),
    "A4 key twice": (lambda c: c.text('{"bboxes": [], "bboxes": []}'), r"im_000\.json: the key 'bboxes' occurs twice"),
    "A5 deep nesting": (lambda c: c.text('{"bboxes": ' + "[" * 100_000), r"im_000\.json: (nested too deeply|not valid)"),
    "A1 a list": (lambda c: c.text("[]"), r"im_000\.json: expected an object with a list 'bboxes'"),
    "A1 no boxes": (lambda c: c.entry(lambda e: e.pop("bboxes")), r"im_000\.json: expected an object with a list 'bboxes'"),
    "A1 boxes as object": (lambda c: c.text('{"bboxes": {}}'), r"im_000\.json: expected an object with a list 'bboxes'"),
    "A6 x2 < x1": (lambda c: c.box([40, 10, 20, 30]), AT + r".*has x2 <= x1"),
    "A6 y2 = y1": (lambda c: c.box([20, 30, 40, 30]), AT + r".*has y2 <= y1"),
    "A6 all zero": (lambda c: c.box([0, 0, 0, 0]), AT + r".*has x2 <= x1"),
    "A7 xywh": (to_xywh, r"these look like \[x, y, width, height\]"),
    "A8 partly outside": (lambda c: c.box([70, 10, 95, 30]), AT + r".*partly outside the image of 80 x 60"),
    "A8 negative": (lambda c: c.box([-20, 10, 30, 30]), AT + r".*partly outside"),
    "A9 outside": (lambda c: c.box([100, 100, 120, 130]), AT + r".*lies outside the image"),
    "A9 huge": (lambda c: c.box([1e300, 1e300, 1.5e300, 1.5e300]), AT),
    "A6 three numbers": (lambda c: c.box([1, 2, 3]), AT + r": bbox is \[1, 2, 3\], expected 4 finite numbers"),
    "A6 five numbers": (lambda c: c.box([1, 2, 3, 4, 5]), AT + r".*expected 4 finite numbers"),
    "A6 text": (lambda c: c.box("x"), AT + r": bbox is 'x', expected 4 finite numbers"),
    "A6 text inside": (lambda c: c.box([1, 2, "3o", 40]), AT + r".*expected 4 finite numbers"),
    "A6 null": (lambda c: c.box(None), AT + r": bbox is null"),
    "A6 null inside": (lambda c: c.box([1, 2, None, 40]), AT + r".*expected 4 finite numbers"),
    "A6 true inside": (lambda c: c.box([True, 2, 30, 40]), AT + r".*expected 4 finite numbers"),
    "A11 label 0": (lambda c: c.per_box("labels", 0), AT + r": label 0; 0 is background"),
    "A12 label too high": (lambda c: (classes(c.root, "a", "b"), c.per_box("labels", 3)), AT + r": label 3; .*1 to 2"),
    "A13 negative label": (lambda c: c.per_box("labels", -1), AT + r": label -1"),
    "A15 fraction as label": (lambda c: c.per_box("labels", 1.5), AT + r": label 1\.5"),
    "A12 unknown label": (lambda c: (classes(c.root, "a"), c.per_box("labels", "b")), AT + r": label 'b'; .*one of a"),
    "A12 list as label": (lambda c: c.per_box("labels", ["a"]), AT + r": label \['a'\]"),
    "A14 more labels": (lambda c: c.entry(lambda e: e.update(labels=["object"] * 9)), r"im_000\.json: labels: 9 entries for"),
    "A14 fewer labels": (lambda c: c.entry(lambda e: e.update(labels=[])), r"im_000\.json: labels: 0 entries for"),
    "A14 labels as text": (lambda c: c.entry(lambda e: e.update(labels="object")), r"im_000\.json: labels is 'object' for"),
    "A18 fewer keypoints": (lambda c: c.points([[10, 5, 2]]), r"keypoints"),
    "A18 other keypoints in val": (one_keypoint_in_val, r"test.*1 keypoints per object.*train has 2"),
    "A19 keypoints of other boxes": (lambda c: c.entry(lambda e: e["keypoints"].append([])), r"im_000\.json: keypoints: \d entries"),
    "A20 visibility 3": (lambda c: c.points([[10, 5, 3], [5, 5, 2]]), POINTS_AT + r".*visibilities 3, 2"),
    "A20 visibility -1": (lambda c: c.points([[10, 5, -1], [5, 5, 2]]), POINTS_AT + r".*visibilities -1, 2"),
    "A20 visibility null": (lambda c: c.points([[10, 5, None], [5, 5, 2]]), POINTS_AT),
    "A20 visibility half": (lambda c: c.points([[10, 5, 0.5], [5, 5, 2]]), POINTS_AT + r".*visibilities 0\.5"),
    "A21 keypoint 1e999": (
        lambda c: (c.points("HERE"), c.text(c.json.read_text().replace('"HERE"', "[[1e999, 5, 2], [5, 5, 2]]"))),
        POINTS_AT + r".*finite",
    ),
    "A21 keypoint outside": (lambda c: c.points([[100, 5, 2], [5, 5, 2]]), POINTS_AT + r".*keypoint 0 at \(100, 5\) lies outside"),
    "A22 point without v": (lambda c: c.points([[10, 5], [5, 5, 2]]), POINTS_AT + r".*point 0 is \[10, 5\]"),
    "A22 point as text": (lambda c: c.points(["x", [5, 5, 2]]), POINTS_AT + r".*point 0 is 'x'"),
    "A22 points as number": (lambda c: c.points(7), POINTS_AT + r".*expected a list of points"),
    "A22 text in a point": (lambda c: c.points([["ten", 5, 2], [5, 5, 2]]), POINTS_AT),
    "A26 odd polygon": (lambda c: c.per_box("segmentations", [[1, 2, 3, 4, 5, 6, 7]]), AT + r".*even number"),
    "A26 text polygon": (lambda c: c.per_box("segmentations", [[1, 2, 3, 4, 5, "x"]]), AT + r".*finite numbers"),
    "A26 mask of other size": (lambda c: c.per_box("segmentations", {"size": [5, 5], "counts": [25]}), AT + r".*mask has size"),
    "A31 negative area": (lambda c: c.per_box("area", -1), AT + r": area is -1"),
    "A31 area of 400 digits": (lambda c: c.per_box("area", 10**400), AT + r": area is"),
    "A31 area as text": (lambda c: c.per_box("area", "big"), AT + r": area is 'big'"),
    "A31 crowd flag 2": (lambda c: c.per_box("iscrowd", 2), AT + r": iscrowd is 2"),
    "A31 crowd flag a list": (lambda c: c.per_box("iscrowd", [1]), AT + r": iscrowd is \[1\]"),
    "A33 image without json": (lambda c: c.json.unlink(), r"im_000\.png: no annotation"),
    "A33 json without image": (lambda c: c.image.unlink(), r"im_000\.json: no image"),
    "A33 two images of a name": (lambda c: shutil.copy(c.image, c.image.with_suffix(".jpg")), r"im_000\.(png|jpg): .*same stem"),
    "A32 no object at all": (lambda c: clear(c, True), r"train: no objects to train on"),
    "A35 empty folder": (lambda c: clear(c, False), r"train/images: no pictures there; add the pictures"),
    "I2 image cut off": (lambda c: c.swap_image(c.image.read_bytes()[:-300]), r"im_000\.png: cannot decode the image"),
    "I3 image corrupt": (corrupt_middle, r"im_000\.png: cannot decode the image"),
    "I4 empty image": (lambda c: c.swap_image(b""), r"im_000\.png: cannot read the image header"),
    "I4 web page": (lambda c: c.swap_image(b"<html><body>404</body></html>"), r"im_000\.png: cannot read the image header"),
    "I7 boxes of the unrotated picture": (rotate, r"im_000\.png: EXIF turns the picture"),
    "I10 bomb": (lambda c: c.swap_image(png_bomb(20000, 20000)), r"im_000\.png: cannot read the image header: .*pixels"),
    "I10 half a bomb": (lambda c: c.swap_image(png_bomb(12000, 10000)), r"im_000\.png: cannot read the image header: .*pixels"),
    "link to nothing": (link_to("gone.png"), r"im_000\.json: no image .*im_000"),
    "link to a device": (link_to("/dev/zero"), r"im_000\.json: no image .*im_000"),
    "dataset.json cut off": (lambda c: (c.root / "dataset.json").write_text("{"), r"dataset\.json: not valid json"),
    "dataset.json flip pair": (
        lambda c: (c.root / "dataset.json").write_text('{"flip_pairs": [[0, 7]]}'), r"flip.pair",
    ),
    "dataset.json names": (
        lambda c: (c.root / "dataset.json").write_text('{"keypoint_names": ["a", "b", "c"]}'), r"3 keypoint names",
    ),
    "dataset.json sigmas": (
        lambda c: (c.root / "dataset.json").write_text('{"oks_sigmas": [0.1, 0.1, 0.1]}'), r"3 OKS sigmas",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_folder(root / CUSTOM, num_images=3)
    draw_coco(root / COCO, num_images=3)
    return root


def load(root, dataset, task):
    return load_data(Source(dataset, root, cache_dir=root.parent / "cache"), task)


def check_refused(root, dataset, task, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(root, dataset, task)
    lines = [line for line in str(caught.value).splitlines() if re.search(message, line)]
    assert lines, str(caught.value)
    assert str(root) in lines[0] or "dataset.json" in message or "sigmas" in lines[0] or "flip" in lines[0]
    assert all(len(line) < 1000 for line in lines)


@pytest.mark.parametrize("name", CUSTOM_CASES)
def test_a_malformed_folder_is_refused(drawn, tmp_path, name):
    change, message = CUSTOM_CASES[name]
    root = shutil.copytree(drawn / CUSTOM, tmp_path / CUSTOM)
    change(Custom(root))
    check_refused(root, CUSTOM, "mask" if name.startswith("A26") else "keypoint", message)


def in_file(change):
    def edit(root):
        path = root / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def of_image(**fields):
    return in_file(lambda c: c["images"][1].update(fields))


def of_object(**fields):
    return in_file(lambda c: c["annotations"][1].update(fields))


def image_bytes(change):
    def edit(root):
        path = root / "train2017" / "000001.png"
        path.write_bytes(change(path.read_bytes()))

    return edit


IMAGE_AT, OBJECT_AT = r"instances_train2017\.json: images\[1\]", r"instances_train2017\.json: annotations\[1\]"
TRAVERSAL = {
    "parent": "../secret.png",
    "hidden parent": "a/../../secret.png",
    "only parents": "../../..",
    "absolute": "/etc/passwd",
    "drive": "C:\\secret.png",
    "backslashes": "a\\..\\..\\secret.png",
    "share": "\\\\host\\secret.png",
    "NUL": "a.png\0.txt",
    "URL": "https://host/secret.png",
    "file URL": "file:///etc/passwd",
}
COCO_CASES = {
    "A3 box 1e999": (lambda root: (of_object(bbox="HERE")(root), _replace(root, '"HERE"', "[1, 1, 1e999, 5]")), OBJECT_AT),
    "A6 negative width": (of_object(bbox=[5, 5, -2, 3]), OBJECT_AT + r".*negative width"),
    "A9 outside": (of_object(bbox=[500, 5, 20, 30]), OBJECT_AT + r".*outside the image"),
    "A28 annotation id twice": (of_object(id=1), OBJECT_AT + r".*annotation id 1 is also that of"),
    "A29 image id twice": (of_image(id=10), IMAGE_AT + r": image id 10 is also that of"),
    "A29 image id too large": (of_image(id=1 << 70), IMAGE_AT),
    "A30 unknown image": (of_object(image_id=999), OBJECT_AT + r".*image_id 999 is not among"),
    "A30 unknown category": (of_object(category_id=999), OBJECT_AT + r".*category_id 999 is not among"),
    "A39 image id as list": (of_object(image_id=[10]), OBJECT_AT + r".*image_id is \[10\]"),
    "A12 category id too large": (in_file(lambda c: c["categories"][0].update(id=1 << 70)), r"categories\[0\]"),
    "A34 other size than the file": (of_image(width=81), r"000001\.png: the image is"),
    "I1 missing image": (lambda root: (root / "train2017" / "000001.png").unlink(), r"000001\.png: no such file"),
    "I2 image cut off": (image_bytes(lambda data: data[:-40]), r"000001\.png: "),
    "I4 empty image": (image_bytes(lambda data: b""), r"000001\.png: "),
    "I4 web page": (image_bytes(lambda data: b"<html></html>"), r"000001\.png: "),
    "A1 no categories": (in_file(lambda c: c.pop("categories")), r"instances_train2017\.json: .*'categories'"),
    "too many objects": (in_file(lambda c: c["annotations"].extend({**c["annotations"][1], "id": 1000 + k, "image_id": c["images"][1]["id"]} for k in range(10_001))), IMAGE_AT + r": 1000\d objects in one image are more than the limit of 10000"),
    "A32 no annotations": (in_file(lambda c: c.pop("annotations")), r"instances_train2017\.json: no objects to train on"),
    "A35 no images": (in_file(lambda c: (c["images"].clear(), c["annotations"].clear())), r"instances_train2017\.json: no objects"),
    **{f"file_name {kind}": (of_image(file_name=name), IMAGE_AT + r": file_name .* is a") for kind, name in TRAVERSAL.items()},
}  # fmt: skip


def _replace(root, old, new):
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("name", COCO_CASES)
def test_a_malformed_coco_dataset_is_refused(drawn, tmp_path, name):
    change, message = COCO_CASES[name]
    root = shutil.copytree(drawn / COCO, tmp_path / COCO)
    change(root)
    check_refused(root, COCO, "box", message)


def test_the_corpus_is_large_and_its_originals_are_sound(drawn):
    assert len(CUSTOM_CASES) + len(COCO_CASES) >= 60
    for dataset, task in ((CUSTOM, "keypoint"), (COCO, "mask")):
        assert load(drawn / dataset, dataset, task).train.annotations.warnings == ()


def test_a_json_bomb_by_size_is_refused(drawn, monkeypatch):
    monkeypatch.setattr(coco_utils, "MAX_JSON_BYTES", 1000)
    check_refused(drawn / COCO, COCO, "box", r"instances_train2017\.json: \d+ bytes are more than the limit of 1000")


@pytest.mark.parametrize("kind", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_unusual_pictures_give_no_false_alarm(drawn, tmp_path, kind):
    root = shutil.copytree(drawn / CUSTOM, tmp_path / CUSTOM)
    path = root / "train" / "images" / "im_000.png"
    if kind == "I;16":
        Image.fromarray(np.full((60, 80), 30000, np.uint16)).save(path)
    elif kind in ("CMYK", "F"):
        Image.open(path).convert(kind).save(path.with_suffix(".jpg" if kind == "CMYK" else ".tif"))
        path.unlink()
    else:
        Image.open(path).convert(kind).save(path)
    data = load(root, CUSTOM, "keypoint")
    assert len(data.train.indices) == 3 and data.train.annotations.warnings == ()


def test_real_data_gives_no_false_alarm(tiny_coco, glue_tubes, caplog):
    for dataset, root, task in (
        ("coco", tiny_coco, "mask"),
        ("coco_kp", tiny_coco, "keypoint"),
        ("custom", glue_tubes, "keypoint"),
    ):
        data = load_data(Source(dataset, root, cache_dir=glue_tubes.parent / "cache"), task)
        for split in (data.train, data.val):
            assert split.annotations.warnings == () and len(split.indices) == len(split.annotations)
