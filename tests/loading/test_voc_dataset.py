"""Pascal VOC's layout: read as it stands, and whatever is wrong with it is one line with file and place."""

import re
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image

from annotations.findings import BadDataError
from coco_eval import CocoEvaluator
from evaluation.detections import Detections
from helpers.formats import annotations_of, figures, read_splits, same_classes, write_voc
from loading.samples import trainable_objects
from loading.splits import Source, load_data
from loading.voc_dataset import find_list, load_voc_split

WIDTH, HEIGHT = 80, 60


def xml(*objects, size=(WIDTH, HEIGHT), head=""):
    """Return an annotation of (name, corners, difficult) objects."""
    sizes = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    body = ""
    for name, corners, difficult in objects:
        tags = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
        body += f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{tags}</bndbox></object>"
    return f"{head}<annotation>{sizes}{body}</annotation>"


def draw_voc(root, lists=("train", "val")):
    """Write pictures a.jpg and b.jpg of the first list, c.jpg and d.jpg of the second."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for k, stem in enumerate("abcd"):
        Image.new("RGB", (WIDTH, HEIGHT), (50 * k, 90, 90)).save(root / "JPEGImages" / f"{stem}.jpg")
        objects = [("dog", (11, 21, 30, 40), 0), ("cat", (1, 1, 80, 60), 0)]
        (root / "Annotations" / f"{stem}.xml").write_text(xml(*objects))
    for stems, name in zip(("b\na\n", "c\nd\n"), lists):
        (root / "ImageSets/Main" / f"{name}.txt").write_text(stems)
    return root


def load(root, **options):
    return load_data(Source("voc", root, cache_dir=root / "cache", **options), "box")


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_boxes_count_pixels_from_one_and_classes_are_sorted(tmp_path):
    data = load(draw_voc(tmp_path))
    annotations = data.train.annotations
    assert annotations.boxes_xywh[:2].tolist() == [[10, 20, 20, 20], [0, 0, 80, 60]]
    assert annotations.areas[:2].tolist() == [400, 4800]
    assert annotations.categories == ((1, "cat"), (2, "dog")) and annotations.category_ids[:2].tolist() == [2, 1]
    assert [annotations.file_name(i) for i in range(2)] == ["a.jpg", "b.jpg"]  # by name, not as listed
    assert annotations.image_ids.tolist() == [1, 2]
    assert abs(int(data.train.images.read(annotations, 1)[0, 0, 0]) - 50) < 5


def test_parts_of_an_object_are_not_objects(tmp_path):
    root = draw_voc(tmp_path)
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part></object>"
    path = root / "Annotations/a.xml"
    path.write_text(path.read_text().replace("</object>", part))
    assert load(root).train.annotations.num_objects == 4


def test_the_labels_of_a_class_stay_those_of_training(tmp_path, caplog):
    root = draw_voc(tmp_path)
    (root / "Annotations/c.xml").write_text(xml(("dog", (1, 1, 9, 9), 0), ("ant", (1, 1, 9, 9), 0)))
    (root / "Annotations/d.xml").write_text(xml())
    data = load(root)
    assert data.label_map.names == ("cat", "dog")
    assert data.val.annotations.categories == ((1, "cat"), (2, "dog"), (3, "ant"))
    assert data.val.annotations.category_ids.tolist() == [2, 3]
    assert np.diff(data.val.annotations.object_starts).tolist() == [2, 0]
    assert any("classes that the model does not know count as missed: ant" in m for m in messages(caplog))
    (root / "Annotations/c.xml").write_text(xml(("dog", (1, 1, 9, 9), 0)))
    source = Source("voc", root, cache_dir=root / "cache")
    known = load_data(source, "box", known=data.to_plain(), test_only=True)
    assert known.val.annotations.category_ids.tolist() == [2] and known.label_map == data.label_map


def test_a_difficult_object_is_not_trained_on_and_neither_missed_nor_wrong_when_found(tmp_path):
    root = draw_voc(tmp_path)
    dog, hard = ("dog", (11, 21, 30, 40), 0), ("dog", (41, 1, 80, 60), 1)
    for stem in "ac":
        (root / f"Annotations/{stem}.xml").write_text(xml(dog, hard))
    data = load(root)
    annotations = data.val.annotations
    assert annotations.is_crowd.tolist() == [False, True, False, False]
    assert trainable_objects(data.train.annotations, 0)[0].tolist() == [0]
    for found in ([0], [0, 1], [0, 1, 1]):  # the difficult one missed, found, found twice
        evaluator = CocoEvaluator(annotations, ["bbox"], indices=np.array([0]))
        ids, boxes = annotations.category_ids[found], annotations.boxes_xywh[found]
        evaluator.add(1, Detections(ids, np.linspace(0.8, 0.9, len(found)), boxes))
        assert evaluator.compute().metrics["bbox"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (["train", "val", "trainval", "test"], ["train", "val"]),
        (["trainval", "test"], ["trainval", "test"]),
        (["train", "trainval", "test"], ["trainval", "test"]),
        (["train", "test"], ["train", "test"]),
        (["train", "trainval", "val"], ["train", "val"]),
    ],
)
def test_which_lists_are_the_splits(tmp_path, lists, expected):
    root = draw_voc(tmp_path, lists=())
    for name in lists:
        (root / "ImageSets/Main" / f"{name}.txt").write_text("a\n")
    assert [find_list(root, role).stem for role in ("train", "val")] == expected


def test_a_missing_list_or_folder_says_what_is_expected(tmp_path):
    root = draw_voc(tmp_path / "VOCdevkit/VOC2012", lists=("train",))
    with pytest.raises(FileNotFoundError, match=r"no list of val pictures: neither .*val\.txt nor .*test\.txt exists"):
        load(root)
    with pytest.raises(FileNotFoundError, match=r"Annotations: no such folder; .*did you mean .*VOCdevkit/VOC2012\?"):
        load_voc_split(tmp_path / "VOCdevkit", "train")


def moved(root, layout):
    """Bring what `draw_voc` has written into a layout of annotation tools, where a and b are to be trained on."""
    shutil.rmtree(root / "ImageSets")
    for path in [*(root / "JPEGImages").iterdir(), *(root / "Annotations").iterdir()]:
        folder = root / layout.format(
            split="train" if path.stem in "ab" else "valid", kind="images" if path.suffix == ".jpg" else "annotations"
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    (root / "JPEGImages").rmdir()
    (root / "Annotations").rmdir()


@pytest.mark.parametrize("layout", ["{split}", "{split}/{kind}"])
def test_splits_are_folders_where_there_are_no_lists(tmp_path, layout):
    lists = load(draw_voc(tmp_path / "lists"))
    moved(draw_voc(tmp_path / "folders"), layout)
    data = load(tmp_path / "folders")
    for found, expected in ((data.train, lists.train), (data.val, lists.val)):
        assert [found.annotations.file_name(i) for i in (0, 1)] == [expected.annotations.file_name(i) for i in (0, 1)]
        assert (found.annotations.boxes_xywh == expected.annotations.boxes_xywh).all()
        assert found.annotations.categories == expected.annotations.categories
    assert abs(int(data.val.images.read(data.val.annotations, 1)[0, 0, 0]) - 150) < 5


@pytest.mark.parametrize("layout", ["", "{kind}", "JPEGImages"])
def test_without_splits_all_pictures_are_to_be_trained_on_or_held_out(tmp_path, layout):
    root = draw_voc(tmp_path / "data")
    if layout == "JPEGImages":
        shutil.rmtree(root / "ImageSets")
    else:
        moved(root, layout)
    data = load(root, val_fraction=0.5, seed=1)
    assert len(data.train.indices) + len(data.val.indices) == 4 and len(data.train.annotations) == 4
    with pytest.raises(
        FileNotFoundError, match=r"no val pictures: neither .*ImageSets/Main .*; or give --val-fraction"
    ):
        load(root)


def test_a_file_without_its_partner_is_named_where_there_are_no_lists(tmp_path):
    root = draw_voc(tmp_path / "data")
    moved(root, "{split}")
    (root / "train/a.xml").unlink()
    (root / "valid/c.jpg").unlink()
    for role, text in (
        ("train", r"a\.jpg: no annotation .*a\.xml; add it \(without objects .*\) or remove the picture"),
        ("val", r"c\.xml: no picture .*c\.\*; add it or remove the xml"),
    ):
        with pytest.raises(BadDataError, match=text):
            load_voc_split(root, role, cache_dir=tmp_path / "cache")
        split = load_voc_split(root, role, cache_dir=tmp_path / "cache", on_bad_data="skip")
        assert len(split.indices) == 1


def test_a_folder_that_was_read_before_is_read_again_when_an_xml_has_changed(tmp_path):
    root = draw_voc(tmp_path / "data")
    moved(root, "{split}")
    assert load(root).train.annotations.num_objects == load(root).train.annotations.num_objects == 4
    assert load(root).train.annotations.cache_file is not None
    (root / "train/a.xml").write_text(xml(("dog", (1, 1, 9, 9), 0)))
    assert load(root).train.annotations.num_objects == 3


def test_a_size_that_is_missing_is_the_pictures_own(tmp_path, caplog):
    root = draw_voc(tmp_path)
    (root / "Annotations/a.xml").write_text(xml(("dog", (11, 21, 30, 40), 0), size=None))
    (root / "Annotations/b.xml").write_text(xml(("dog", (11, 21, 30, 40), 0), size=(0, 0)))
    annotations = load(root).train.annotations
    assert annotations.widths.tolist() == [WIDTH] * 2 and annotations.heights.tolist() == [HEIGHT] * 2
    assert any(re.search(r"a\.xml: no size of the picture, and 1 more like it", m) for m in messages(caplog))


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH)])
def test_a_size_says_whether_a_picture_is_meant_as_stored_or_as_shown(tmp_path, size):
    root = draw_voc(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/a.jpg", exif=exif)
    (root / "Annotations/a.xml").write_text(xml(("dog", (11, 21, 30, 40), 0), size=size))
    split = load(root).train
    assert split.images.read(split.annotations, 0).shape == (size[1], size[0], 3)


def test_boxes_from_zero_are_remarked_once(tmp_path, caplog):
    root = draw_voc(tmp_path)
    (root / "Annotations/a.xml").write_text(xml(("dog", (0, 0, 30, 40), 0), ("dog", (0, 5, 30, 40), 0)))
    assert load(root).train.annotations.boxes_xywh[0].tolist() == [-1, -1, 31, 41]
    text = (
        r"a\.xml: object\[0\]: box \[0, 0, 30, 40\] begins at 0, and 1 more like it; pixels are taken to count from 1"
    )
    assert sum(re.search(text, m) is not None for m in messages(caplog)) == 1


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
DOG = ("dog", (11, 21, 30, 40), 0)

BAD_XMLS = {
    "bomb": (xml(("&b;", DOG[1], 0), head=LAUGHS), r"a\.xml: entities are not read \(EntitiesForbidden\); remove its D"),
    "file": (xml(("&a;", DOG[1], 0), head=OUTSIDE), r"a\.xml: entities are not read \(EntitiesForbidden\)"),
    "cut": (xml(DOG)[:-20], r"a\.xml: not valid xml at line 1 column \d+: no element found|unclosed token"),
    "empty": ("", r"a\.xml: not valid xml at line 1 column 1: no element found"),
    "coding": ('<?xml version="1.0" encoding="nonsense"?><annotation/>', r"a\.xml: not valid xml.*: unknown encoding"),
    "bytes": (b"<annotation>\xff</annotation>", r"a\.xml: not UTF-8 text \(byte 12\); save it as UTF-8, or declare its"),
    "root": ("<annotations/>", r"a\.xml: expected <annotation>, got <annotations>"),
    "size": (xml(DOG, size=(HEIGHT, WIDTH)), r"a\.xml: its size is 60 x 80, but .*a\.jpg has 80 x 60 pixels"),
    "no size": (xml(DOG, size=("x", 60)), r"a\.xml: size is 'x' x '60', expected a whole number of pixels"),
    "name": (xml(("", DOG[1], 0)), r"a\.xml: object\[0\]: name is missing, expected a name"),
    "difficult": (xml(("dog", DOG[1], 2)), r"a\.xml: object\[0\]: difficult is '2', expected 0 or 1"),
    "no box": ("<annotation><object><name>dog</name></object></annotation>", r"object\[0\]: no bndbox with xmin, ymin"),
    "number": (xml(("dog", (11, "x", 30, 40), 0)), r"object\[0\]: ymin is 'x', expected a number"),
    "three": (xml(("dog", (11, 21, 30), 0)), r"object\[0\]: ymax is missing, expected a number"),
    "nan": (xml(("dog", (11, "nan", 30, 40), 0)), r"object\[0\]: a corner of \[11, nan, 30, 40\] is no place in a pict"),
    "order": (xml(("dog", (30, 21, 11, 40), 0)), r"object\[0\]: box \[30, 21, 11, 40\] has xmax < xmin"),
    "outside": (xml(("dog", (91, 21, 99, 40), 0)), r"object\[0\]: box \[91, 21, 99, 40\] lies outside the image of 80 x 60"),
    "shares": (xml(("dog", (0.1, 0.2, 0.5, 0.9), 0)), r"object\[0\]: box \[0\.1, 0\.2, 0\.5, 0\.9\]: boxes look normalised"),
    "capitals": (xml(DOG).replace("object", "Object"), r"a\.xml: <Object>, expected <object>; correct the tag"),
    "nested": (f"<annotation><objects>{xml(DOG)}</objects></annotation>", r"a\.xml: <objects>, expected <object>"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_XMLS)
def test_a_wrong_xml_is_one_line_and_can_be_skipped(tmp_path, case):
    text, message = BAD_XMLS[case]
    root = draw_voc(tmp_path)
    (root / "Annotations/a.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadDataError) as error:
        load(root)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and re.search(message, lines[1]), lines
    assert load(root, on_bad_data="skip").train.annotations.num_objects == 2


def test_pictures_and_xmls_without_each_other_are_named(tmp_path, caplog):
    root = draw_voc(tmp_path)
    listing = root / "ImageSets/Main/train.txt"
    listing.write_text("a\nb\nb\n")
    (root / "Annotations/b.xml").rename(root / "Annotations/B.xml")
    with pytest.raises(
        BadDataError, match=r"train\.txt: line 2: no annotation .*b\.xml; .*B\.xml differs in upper and"
    ):
        load(root)
    listing.write_text("a\na\nz\n")
    with pytest.raises(BadDataError, match=r"train\.txt: line 3: no picture .*JPEGImages/z\.\*; add it or remove"):
        load(root)
    assert len(load(root, on_bad_data="skip").train.annotations) == 1
    assert any("line 2: a is listed before; it is used once" in m for m in messages(caplog))
    assert any(
        re.search(r"1 picture\(s\) that no entry of .*train\.txt names are not used: b\.jpg", m)
        for m in messages(caplog)
    )
    listing.write_text("a.jpg\nb.jpg\n")
    for on_bad_data in ("error", "skip"):
        with pytest.raises(
            BadDataError, match=r"^1 error.*\n.*train\.txt: 2 of 2 belong to no file, such as .*line 1: .*stem\)$"
        ):
            load(root, on_bad_data=on_bad_data)
    listing.write_text("\n")
    with pytest.raises(BadDataError, match=r"train\.txt: no pictures are listed"):
        load(root)
    listing.write_bytes(b"\xff")
    with pytest.raises(BadDataError, match=r"train\.txt: not UTF-8 text \(byte 0\)"):
        load(root)


def test_a_set_without_any_object_is_refused(tmp_path):
    root = draw_voc(tmp_path)
    for stem in "ab":
        (root / f"Annotations/{stem}.xml").write_text(xml())
    with pytest.raises(BadDataError, match=r"train\.txt: no objects in any of its xmls"):
        load(root)


def test_the_cache_sees_an_xml_change(tmp_path):
    root = draw_voc(tmp_path)
    assert load(root).train.annotations.cache_file
    (root / "Annotations/a.xml").write_text(xml(DOG))
    assert load(root).train.annotations.num_objects == 3


def test_photographs_as_voc_give_the_boxes_and_figures_of_their_coco_file(tmp_path, tiny_coco):
    splits = same_classes(read_splits(tiny_coco))
    for content, _ in splits.values():
        for record in content["annotations"]:
            del record["segmentation"]
    root = write_voc(tmp_path / "voc", splits)
    names = [category["name"] for category in splits["train"][0]["categories"]]
    for role in ("train", "val"):
        ours = load_voc_split(root, role, classes=names).annotations
        coco = annotations_of(splits[role][0])
        np.testing.assert_array_equal(ours.object_starts, coco.object_starts)
        np.testing.assert_array_equal(ours.category_ids, coco.category_ids)
        np.testing.assert_array_equal(ours.is_crowd, coco.is_crowd)
        np.testing.assert_allclose(ours.boxes_xywh, coco.boxes_xywh, rtol=0, atol=1e-9)
        assert ours.is_crowd.sum() == 5 and ours.categories == coco.categories
        assert figures(ours, "bbox") == figures(coco, "bbox")
