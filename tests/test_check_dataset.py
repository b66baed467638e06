"""The doctor finds what was planted, nothing on clean data, and says what training says."""

import dataclasses
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import check_dataset
import train
from coco_utils import read_coco
from flags import data_source, keeps_negatives
from helpers.drawn import draw_coco, draw_folder, edit
from helpers.formats import read_splits, same_classes, write_voc, write_yolo
from inspection.diagnosis import collected_log
from inspection.observations import NUM_EXAMPLES
from loading.shapes_dataset import shapes_annotations
from loading.splits import load_data
from models.architectures import ARCHITECTURES
from pixels.images import BadImageError

pytestmark = pytest.mark.usefixtures("restore_process")

POINTS = ("--dataset", "custom", "--model", "keypointrcnn_resnet50_fpn")
BOXES = ("--dataset", "coco", "--model", "ssdlite320_mobilenet_v3_large")
MASKS = ("--dataset", "coco", "--model", "maskrcnn_resnet50_fpn")
PERSONS = ("--dataset", "coco_kp", "--model", "keypointrcnn_resnet50_fpn")


def diagnose(root, flags, capsys, *more):
    """Run the doctor; returns (exit code, its output)."""
    code = check_dataset.run([*flags, "--data-path", str(root), *more])
    return code, capsys.readouterr().out


def custom(root):
    """A folder whose objects have a left and a right end, on their own sides."""
    info = {"keypoint_names": ["left end", "right end", "middle"], "skeleton": [["left end", "right end"]]}
    draw_folder(root, 10, num_keypoints=3, classes=["tube", "cap"], info=info)
    for split in ("train", "test"):
        for i in range(10):

            def sides(entry):
                for box, points in zip(entry["bboxes"], entry["keypoints"]):
                    points[0][:2] = [box[0] + 2, box[1] + 3]
                    points[1][:2] = [box[2] - 2, box[1] + 3]

            edit(root, sides, split, i)
    return root


def coco(root):
    return draw_coco(root, 10)


def persons(root):
    return draw_coco(root, 8, num_keypoints=17)


def first_entry(change):
    """Plant into the json of the first picture that has an object."""
    return lambda root: edit(root, change)


def set_first(field, value):
    def change(entry):
        entry[field][0] = value

    return first_entry(change)


def all_boxes(change):
    def plant(root):
        for split in ("train", "test"):
            for i in range(10):
                edit(root, lambda e: e.update(bboxes=[change(*b) for b in e["bboxes"]]), split, i)

    return plant


def in_coco(change, role="train", kind="instances"):
    def plant(root):
        path = root / "annotations" / f"{kind}_{role}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return plant


def last(content):
    """The last annotation, which is no crowd."""
    return content["annotations"][-1]


def all_coco_boxes(change):
    def plant(content):
        for record in content["annotations"]:
            record["bbox"] = change(*record["bbox"])

    return in_coco(plant)


def truncate(name, size=200):
    def plant(root):
        path = root / name
        path.write_bytes(path.read_bytes()[:size])

    return plant


def copy_of(source, target, change=None):
    """Plant a copy of a picture and its json; ``change`` makes it another file."""

    def plant(root):
        for kind, suffix in (("images", "png"), ("annotations", "json")):
            (to := root / target[0] / kind / f"{target[1]}.{suffix}").parent.mkdir(exist_ok=True)
            shutil.copy(root / source[0] / kind / f"{source[1]}.{suffix}", to)
        if change is not None:
            path = root / target[0] / "images" / f"{target[1]}.png"
            change(Image.open(path)).convert("RGB").save(path.with_suffix(".jpg"), quality=85)
            path.unlink()

    return plant


def turn(refits):
    """Plant an EXIF rotation; the picture is shown as before only if ``refits``."""

    def plant(root):
        path = root / "train" / "images" / "im_000.png"
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image = Image.open(path)
        (image.rotate(90, expand=True) if refits else image).save(path, exif=exif)
        if not refits:
            points = [[70, 6, 2], [77, 6, 2], [73, 7, 2]]
            edit(root, lambda e: e.update(bboxes=[[65, 5, 79, 30]], labels=["tube"], keypoints=[points]))

    return plant


def swap_sides(entry):
    points = entry["keypoints"][0]
    points[0], points[1] = points[1], points[0]


