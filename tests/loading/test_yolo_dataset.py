"""YOLO's layout: read as it stands, and whatever is wrong with it is one line with file and place."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

from annotations.findings import BadDataError
from annotations.skeleton import COCO_PERSON_KEYPOINTS, COCO_PERSON_SIGMAS
from helpers.drawn import draw_coco
from helpers.formats import annotations_of, figures, read_splits, same_classes, write_yolo
from loading.splits import Source, load_data
from loading.yolo_dataset import label_path, load_yolo_split

WIDTH, HEIGHT = 80, 60


def draw_yolo(root, rows=("0 0.5 0.5 0.25 0.5", "1 0.2 0.3 0.1 0.2"), num_images=3, **info):
    """Write grey pictures a.png, b.png, ... with these rows in each label file."""
    for role in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / role).mkdir(parents=True)
        for k in range(num_images):
            level = 40 * k + (role == "val")
            Image.new("RGB", (WIDTH, HEIGHT), (level, 90, 90)).save(root / "images" / role / f"{'abcdef'[k]}.png")
            (root / "labels" / role / f"{'abcdef'[k]}.txt").write_text("\n".join(rows))
    write_info(root, **info)
    return root / "data.yaml"


def write_info(root, **changes):
    content = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | changes
    text = yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    (root / "data.yaml").write_text(text)


def load(path, task="box", **options):
    return load_data(Source("yolo", path, cache_dir=path.parent / "cache", **options), task)


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_boxes_are_shares_of_the_picture_from_their_centre(tmp_path):
    data = load(draw_yolo(tmp_path))
    annotations = data.train.annotations
    assert [annotations.file_name(i) for i in range(3)] == ["a.png", "b.png", "c.png"]
    assert annotations.image_ids.tolist() == [1, 2, 3]
    assert annotations.categories == ((1, "cat"), (2, "dog"))
    assert annotations.category_ids[:2].tolist() == [1, 2]
    np.testing.assert_allclose(annotations.boxes_xywh[:2], [[30, 15, 20, 30], [12, 12, 8, 12]], atol=1e-9)
    assert data.train.images.read(annotations, 1)[0, 0].tolist() == [40, 90, 90]


def test_an_outline_gives_mask_and_box_and_may_stand_beside_boxes(tmp_path):
    triangle = "1 0.25 0.25 0.75 0.25 0.5 0.75"
    annotations = load(draw_yolo(tmp_path / "mixed", rows=["0 0.5 0.5 0.25 0.5", triangle])).train.annotations
    assert annotations.polygons(1)[0].tolist() == [20, 15, 60, 15, 40, 45]
    assert annotations.boxes_xywh[1].tolist() == [20, 15, 40, 30]
    assert 500 < annotations.areas[1] < 700  # of the triangle, not of its box
    data = load(draw_yolo(tmp_path / "outlines", rows=[triangle]), "mask")
    assert data.train.annotations.has_segmentations
    with pytest.raises(BadDataError, match=r"labels/train/a\.txt: line 1: no segmentation, but masks are used"):
        load(tmp_path / "mixed" / "data.yaml", "mask")


def test_pictures_without_label_file_or_rows_are_background(tmp_path, caplog):
    path = draw_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").unlink()
    (tmp_path / "labels/train/b.txt").write_text("\n  \n")
    data = load(path)
    assert np.diff(data.train.annotations.object_starts).tolist() == [0, 0, 2]
    text = r"1 of 3 pictures have no label file: .*images/train/a\.png; they count as pictures without objects"
    assert sum(re.search(text, m) is not None for m in messages(caplog)) == 1


def test_names_may_be_a_mapping_or_only_counted(tmp_path):
    path = draw_yolo(tmp_path, names={1: "dog", 0: "cat"}, nc=2)
    assert load(path).label_map.names == ("cat", "dog")
    write_info(tmp_path, names=None, nc=2)
    assert load(path).label_map.names == ("class_0", "class_1")


def test_splits_are_folders_lists_of_folders_or_text_files(tmp_path, caplog):
    path = draw_yolo(tmp_path)
    shutil.copytree(tmp_path / "images/train", tmp_path / "more/images/deep/x")
    shutil.copytree(tmp_path / "labels/train", tmp_path / "more/labels/deep/x")
    write_info(tmp_path, train=["images/train", "more/images"])
    split = load(path).train
    names = [split.annotations.file_name(i) for i in range(6)]
    assert names == [f"images/train/{n}.png" for n in "abc"] + [f"more/images/deep/x/{n}.png" for n in "abc"]
    assert split.images.root == tmp_path and split.annotations.num_objects == 12
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("../images/train/c.png\n\nimages/train/a.png\n")  # from it; from the root
    write_info(tmp_path, train="lists/train.txt")
    split = load(path).train
    assert [split.annotations.file_name(i) for i in range(2)] == ["a.png", "c.png"]
    assert split.unused == ("b.png",)
    assert any("1 picture(s) that no entry of" in m and "b.png" in m for m in messages(caplog))


def test_paths_are_relative_to_path_which_is_relative_to_the_yaml(tmp_path, monkeypatch):
    draw_yolo(tmp_path / "data/set")
    (tmp_path / "data/cfg").mkdir()
    path = (tmp_path / "data/set/data.yaml").rename(tmp_path / "data/cfg/my.yaml")
    path.write_text(path.read_text() + "path: ../set\n")
    assert load(path).train.annotations.num_objects == 6
    monkeypatch.chdir(tmp_path)
    assert load_yolo_split(path.relative_to(tmp_path).parent, "train").annotations.num_objects == 6


def test_exports_that_write_one_folder_too_high_are_read(tmp_path):
    path = draw_yolo(tmp_path / "set")
    for role in ("train", "val"):
        (tmp_path / "set" / role).mkdir()
        for folder in ("images", "labels"):
            (tmp_path / "set" / folder / role).rename(tmp_path / "set" / role / folder)
    write_info(tmp_path / "set", train="../train/images", val="../val/images")
    data = load(path)
    assert data.train.images.root == tmp_path / "set/train/images" and data.train.annotations.num_objects == 6


def test_labels_lie_beside_pictures_that_are_in_no_folder_called_images():
    assert label_path("/d/images/images/a.b.jpg") == "/d/images/labels/a.b.txt"
    assert label_path("/d/pictures/a.jpg") == "/d/pictures/a.txt"


def test_a_picture_is_labelled_as_viewers_show_it(tmp_path):
    path = draw_yolo(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images/train/a.png", exif=exif)
    annotations = load(path).train.annotations
    assert (annotations.heights[0], annotations.widths[0]) == (HEIGHT, WIDTH)


def test_a_little_outside_is_cut_with_one_remark_and_six_decimals_are_exact(tmp_path, caplog):
    rows = ["0 0.05 0.5 0.2 0.5", "0 0.5 0.98 0.5 0.1", "1 0.833333 0.5 0.333334 0.5"]
    annotations = load(draw_yolo(tmp_path, rows=rows)).train.annotations
    np.testing.assert_allclose(annotations.boxes_xywh[0], [0, 15, 12, 30], atol=1e-9)
    np.testing.assert_allclose(annotations.boxes_xywh[1], [20, 55.8, 40, 4.2], atol=1e-9)
    assert annotations.boxes_xywh[2, [0, 2]].sum() <= WIDTH
    found = [m for m in messages(caplog) if "over its edge" in m]
    text = r"labels/train/a\.txt: line 1: the box reaches 0\.05 of the picture's side over its edge, and 5 more like it"
    assert re.search(text, found[0]) and len(found) == 2  # one a split


BAD_ROWS = {
    "commas": ("0,0.5,0.5,0.1,0.1", r"expected numbers, got '0,0\.5,.*'; put blanks between the numbers, not commas"),
    "decimal commas": ("0 0,5 0,5 0,1 0,1", r"expected numbers, got '0,5'; write a point in decimal numbers"),
    "corners": ("0 0.6 0.7 0.95 0.98", r"the box reaches to 1\.19, .*; as corners x1, y1, x2, y2 it would lie inside"),
    "text": ("0 0.5 half 0.1 0.1", r"expected numbers, got 'half'"),
    "nan": ("0 0.5 nan 0.1 0.1", r"a number is not finite"),
    "too few": ("0 0.5 0.5 0.1", r"4 numbers, expected 5 \(class, centre x"),
    "score": ("0 0.5 0.5 0.1 0.1 0.9", r"6 numbers, expected 5 .*sixth number is the score of a prediction"),
    "two points": ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.2", r"8 numbers, expected 5"),
    "class": ("2 0.5 0.5 0.1 0.1", r"class 2, expected 0 to 1, as data\.yaml names them; .*; classes count from 0$"),
    "class -1": ("-1 0.5 0.5 0.1 0.1", r"class -1, expected 0 to 1"),
    "class 0.5": ("0.5 0.5 0.5 0.1 0.1", r"class 0\.5, expected 0 to 1"),
    "name": ("cat 0.5 0.5 0.1 0.1", r"expected numbers, got 'cat'; give the class by its number: 'cat' is 0"),
    "pixels": ("0 40 30 20 20", r"the box reaches to 50, far outside the picture; .*these look like pixels"),
    "far": ("0 0.9 0.5 0.5 0.1", r"the box reaches to 1\.15, far outside the picture; numbers are shares"),
    "empty": ("0 0.5 0.5 0 0.1", r"a box 0 wide and 0\.1 high has no inside"),
    "negative": ("0 0.5 0.5 -0.1 0.1", r"a box -0\.1 wide"),
    "flat": ("0 0.5 0.5 0.6 0.5 0.7 0.5", r"nothing of it lies inside the picture, or it has no inside"),
    "flat outside": ("0 1.05 0.5 1.05 0.6 1.05 0.7", r"nothing of it lies inside the picture"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_wrong_row_is_one_line_with_its_number_and_can_be_skipped(tmp_path, case):
    row, message = BAD_ROWS[case]
    path = draw_yolo(tmp_path)
    (tmp_path / "labels/train/b.txt").write_text(f"1 0.2 0.3 0.1 0.2\n\n{row}\n")
    with pytest.raises(BadDataError) as error:
        load(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and re.search(r"labels/train/b\.txt: line 3: " + message, lines[1]), lines
    annotations = load(path, on_bad_data="skip").train.annotations
    assert annotations.num_objects == 5 and len(annotations) == 3


def test_a_label_file_that_is_no_text_is_named(tmp_path):
    path = draw_yolo(tmp_path)
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xfe\0\x81")
    with pytest.raises(BadDataError, match=r"b\.txt: text in UTF-16; save it as UTF-8, one object a row"):
        load(path)
    assert len(load(path, on_bad_data="skip").train.annotations) == 2


def test_a_wrong_label_folder_is_an_error_not_a_set_of_background(tmp_path):
    path = draw_yolo(tmp_path)
    (tmp_path / "labels/train").rename(tmp_path / "labels/training")
    with pytest.raises(BadDataError, match=r"none of 3 pictures has a label file; .*would be .*labels/train/a\.txt"):
        load(path)


@pytest.mark.parametrize("where", ["images/train/{}", "labels/{}", "Labels/train/{}", "annotations/train/{}"])
def test_labels_in_another_place_are_named(tmp_path, where):
    path = draw_yolo(tmp_path)
    for label in list((tmp_path / "labels/train").iterdir()):
        target = tmp_path / where.format(label.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        label.rename(target)
    with pytest.raises(BadDataError, match=rf"put the label files there; one is .*/{where.format('a.txt')}$"):
        load(path)


def test_names_from_windows_are_found(tmp_path):
    path = draw_yolo(tmp_path, train="images\\train")
    for label in list((tmp_path / "labels/train").iterdir()):
        label.rename(label.with_suffix(".TXT"))
    (tmp_path / "labels/train/a.TXT").write_bytes("\ufeff0 0.5 0.5 0.25 0.5\r\n".encode())
    assert load(path).train.annotations.num_objects == 5


def test_files_that_are_not_used_are_named(tmp_path, caplog):
    path = draw_yolo(tmp_path)
    (tmp_path / "labels/train/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "images/train/notes.doc").write_text("")
    load(path)
    for _ in range(2):  # from the cache too
        caplog.clear()
        load(path)
        assert any(re.search(r"1 text file\(s\) of no picture: .*classes\.txt", m) for m in messages(caplog))
        assert any(re.search(r"notes\.doc: not an image by its name; it is not used", m) for m in messages(caplog))


def test_the_cache_sees_labels_and_pictures_change(tmp_path):
    path = draw_yolo(tmp_path)
    first = load(path).train.annotations
    again = load(path).train.annotations
    assert first.cache_file and again.cache_file == first.cache_file
    stamp = Path(again.cache_file).stat().st_mtime_ns
    assert Path(load(path).train.annotations.cache_file).stat().st_mtime_ns == stamp
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    assert load(path).train.annotations.num_objects == 5
    shutil.copy(tmp_path / "images/train/a.png", tmp_path / "images/train/d.png")
    assert len(load(path).train.annotations) == 4
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 x 0.25 0.5\n")
    with pytest.raises(BadDataError, match="line 1: expected numbers"):
        load(path)


def test_a_list_of_pictures_that_are_elsewhere_is_one_line(tmp_path):
    path = draw_yolo(tmp_path, train="list.txt")
    (tmp_path / "list.txt").write_text("\n".join(f"/data/images/{name}.png" for name in "abc"))
    start = (
        r"list\.txt: 3 of 3 belong to no file, such as .*list\.txt: line 1: no picture /data/images/a\.png; add it or c"
    )
    with pytest.raises(BadDataError, match=rf"^1 error.*\n.*{start}"):
        load(path)


BAD_YAMLS = {
    "syntax": ("train: [a\nval: b", r"data\.yaml: not valid yaml at line 2 column \d+"),
    "tab": ("\ttrain: a", r"not valid yaml at line 1"),
    "list": ("- a\n- b", r"expected entries train, val and names, got \['a', 'b'\]"),
    "empty": ("", r"expected entries train, val and names, got None"),
    "twice": ("train: a\ntrain: b", r"a key occurs twice"),
    "code": ("train: !!python/object/apply:os.system ['true']", r"not valid yaml at line 1 .*could not determine a cons"),
    "bad tag": ("train: !!bool maybe", r"not valid yaml: "),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\ntrain: *b", r"line 2 column 8: aliases such as \*a are not read"),
    "deep": ("train: " + "[" * 20_000, r"nested too deeply"),
    "bytes": (b"train: \xff", r"not UTF-8 text \(byte 7\)"),
    "control": ("train: \x01", r"not valid yaml: "),
    "large": ("#" * (2 << 20), r"2097152 bytes are more than the limit"),
    "no names": ("train: images/train\nval: images/val", r"data\.yaml: names: expected different names, got None"),
    "same names": ("train: images/train\nval: images/val\nnames: [a, a]", r"names: expected different names"),
    "bool": ("train: images/train\nval: images/val\nnames: [yes, dog]", r"names: .*quotes round words such as no and on"),
    "gap": ("train: images/train\nval: images/val\nnames: {0: a, 2: b}", r"expected the classes 0 to 1, each once"),
    "key": ("train: images/train\nval: images/val\nnames: {a: 0}", r"expected class numbers from 0, got 'a'"),
    "nc": ("train: images/train\nval: images/val\nnc: 3\nnames: [a, b]", r"nc is 3, but there are 2 names"),
    "no nc": ("train: images/train\nval: images/val\nnc: x\nnames: [a, b]", r"nc: expected a number of classes"),
    "path": ("path: gone\ntrain: images/train\nval: images/val\nnames: [a, b]", r"path: .*gone.* is none; .*relative to the"),
    "train": ("train: 5\nval: images/val\nnames: [a, b]", r"train: expected a folder, a text file or a list"),
    "gone": ("train: images/gone\nval: images/val\nnames: [a, b]", r"images/gone is neither a folder nor a text file"),
    "nothing": ("train: nothing\nval: images/val\nnames: [a, b]", r"data\.yaml: train: no pictures there"),
    "line": ("train: list.txt\nval: images/val\nnames: [a, b]", r"list\.txt: line 2: no picture images/train/z\.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_YAMLS)
def test_a_wrong_yaml_is_one_line(tmp_path, case):
    text, message = BAD_YAMLS[case]
    path = draw_yolo(tmp_path)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "nothing").mkdir()
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/z.png\n")
    with pytest.raises(BadDataError) as error:
        load(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and re.search(message, lines[1]), lines


@pytest.mark.parametrize("role", ["train", "val"])
def test_a_yaml_without_an_entry_for_a_role_is_one_line(tmp_path, role):
    path = draw_yolo(tmp_path)
    path.write_text(path.read_text().replace(f"{role}: images/{role}\n", ""))
    with pytest.raises(FileNotFoundError, match=rf"data\.yaml: no entry '{role}'; name the folder"):
        load(path)


def test_a_folder_stands_for_its_only_yaml(tmp_path):
    path = draw_yolo(tmp_path)
    assert load_yolo_split(tmp_path, "val").annotations.num_objects == 6
    path.rename(tmp_path / "one.yaml")
    shutil.copy(tmp_path / "one.yaml", tmp_path / "two.yaml")
    with pytest.raises(FileNotFoundError, match=r"2 yaml files in this folder; set --data-path to"):
        load_yolo_split(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml: no such file; set --data-path"):
        load_yolo_split(tmp_path / "gone.yaml", "val")


# Four corners of a box: front left, front right, rear left, rear right.
CORNERS = ((0.1, 0.1), (0.9, 0.15), (0.1, 0.8), (0.9, 0.85))


def draw_pose(root, size=3, **info):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        x, y = rng.uniform(0.3, 0.7, 2)
        w, h = rng.uniform(0.2, 0.5, 2)
        numbers = [x, y, w, h]
        for u, v in CORNERS:
            u, v = np.array((u, v)) + rng.normal(0, 0.02, 2)
            numbers += [x + (u - 0.5) * w, y + (v - 0.5) * h, 2][:size]
        rows.append(" ".join(["0", *(f"{number:.6f}" for number in numbers)]))
    return draw_yolo(root, rows=rows, num_images=6, names=["car"], kpt_shape=[4, size], **info), rows


@pytest.mark.parametrize("size", [2, 3])
def test_four_keypoints_are_read_and_their_mirror_map_is_proved(tmp_path, size):
    path, rows = draw_pose(tmp_path, size, flip_idx=[1, 0, 3, 2])
    data = load(path, "keypoint")
    assert data.num_keypoints == 4 and data.flip_order.tolist() == [1, 0, 3, 2]
    numbers = np.array(rows[0].split()[5:], dtype=float).reshape(4, size)
    points = data.train.annotations.keypoints[0]
    np.testing.assert_allclose(points[:, :2], numbers[:, :2] * [WIDTH, HEIGHT])
    assert points[:, 2].tolist() == [2, 2, 2, 2]
    for wrong in ([0, 1, 2, 3], [2, 3, 0, 1]):
        write_info(tmp_path, names=["car"], kpt_shape=[4, size], flip_idx=wrong)
        with pytest.raises(ValueError, match=r"flip_pairs look wrong: .*flip_idx"):
            load(path, "keypoint")


def test_keypoint_names_say_which_points_swap_where_the_file_does_not(tmp_path, caplog):
    names = ["left_front", "right_front", "left_rear", "right_rear"]
    path, _ = draw_pose(tmp_path, kpt_names={0: names})
    data = load(path, "keypoint")
    assert data.flip_order.tolist() == [1, 0, 3, 2] and data.train.skeleton.names == tuple(names)
    assert data.train.annotations.keypoint_names == tuple(names)
    write_info(tmp_path, names=["car"], kpt_shape=[4, 3], kpt_names=names, flip_idx=[0, 1, 2, 3])
    with pytest.raises(BadDataError, match=r"flip_idx: expected that 'left_front' and 'right_front', .* swap"):
        load(path, "keypoint")
    write_info(tmp_path, names=["car"], kpt_shape=[4, 3])
    caplog.set_level("INFO")
    assert load(path, "keypoint").flip_order is None
    assert any("no mirroring in training" in m for m in messages(caplog))


def test_points_that_are_not_labelled(tmp_path):
    rows = ["0 0.5 0.5 0.5 0.5 0 0 0 0.4 0.4 1 1.05 0.5 2 7 7 0", "0 0.5 0.5 0.5 0.5"]
    path = draw_yolo(tmp_path / "3", rows=rows, names=["car"], kpt_shape=[4, 3])
    points = load(path, "keypoint").train.annotations.keypoints
    np.testing.assert_allclose(points[0], [[0, 0, 0], [32, 24, 1], [80, 30, 2], [0, 0, 0]])
    assert not points[1].any()
    path = draw_yolo(tmp_path / "2", rows=["0 0.5 0.5 0.5 0.5 0 0 -1 0.4 0.5 0.5"], names=["car"], kpt_shape=[3, 2])
    assert load(path, "keypoint").train.annotations.keypoints[0, :, 2].tolist() == [0, 0, 2]


def test_a_point_far_outside_is_an_error_where_points_are_learnt(tmp_path, caplog):
    path = draw_yolo(tmp_path, rows=["0 0.5 0.5 0.5 0.5 1.4 0.5 2"], names=["car"], kpt_shape=[1, 3])
    with pytest.raises(BadDataError, match=r"a\.txt: line 1: the keypoint 0 reaches to 1\.4, far outside"):
        load(path, "keypoint")
    assert load(path).train.annotations.num_objects == 3
    assert any("nothing here needs it" in m for m in messages(caplog))


BAD_POSES = {
    "row": ({"kpt_shape": [3, 3]}, r"a\.txt: line 1: 17 numbers, expected 5 \(class and box\) or 14 \(3 keypoints of 3"),
    "none": ({"kpt_shape": None}, r"no kpt_shape, but the model learns keypoints; give it, such as"),
    "shape": ({"kpt_shape": [4, 4]}, r"kpt_shape: expected \[number of keypoints, 2 or 3\], got \[4, 4\]"),
    "number": ({"kpt_shape": 4}, r"kpt_shape: expected .*got 4"),
    "short": ({"flip_idx": [1, 0, 2]}, r"flip_idx: expected each of 0 to 3 once, .*got \[1, 0, 2\]"),
    "circle": ({"flip_idx": [1, 2, 0, 3]}, r"flip_idx: expected each of 0 to 3 once, with partners that point"),
    "text": ({"flip_idx": "1023"}, r"flip_idx: expected each"),
    "names": ({"kpt_names": ["a", "b"]}, r"kpt_names: expected 4 different names, the same for all classes, got"),
    "classes": ({"kpt_names": {0: list("abcd"), 1: list("abce")}}, r"kpt_names: expected 4 different names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POSES)
def test_a_wrong_pose_file_is_named(tmp_path, case):
    changes, message = BAD_POSES[case]
    path, _ = draw_pose(tmp_path)
    write_info(tmp_path, **({"names": ["car"], "kpt_shape": [4, 3]} | changes))
    with pytest.raises(BadDataError, match=message):
        load(path, "keypoint")


@pytest.mark.parametrize("rows", ["boxes", "outlines"])
def test_photographs_as_yolo_give_the_boxes_and_figures_of_their_coco_file(tmp_path, tiny_coco, rows):
    splits = same_classes(read_splits(tiny_coco, crowds=False))
    for content, _ in splits.values():
        for record in content["annotations"]:
            record["segmentation"] = record["segmentation"][:1]
            points = np.array(record["segmentation"][0]).reshape(-1, 2)
            if rows == "boxes":
                del record["segmentation"]
            else:
                record["bbox"] = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    path = write_yolo(tmp_path / "yolo", splits, rows=rows)
    data = load(path, "mask" if rows == "outlines" else "box")
    for role, split in (("train", data.train), ("val", data.val)):
        ours, coco = split.annotations, annotations_of(splits[role][0])
        assert [ours.file_name(i) for i in range(50)] == [coco.file_name(i) for i in range(50)]
        np.testing.assert_array_equal(ours.object_starts, coco.object_starts)
        np.testing.assert_array_equal(ours.category_ids, coco.category_ids)
        np.testing.assert_allclose(ours.boxes_xywh, coco.boxes_xywh, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.polygon_points, coco.polygon_points, rtol=0, atol=1e-9)
        assert ours.categories == coco.categories
        assert figures(ours, "bbox") == figures(coco, "bbox")
        if rows == "outlines":
            assert figures(ours, "segm") == figures(coco, "segm")


def test_photographs_as_yolo_pose_give_the_points_and_figures_of_their_coco_file(tmp_path, tiny_coco):
    splits = read_splits(tiny_coco, "person_keypoints", crowds=False)
    for content, _ in splits.values():
        for record in content["annotations"]:
            del record["segmentation"]
    flip = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    path = write_yolo(tmp_path / "yolo", splits, rows="points", info={"kpt_shape": [17, 3], "flip_idx": flip})
    data = load(path, "keypoint")
    assert data.flip_order.tolist() == flip and data.train.skeleton.names == COCO_PERSON_KEYPOINTS
    np.testing.assert_array_equal(data.sigmas, COCO_PERSON_SIGMAS)
    for role, split in (("train", data.train), ("val", data.val)):
        ours, coco = split.annotations, annotations_of(splits[role][0])
        np.testing.assert_allclose(ours.keypoints, coco.keypoints, rtol=0, atol=1e-9)
        sigmas = COCO_PERSON_SIGMAS
        assert figures(ours, "keypoints", sigmas) == figures(coco, "keypoints", sigmas)


def test_drawn_coco_and_its_copy_have_the_same_pictures(tmp_path):
    splits = same_classes(read_splits(draw_coco(tmp_path / "coco"), crowds=False))
    data = load(write_yolo(tmp_path / "yolo", splits))
    content, folder = splits["val"]
    for i, image in enumerate(content["images"]):
        pixels = np.asarray(Image.open(folder / image["file_name"]))
        np.testing.assert_array_equal(data.val.images.read(data.val.annotations, i), pixels)