def drop_middles(root):
    for i in range(10):
        edit(root, lambda e: [points.__setitem__(2, None) for points in e["keypoints"]], index=i)


def repeat_object(entry):
    for values in entry.values():
        values.append(values[0])


def write_info(**values):
    return lambda root: (root / "dataset.json").write_text(
        json.dumps({**json.loads((root / "dataset.json").read_text()), **values})
    )


def half_size(image):
    return image.resize((image.width * 3 // 4, image.height * 3 // 4))


def shift_polygon(content):
    last(content)["segmentation"][0] = [v + 15 for v in last(content)["segmentation"][0]]


IM = r"train/annotations/im_000\.json"
# (what, dataset, flags, how to plant it, what the doctor must say)
FAULTS = [
    ("json cut off", custom, POINTS, truncate("train/annotations/im_000.json", 20), IM + ": not valid json"),
    ("a NaN", custom, POINTS, set_first("bboxes", [float("nan"), 1, 20, 20]), IM + ": the number NaN"),
    ("x2 left of x1", custom, POINTS, set_first("bboxes", [50, 10, 20, 40]), IM + r": bboxes\[0\]: .*x2 <= x1"),
    (
        "width and height",
        custom,
        POINTS,
        all_boxes(lambda a, b, c, d: [a, b, c - a, d - b]),
        r"\.json: bboxes.*these look like \[x, y, width, height\]",
    ),
    ("a box outside", custom, POINTS, set_first("bboxes", [70, 10, 120, 40]), IM + r": bboxes\[0\]: .*outside the image"),
    ("a point too few", custom, POINTS, lambda r: edit(r, lambda e: e["keypoints"].__setitem__(0, [[20, 20, 2]]), index=1), r"im_001\.json: bboxes\[0\]: 1 keypoints, the objects before have 3"),
    ("visibility 3", custom, POINTS, set_first("keypoints", [[20, 20, 3]] * 3), IM + r": bboxes\[0\]: visibilities 3"),
    ("label 0", custom, POINTS, set_first("labels", 0), IM + r": bboxes\[0\]: label 0; 0 is background"),
    ("a picture cut off", custom, POINTS, truncate("train/images/im_000.png", 3000), r"im_000\.png: cannot decode"),
    ("an empty picture", custom, POINTS, truncate("test/images/im_001.png", 0), r"test/images/im_001\.png: cannot read"),
    ("no json", custom, POINTS, lambda r: (r / "train/annotations/im_003.json").unlink(), r"im_003\.png: no annotation"),
    ("no picture", custom, POINTS, lambda r: (r / "test/images/im_003.png").unlink(), r"im_003\.json: no image"),
    ("boxes before EXIF", custom, POINTS, turn(refits=False), r"im_000\.png: EXIF turns the picture to 60 x 80"),
    ("unknown entry", custom, POINTS, write_info(clases=["a"]), r"dataset\.json: unknown entry 'clases'"),
    ("a side alone", custom, POINTS, write_info(keypoint_names=["left end", "b", "c"], skeleton=[]), "'left end' has no partner"),
    ("EXIF", custom, POINTS, turn(refits=True), r"turned or mirrored by EXIF\n +images/im_000\.png"),
    ("leaked file", custom, POINTS, copy_of(("train", "im_001"), ("test", "leak")), r"also in train.*\n +val/images/leak\.png is the same file as train/images/im_001\.png"),
    ("leaked file, said by training too", custom, POINTS, copy_of(("train", "im_001"), ("test", "leak")), r"1 of \d+ pictures to evaluate on are also\s+trained\s+on\s+\("),
    ("leaked look", custom, POINTS, copy_of(("train", "im_002"), ("test", "leak"), lambda im: im.point(lambda v: min(255, int(v * 1.1)))), r"also in train.*\n +val/images/leak\.jpg looks like train/images/im_002\.png"),
    ("a copy", custom, POINTS, copy_of(("train", "im_004"), ("train", "zz")), r"copies of another.*\n +images/zz\.png is the same file as images/im_004\.png"),
    ("point far away", custom, POINTS, first_entry(lambda e: e.update(bboxes=[[2, 2, 22, 22]], labels=["tube"], keypoints=[[[4, 4, 2], [20, 4, 2], [70, 50, 2]]])), r"far outside their box\n +images/im_000\.png: .*: middle at \(70, 50\)"),
    ("sides swapped", custom, POINTS, first_entry(swap_sides), r"left and right were swapped\n +images/im_000\.png: .*: left end and right end"),
    ("never labelled", custom, POINTS, drop_middles, "1 of 3 keypoints are never labelled: middle"),
    ("an object twice", custom, POINTS, first_entry(repeat_object), r"class and box of another one.*\n +images/im_000\.png"),
    ("a huge object", custom, POINTS, set_first("bboxes", [0, 0, 80, 60]), r"cover more than 95%.*\n +images/im_000\.png"),
    ("a tiny object", custom, POINTS, set_first("bboxes", [10, 10, 10.2, 10.2]), r"narrower than 4 pixels.*\n +images/im_000\.png"),
    ("a class without objects", custom, POINTS, write_info(classes=["tube", "cap", "ghost"]), "1 of 3 classes have no object to train on: ghost"),
    ("no such file", coco, BOXES, lambda r: (r / "train2017/000003.png").unlink(), r"000003\.png: no such file"),
    ("a damaged picture", coco, BOXES, truncate("train2017/000003.png", 100), r"000003\.png: cannot decode"),
    ("another size", coco, BOXES, lambda r: Image.new("RGB", (33, 44)).save(r / "val2017/000002.png"), r"000002\.png: the image is 33 x 44"),
    ("an id twice", coco, BOXES, in_coco(lambda c: last(c).update(id=1)), r"annotation id 1 is also that of"),
    ("unknown category", coco, BOXES, in_coco(lambda c: last(c).update(category_id=99)), "category_id 99 is not among"),
    ("negative width", coco, BOXES, in_coco(lambda c: last(c).update(bbox=[10, 10, -5, 5])), "has a negative width"),
    ("corners", coco, BOXES, all_coco_boxes(lambda x, y, w, h: [x, y, x + w, y + h]), r"none would if they were \[x1, y1, x2, y2\]\n +00000\d\.png"),
    ("a shifted mask", coco, MASKS, in_coco(shift_polygon), r"fill another box.*\n +000009\.png: .* 15 pixels off"),
    ("a wrong area", coco, BOXES, in_coco(lambda c: last(c).update(area=99999)), r"areas are larger.*\n +000009\.png"),
    ("no anchor", coco, MASKS, in_coco(lambda c: last(c).update(bbox=[3, 3, 0.4, 50])), r"have no anchor.*\n +000009\.png"),
    ("an empty box", coco, BOXES, in_coco(lambda c: last(c).update(bbox=[10, 10, 0, 5])), r"annotations\[\d+\].*has no inside"),
    ("an overhanging box", coco, BOXES, in_coco(lambda c: last(c).update(bbox=[40, 10, 99, 5])), r"partly outside the image"),
    ("no mask", coco, MASKS, in_coco(lambda c: last(c).pop("segmentation")), "no segmentation, but masks are used"),
    ("a class only in val", coco, BOXES, in_coco(lambda c: (c["categories"].append({"id": 7, "name": "bus"}), last(c).update(category_id=7)), "val"), "bus"),
    ("points cut off", persons, PERSONS, in_coco(lambda c: last(c).update(keypoints=[1, 2, 2]), kind="person_keypoints"), "1 keypoints, the objects before have 17"),
]  # fmt: skip


def what_training_says(root, flags, capsys):
    """Start training; returns (whether it refuses, its lines about the data)."""
    parser = train.get_args_parser()
    args = parser.parse_args([*flags, "--data-path", str(root), "--device", "cpu", "--output-dir", ""])
    with collected_log() as log:
        try:
            data = load_data(data_source(args), ARCHITECTURES[args.model].task)
        except (ValueError, FileNotFoundError):
            assert train.run_as_command([*flags, "--data-path", str(root), "--device", "cpu", "--output-dir", ""]) == 1
            text = capsys.readouterr().err.partition("error: ")[2]
            return True, [line for line in text.splitlines() if not line.endswith("error(s) in the data:")]
    for split in (data.train, data.val):
        for i in split.indices.tolist():
            try:
                split.images.read(split.annotations, i)
            except BadImageError as error:
                return True, [str(error)]
    return False, [finding.example for finding in log.warnings]  # those that share a remedy show it once


@pytest.mark.slow
@pytest.mark.parametrize(("make", "flags", "plant", "expected"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_found_and_training_says_the_same(make, flags, plant, expected, tmp_path, capsys):
    root = make(tmp_path / "data")
    code, clean = diagnose(root, flags, capsys)
    assert code == 0 and not re.search(expected, clean), clean
    plant(root)
    code, found = diagnose(root, flags, capsys)
    assert re.search(expected, found), found
    refuses, lines = what_training_says(root, flags, capsys)
    assert code == refuses
    shown = [" ".join(line.split()) in " ".join(found.split()) for line in lines]
    if not all(shown):  # five of each kind are shown, the others counted
        assert sum(shown) >= NUM_EXAMPLES and re.search(r"\.\.\. and \d+ more", found), (lines, found)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 20 and len({f[0] for f in FAULTS}) == len(FAULTS)


def test_errors_of_several_stages_and_both_splits_are_reported_at_once(tmp_path, capsys):
    root = custom(tmp_path / "data")
    truncate("train/annotations/im_000.json", 20)(root)  # found first: training stops here
    truncate("train/images/im_001.png", 3000)(root)  # found when images are decoded
    edit(root, lambda e: e["bboxes"].__setitem__(0, [50, 10, 20, 40]), "test")
    copy_of(("train", "im_002"), ("test", "leak"))(root)
    code, text = diagnose(root, POINTS, capsys)
    assert code == 1 and "3 error(s)" in text
    for name in ("train/annotations/im_000.json", "train/images/im_001.png", "test/annotations/im_000.json"):
        assert name in text.partition("ERRORS")[2].partition("WARNINGS")[0]
    assert "val/images/leak.png is the same file" in text


def test_paths_that_look_like_our_own_lines_are_shown_whole(tmp_path, capsys):
    root = custom(tmp_path / "tubes: new; old" / "data")
    truncate("train/images/im_000.png", 3000)(root)
    truncate("test/images/im_001.png", 0)(root)
    code, text = diagnose(root, POINTS, capsys)
    assert code == 1 and "2 error(s)" in text
    assert f"  {root}/train/images/im_000.png: cannot decode the image: " in text
    assert f"  {root}/test/images/im_001.png: cannot read the image header: " in text
    code, text = diagnose(root, POINTS, capsys, "--on-bad-data", "skip")
    assert code == 0 and re.search(r"  the image is left out \(2\)\n +/", text), text
    assert f"  {root}/train/images/im_000.png: cannot decode the image: " in text

    root = coco(tmp_path / "pictures: a" / "data")
    in_coco(lambda content: last(content).update(bbox=[10, 10, 0, 5]))(root)
    Image.new("RGB", (33, 44)).save(root / "val2017/000002.png")
    code, text = diagnose(root, BOXES, capsys)
    assert f"  {root}/val2017/000002.png: the image is 33 x 44 (width x height), its annotations say" in text
    assert re.search(rf"  the object is not trained on, .* \(1\)\n +{root}/annotations/instances_train2017", text), text


def test_a_rare_class_with_nearly_the_name_of_another_may_be_a_misspelt_label(tmp_path, capsys):
    draw_folder(tmp_path, 10, num_keypoints=0, classes=["tube"])
    edit(tmp_path, lambda entry: entry["labels"].__setitem__(0, "tubes"))
    flags = ("--dataset", "custom", "--model", "ssdlite320_mobilenet_v3_large")
    code, text = diagnose(tmp_path, flags, capsys, "--no-images")
    assert code == 0 and "objects to train on: tubes 1 (is 'tube' meant?)" in " ".join(text.split())


def test_what_cannot_be_read_at_all_is_one_line_and_exit_code_1(tmp_path, capsys):
    code, text = diagnose(tmp_path / "nothing", POINTS, capsys)
    assert code == 1 and "nothing/train/images: no such folder" in text and "1 error(s)" in text
    with pytest.raises(SystemExit, match="2"):
        check_dataset.run(["--dataset", "coco", "--model", "keypointrcnn_resnet50_fpn"])


def test_long_rows_of_warnings_are_counted_in_full(tmp_path, capsys):
    root = coco(tmp_path / "data")
    in_coco(lambda content: [o["bbox"].__setitem__(2, 0) for o in content["annotations"]])(root)
    number = len(json.loads((root / "annotations/instances_train2017.json").read_text())["annotations"])
    assert number > 20
    code, text = diagnose(root, BOXES, capsys)
    assert code == 1 and "no object is left to train on" in text
    assert re.search(rf"the object is not trained on.* \({number}\)", text) and f"... and {number - 5} more" in text


def test_left_out_data_are_warnings_as_in_training(tmp_path, capsys):
    root = custom(tmp_path / "data")
    truncate("train/images/im_000.png", 3000)(root)
    edit(root, lambda e: e["bboxes"].__setitem__(0, [50, 10, 20, 40]), "test")
    code, text = diagnose(root, POINTS, capsys, "--on-bad-data", "skip")
    assert code == 0 and "the image is left out" in text and "the object is left out" in text


def test_pictures_are_left_alone_with_no_images(tmp_path, capsys):
    root = coco(tmp_path / "data")
    path = root / "train2017" / "000003.png"
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)  # the header and the end are whole
    path.write_bytes(content)
    assert diagnose(root, BOXES, capsys)[0] == 1
    code, text = diagnose(root, BOXES, capsys, "--no-images")
    assert code == 0 and "images were not opened" in text


def test_the_sheets_show_as_many_samples_as_wanted(tmp_path, capsys):
    root = coco(tmp_path / "data")
    truncate("train2017/000003.png", 100)(root)
    for number, columns, rows in ((1, 1, 1), (5, 3, 2), (50, 3, 3)):  # nine of ten pictures can be read
        code, text = diagnose(root, MASKS, capsys, "--view", str(number), "--output-dir", str(tmp_path / "out"))
        for name in ("annotated.jpg", "augmented_hflip.jpg"):
            assert str(tmp_path / "out" / name) in text
            with Image.open(tmp_path / "out" / name) as sheet:
                assert abs(sheet.width / columns - 490) < 20 and sheet.height < rows * 560
                assert np.asarray(sheet).std() > 10


def test_samples_that_are_not_drawn_are_not_missing_in_silence(tmp_path, capsys):
    root = coco(tmp_path / "data")
    (root / "annotations" / "instances_train2017.json").write_text("{}")
    code, text = diagnose(root, MASKS, capsys, "--view", "2", "--output-dir", str(tmp_path / "out"))
    assert code == 1 and "--view: no samples are drawn where training would stop at errors" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [BOXES, MASKS, PERSONS], ids=["boxes", "masks", "persons"])
def test_real_coco_has_no_errors_and_no_false_alarm(tiny_coco, flags, capsys):
    code, text = diagnose(tiny_coco, flags, capsys)
    assert code == 0 and "ERRORS" not in text
    alarms = ["also in", "copies", "EXIF", "another box", "areas are", "another one", "swapped", "none would"]
    for alarm in (*alarms, "as the model gets them"):
        assert alarm not in text


def test_real_photographs_in_a_folder_give_no_warning(glue_tubes, capsys):
    code, text = diagnose(glue_tubes, POINTS, capsys)
    assert code == 0 and "no errors, 0 warning(s): training may start" in text


def test_drawn_shapes_give_no_warning(capsys):
    torch.manual_seed(0)
    code, text = diagnose("unused", ("--dataset", "shapes", "--model", "keypointrcnn_resnet50_fpn"), capsys)
    assert code == 0 and "no errors, 0 warning(s)" in text


def text_ids(root):
    """A COCO dataset whose ids are text, as some tools write them."""
    coco(root)
    for role in ("train", "val"):
        path = root / "annotations" / f"instances_{role}2017.json"
        content = json.loads(path.read_text())
        for record in (*content["images"], *content["categories"]):
            record["id"] = f"id {record['id']}"
        for record in content["annotations"]:
            record.update(image_id=f"id {record['image_id']}", category_id=f"id {record['category_id']}")
        path.write_text(json.dumps(content))
    return root


def yolo(root):
    splits = same_classes(read_splits(coco(root / "coco"), crowds=False))
    return write_yolo(root / "yolo", splits, rows="outlines")


def voc(root):
    return write_voc(root / "voc", same_classes(read_splits(coco(root / "coco"))))


YOLO = ("--dataset", "yolo", "--model", "maskrcnn_resnet50_fpn")
VOC = ("--dataset", "voc", "--model", "ssdlite320_mobilenet_v3_large")
SHAPES = ("--dataset", "shapes", "--model", "keypointrcnn_resnet50_fpn")
FORMATS = [(coco, MASKS), (persons, PERSONS), (text_ids, MASKS), (custom, POINTS), (yolo, YOLO), (voc, VOC)]


@pytest.mark.parametrize(("draw", "flags"), FORMATS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_dataset_written_as_coco_is_read_as_the_same_annotations(draw, flags, tmp_path, capsys):
    path = draw(tmp_path / "data")
    code, text = diagnose(path, flags, capsys, "--write-coco", str(tmp_path / "out" / "coco"))
    assert code == 0 and re.search(r"train\.json: \d+ pictures of .*; file_name is relative to \S+$", text, re.M), text
    (line,) = re.findall(r"^to train on them: (.*)$", text, re.M)
    parser = train.get_args_parser()
    task = ARCHITECTURES[flags[-1]].task
    given, told = (
        parser.parse_args([*flags, "--data-path", str(path)]),
        parser.parse_args([*shlex.split(line), "--model", flags[-1]]),
    )
    assert keeps_negatives(told) == keeps_negatives(given)
    before, after = (load_data(data_source(args), task, sigmas=args.kpt_oks_sigmas) for args in (given, told))
    np.testing.assert_array_equal(before.sigmas, after.sigmas)
    for one, other in ((before.train, after.train), (before.val, after.val)):
        for field in dataclasses.fields(one.annotations):
            old, new = getattr(one.annotations, field.name), getattr(other.annotations, field.name)
            if isinstance(old, np.ndarray):
                np.testing.assert_array_equal(old, new, field.name)
                assert old.dtype == new.dtype
            elif field.name == "id_texts":
                assert dict(old) == dict(new)
            elif field.name not in ("cache_file", "warnings"):
                assert old == new, field.name
        assert one.images.root == other.images.root
        pixels = one.images.read(one.annotations, 1)
        np.testing.assert_array_equal(pixels, other.images.read(other.annotations, 1))


def test_shapes_are_written_as_coco_without_a_folder_of_pictures(tmp_path, capsys):
    assert check_dataset.run([*SHAPES, "--no-images", "--write-coco", str(tmp_path)]) == 0
    assert "file_name" not in capsys.readouterr().out
    annotations = read_coco(tmp_path / "val.json", uses=["segm", "keypoints"])
    np.testing.assert_array_equal(annotations.keypoints, shapes_annotations("val").keypoints)


def test_nothing_is_written_as_coco_where_training_would_stop(tmp_path, capsys):
    root = custom(tmp_path / "data")
    set_first("bboxes", [50, 10, 20, 40])(root)
    code, text = diagnose(root, POINTS, capsys, "--write-coco", str(tmp_path / "out"))
    assert code == 1 and "--write-coco: nothing is written" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("orientation", "is_warned"), [(3, True), (6, False)])
def test_turns_that_coco_files_cannot_say_are_warned_of(tmp_path, capsys, orientation, is_warned):
    root = custom(tmp_path / "data")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = root / "train" / "images" / "im_000.png"
    image = Image.open(path)
    (image if orientation == 3 else image.rotate(90, expand=True)).save(path, exif=exif)
    _, text = diagnose(root, POINTS, capsys, "--write-coco", str(tmp_path / "out"))
    assert ("warning: 1 picture(s) are turned by EXIF without a change of size: images/im_000.png" in text) == is_warned


@pytest.mark.parametrize(("draw", "flags"), [(yolo, YOLO), (voc, VOC)], ids=["yolo", "voc"])
def test_other_formats_are_looked_over_like_all_data(draw, flags, tmp_path, capsys):
    path = draw(tmp_path / "data")
    code, text = diagnose(path, flags, capsys)
    assert code == 0 and "no errors" in text and re.search(r"\d+ objects", text), text
    shutil.copy(*sorted((tmp_path / "data").glob(f"{flags[1]}/**/*.png"))[:4:3])  # of the same size
    code, text = diagnose(path, flags, capsys)
    assert code == 0 and "copies" in text, text
    truncate(next((tmp_path / "data").glob(f"{flags[1]}/**/*.png")), 200)(tmp_path)
    code, text = diagnose(path, flags, capsys)
    assert code == 1 and "cannot" in text, text
