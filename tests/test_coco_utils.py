"""COCO files to arrays and back; every malformed entry is found by one line that names place and field."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from annotations.arrays import Annotations, cached_annotations, load_annotations, save_annotations
from annotations.findings import LINES_PER_KIND, BadDataError
from coco_utils import read_coco, read_json, to_coco
from helpers.drawn import draw_coco
from loading.voc_dataset import read_xml
from loading.yolo_yaml import read_yaml
from pixels.masks import compress_rle


def content(**changes):
    base = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 60}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
    }
    base = copy.deepcopy(base)
    for path, value in changes.items():
        section, index, field = path.split("__")
        if value is KeyError:
            del base[section][int(index)][field]
        else:
            base[section][int(index)][field] = value
    return base


def write(tmp_path, value, name="file.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(tmp_path, value, **options):
    return read_coco(write(tmp_path, value), **options)


def test_arrays_hold_what_the_file_says(tmp_path):
    annotations = read(tmp_path, content())
    assert len(annotations) == 1 and annotations.num_objects == 2
    assert annotations.file_name(0) == "a.jpg"
    assert annotations.categories == ((3, "a"), (7, "b"))
    assert annotations.boxes_xywh.tolist() == [[5, 6, 20, 30], [1, 2, 10, 10]]
    assert annotations.category_ids.tolist() == [3, 7]
    assert annotations.object_classes().tolist() == [0, 1] and annotations.position_of == {1: 0}
    assert annotations.warnings == ()


def test_real_coco_files_round_trip_without_a_false_alarm(tiny_coco):
    for name in ("instances_train2017", "instances_val2017", "person_keypoints_train2017", "person_keypoints_val2017"):
        path = tiny_coco / "annotations" / f"{name}.json"
        annotations = read_coco(path, uses=["segm"])
        assert annotations.warnings == ()
        ours, theirs = COCO(), COCO(str(path))
        ours.dataset = to_coco(annotations)
        ours.createIndex()
        assert ours.getImgIds() == theirs.getImgIds() and ours.getCatIds() == sorted(theirs.getCatIds())
        for image_id in theirs.getImgIds():
            for a, b in zip(ours.imgToAnns[image_id], theirs.imgToAnns[image_id]):
                for field in ("bbox", "area", "iscrowd", "category_id"):
                    assert a[field] == b[field]
                assert a.get("num_keypoints") == b.get("num_keypoints")
                assert (ours.annToMask(a) == theirs.annToMask(b)).all()


def test_missing_area_crowd_flag_and_ids_are_filled_in(tmp_path):
    value = content(annotations__0__area=KeyError, annotations__0__iscrowd=KeyError, annotations__0__id=KeyError)
    value["annotations"][1].pop("area")
    value["annotations"][1]["segmentation"] = [[1, 2, 11, 2, 11, 12]]
    annotations = read(tmp_path, value)
    mask = COCO()
    mask.dataset, mask.anns = {"images": []}, {}
    assert annotations.areas[0] == 600
    assert annotations.areas[1] == pytest.approx(50, abs=6)  # the triangle's pixels, not its box
    assert annotations.is_crowd.tolist() == [False, False]


def test_annotation_id_zero_is_renumbered_for_scoring(tmp_path):
    annotations = read(tmp_path, content(annotations__0__id=0))
    assert [record["id"] for record in to_coco(annotations)["annotations"]] == [1, 2]


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert len(read_coco(path)) == 1


NAN, INF = float("nan"), float("inf")

BAD = {
    "truncated json": ('{"images": [', r"not valid json at line 1 column 13"),
    "empty file": ("", r"not valid json at line 1 column 1"),
    "a list": ("[]", r"expected an object with images, annotations and categories, got \[\]"),
    "NaN": (json.dumps(content()).replace("600", "NaN"), r"the number NaN at line 1 column \d+ is not allowed"),
    "Infinity": (json.dumps(content()).replace("600", "-Infinity"), r"the number -Infinity at line 1 column \d+ is not allowed"),
    "1e999": (json.dumps(content()).replace("[5,", "[1e999,"), r"annotations\[0\] \(id 1\): bbox is \[inf.*finite"),
    "double key": ('{"images": [], "images": []}', r"key 'images' occurs twice"),
    "deep nesting": ("[" * 100_000, r"nested too deeply|not valid json"),
    "no categories": ({**content(), "categories": []}, r"no categories"),
    "images missing": ({k: v for k, v in content().items() if k != "images"}, r"list of objects under 'images'"),
    "category without name": (content(categories__0__name=KeyError), r"categories\[0\]: name is missing, expected a name"),
    "objects under another key": (
        {**{k: v for k, v in content().items() if k != "annotations"}, "annotation": content()["annotations"]},
        r"no entry 'annotations', but 'annotation'; call it 'annotations' if it holds the objects",
    ),
    "ids from 0": (
        content(categories__0__id=1, annotations__0__category_id=0),
        r"category_id 0 is not among .*; the categories count from 1: if these ids count from 0, all of them are one too",
    ),
    "a box as polygon": (
        content(annotations__0__segmentation=[[5, 6, 20, 30]]),
        r"segmentation is \[\[5, 6, 20, 30\]\], which has no inside; give polygons of three points or more",
    ),
    "no masks": (content(), r"^1 error.*\n.*2 of 2 objects have no segmentation, but masks are used; add polygons"),
    "double category": (content(categories__0__id=3), r"category id 3 occurs twice"),
    "image id": (content(images__0__id=1.5), r"images\[0\]: id is 1\.5, expected a whole number or text"),
    "no file name": (content(images__0__file_name=KeyError), r"images\[0\]: file_name is missing"),
    "other key": (
        content(images__0__file_name=KeyError, images__0__filename="a.jpg"),
        r"images\[0\]: file_name is missing, .*; is the entry 'filename' meant\? It is called 'file_name'",
    ),
    "no size": (content(images__0__height=KeyError), r"images\[0\]: height is missing, expected a whole number of pixels"),
    "zero size": (content(images__0__width=0), r"images\[0\]: width is 0, expected a whole number of pixels, 1 to"),
    "parent path": (content(images__0__file_name="../a.jpg"), r"'\.\./a\.jpg' is a path that leaves its folder"),
    "absolute path": (content(images__0__file_name="/etc/passwd"), r"'/etc/passwd' is an absolute path"),
    "drive path": (content(images__0__file_name="C:\\a.jpg"), r"is an absolute path"),
    "backslash parent": (content(images__0__file_name="b\\..\\..\\a.jpg"), r"leaves its folder"),
    "NUL": (content(images__0__file_name="a\0.jpg"), r"an empty name or a NUL byte"),
    "URL": (content(images__0__file_name="http://x/a.jpg"), r"a URL, which is never fetched"),
    "hidden parent": (content(images__0__file_name="b/../../a.jpg"), r"leaves its folder"),
    "share": (content(images__0__file_name="\\\\host\\a.jpg"), r"is an absolute path"),
    "unknown image": (content(annotations__0__image_id=9), r"annotations\[0\] \(id 1\): image_id 9 is not among"),
    "unknown category": (content(annotations__0__category_id=9), r"annotations\[0\] \(id 1\): category_id 9 is not among"),
    "float category": (content(annotations__0__category_id=3.5), r"category_id is 3\.5, expected a whole number"),
    "double id": (content(annotations__1__id=1), r"annotations\[1\].*annotation id 1 is also that of .*annotations\[0\]"),
    "no box": (content(annotations__0__bbox=KeyError), r"annotations\[0\].*bbox is missing, expected 4 finite numbers"),
    "no box, broken mask": (
        content(annotations__0__bbox=None, annotations__0__segmentation={"size": [50, 60], "counts": "o"}),
        r"bbox is null, expected 4 finite numbers",
    ),
    "class by name": (
        content(annotations__0__category_id="A "),
        r"category_id 'A ' is not among the categories; 'A ' is the name of the category with id 3; give the id",
    ),
    "image by file": (
        content(annotations__0__image_id="a"),
        r"image_id 'a' is not among the images; 'a' is the file of the image with id 1; give the id",
    ),
    "short box": (content(annotations__0__bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\], expected 4 finite numbers"),
    "text box": (content(annotations__0__bbox=[1, 2, 3, "x"]), r"bbox is \[1, 2, 3, 'x'\], expected 4 finite numbers"),
    "negative width": (content(annotations__0__bbox=[5, 5, -2, 3]), r"bbox \[5, 5, -2, 3\] has a negative width"),
    "outside": (content(annotations__0__bbox=[70, 5, 10, 10]), r"box \[70, 5, 10, 10\] lies outside the image of 60 x 50"),
    "crowd flag": (content(annotations__0__iscrowd=3), r"iscrowd is 3"),
    "negative area": (content(annotations__0__area=-1), r"area is -1"),
    "text area": (content(annotations__0__area="big"), r"area is 'big'"),
    "odd polygon": (content(annotations__0__segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"annotations\[0\].*7 is not an even number"),
    "text polygon": (content(annotations__0__segmentation=[[1, 2, 3, 4, 5, "x"]]), r"annotations\[0\].*finite numbers.*'x'"),
    "flat polygon of odd length": (content(annotations__0__segmentation=[1, 2, 3, 4, 5, 6, 7]), r"7 is not an even number"),
    "polygon of shares": (
        content(annotations__0__segmentation=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]),
        r"annotations\[0\].*polygon \[0\.1, 0\.1, .* looks normalised to the picture's size \(0 to 1\); expected pixels",
    ),
    "text segmentation": (content(annotations__0__segmentation="abc"), r"expected polygons .*or run lengths"),
    "rle size": (content(annotations__0__segmentation={"size": [5, 5], "counts": "0"}), r"mask has size \[5, 5\], the image \[50, 60\]"),
    "rle sum": (content(annotations__0__segmentation={"size": [50, 60], "counts": [5]}), r"do not add up to the picture's 50 x 60"),
    "rle string sum": (content(annotations__0__segmentation={"size": [50, 60], "counts": "5"}), r"do not add up"),
    "rle garbage": (content(annotations__0__segmentation={"size": [50, 60], "counts": "\x01\x02"}), r"COCO's compressed string"),
    "rle cut off": (content(annotations__0__segmentation={"size": [50, 60], "counts": "o"}), r"end within a number"),
    "keypoints of two": (content(annotations__0__keypoints=[1, 2, 3, 4]), r"4 numbers are not three per point"),
    "keypoint counts": (
        content(annotations__0__keypoints=[1, 2, 2], annotations__1__keypoints=[1, 2, 2, 1, 2, 2]),
        r"annotations\[1\].*1 object\(s\) of class 'b' have 2 keypoints, those of 'a' 1",
    ),
    "visibility": (content(annotations__0__keypoints=[1, 2, 3]), r"annotations\[0\].*visibilities 3"),
    "keypoint infinity": (
        json.dumps(content(annotations__0__keypoints=[1, 2, 2])).replace("[1, 2, 2]", "[1e999, 2, 2]"),
        r"keypoints is \[inf.*finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_by_one_line_that_names_the_place(tmp_path, name):
    value, message = BAD[name]
    with pytest.raises(BadDataError, match=message) as caught:
        read(tmp_path, value, uses=["segm", "keypoints"])
    assert "file.json" in str(caught.value)


def test_boxes_for_a_larger_picture_are_told_with_the_scale(tmp_path):
    value = content()
    value["annotations"] = [
        {"id": n + 1, "image_id": 1, "category_id": 3, "bbox": [12 * n, 10 * n, 12, 10]} for n in range(10)
    ]
    with pytest.raises(BadDataError, match=r"seem to be for pictures 2 times as large: was the size changed after"):
        read(tmp_path, value)  # the last ends at 120, 100 of a picture of 60 x 50
    for record in value["annotations"][7:]:
        record["bbox"] = [1, 1, 12, 10]
    with pytest.raises(BadDataError, match=r"outside the image of 60 x 50 pixels; .* in pixels$"):
        read(tmp_path, value)  # two of ten


def test_corners_in_the_place_of_width_and_height_are_told(tmp_path):
    value = content()
    value["annotations"] = [
        {"id": n + 1, "image_id": 1, "category_id": 3, "bbox": [4 * n, 3 * n, 4 * n + 24, 3 * n + 20]}
        for n in range(10)
    ]
    told = [str(w) for w in read(tmp_path, value).warnings if w.kind == "box outside"]
    assert len(told) == 5 and told[0].endswith("it is cut to the image for training; these look like [x1, y1, x2, y2]")


def test_an_object_with_a_mask_and_no_box_has_the_box_around_it(tmp_path):
    triangle = [[5, 6, 25.5, 6, 25.5, 36], [30, 7, 31, 8]]  # the second has two points and no inside
    runs = {"size": [50, 60], "counts": [50 * 10 + 4, 6, 44, 6, 50 * 60 - 560]}  # rows 4 to 9 of columns 10 and 11
    value = content(annotations__0__segmentation=triangle, annotations__1__segmentation=runs)
    for record in value["annotations"]:
        del record["bbox"]
    value["annotations"].append({**value["annotations"][1], "id": 3, "segmentation": compress(runs)})
    annotations = read(tmp_path, value)
    assert annotations.boxes_xywh.tolist() == [[5, 6, 20.5, 30], [10, 4, 2, 6], [10, 4, 2, 6]]
    told = [str(w) for w in annotations.warnings if w.kind == "form"]
    assert len(told) == 1 and "an object with a mask and no box, and 2 more like it; the box around" in told[0]
    assert annotations.areas.tolist()[1:] == [100, 100]


def compress(runs):
    return {"size": runs["size"], "counts": compress_rle(runs, *runs["size"]).decode()}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("read", [read_json, read_yaml, read_xml])
def test_a_file_that_the_disk_does_not_give_is_named(read):
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        read(Path("/proc/self/mem"))


def test_all_findings_come_at_once(tmp_path):
    value = content(annotations__0__bbox=[5, 5, -2, 3], annotations__1__category_id=99)
    with pytest.raises(BadDataError, match="2 error") as caught:
        read(tmp_path, value)
    assert "negative width" in str(caught.value) and "category_id 99" in str(caught.value)


def test_many_findings_of_one_kind_are_counted(tmp_path):
    value = content()
    value["annotations"] = [{"id": n, "image_id": 1, "category_id": 99, "bbox": [1, 1, 5, 5]} for n in range(100)]
    with pytest.raises(BadDataError, match="and 80 more of kind object"):
        read(tmp_path, value)


def test_skip_leaves_out_the_object_or_the_image_and_counts_it(tmp_path):
    value = content(annotations__0__bbox=[5, 5, -2, 3])
    annotations = read(tmp_path, value, on_bad_data="skip")
    assert annotations.num_objects == 1 and annotations.category_ids.tolist() == [7]
    (warning,) = annotations.warnings
    assert "negative width" in warning.problem and "left out" in warning.remedy and not warning.is_error
    value = content(images__0__height=0)
    value["images"].append({"id": 2, "file_name": "b.jpg", "height": 9, "width": 9})
    annotations = read(tmp_path, value, on_bad_data="skip")
    assert annotations.image_ids.tolist() == [2] and annotations.num_objects == 0


def test_empty_and_cut_boxes_of_coco_files_are_warnings(tmp_path):
    value = content(annotations__0__bbox=[5, 6, 0, 30], annotations__1__bbox=[50, 40, 20, 30])
    annotations = read(tmp_path, value)
    assert annotations.num_objects == 2  # scored as the file says
    assert "has no inside" in annotations.warnings[0].problem and "cut to the image" in annotations.warnings[1].remedy


def test_a_mask_model_needs_segmentations(tmp_path):
    with pytest.raises(BadDataError, match=r"annotations\[0\].*no segmentation, but masks are used"):
        read(tmp_path, content(), uses=["segm"])


def test_the_cache_gives_the_same_arrays_and_notices_a_changed_file(tmp_path):
    root = draw_coco(tmp_path / "coco", num_images=20, num_keypoints=17)
    path = root / "annotations" / "person_keypoints_train2017.json"
    value = json.loads(path.read_text())
    num_objects = len(value["annotations"])
    for record in value["annotations"]:
        record["bbox"][2] = 0
    path.write_text(json.dumps(value))
    builds = []

    def build():
        builds.append(1)
        return read_coco(path)

    first = cached_annotations(path, build, tmp_path / "cache")
    second = cached_annotations(path, build, tmp_path / "cache")
    assert len(builds) == 1
    plain = read_coco(path)
    for name in ("boxes_xywh", "keypoints", "polygon_points", "object_starts", "name_bytes", "rle_bytes", "areas"):
        assert (getattr(second, name) == getattr(plain, name)).all()
    assert second.categories == plain.categories and second.keypoint_names == plain.keypoint_names
    assert second.skeleton == plain.skeleton and second.file_name(2) == plain.file_name(2)
    assert second.warnings == plain.warnings and len(plain.warnings) == LINES_PER_KIND + 1
    assert plain.warnings[-1].count == num_objects - LINES_PER_KIND and "has no inside" in plain.warnings[0].problem

    path.touch()  # another time, the same content
    cached_annotations(path, build, tmp_path / "cache")
    assert len(builds) == 1
    path.write_text(path.read_text().replace("000001.png", "000009.png"))
    changed = cached_annotations(path, build, tmp_path / "cache")
    assert len(builds) == 2 and changed.file_name(1) == "000009.png"
    assert first.file_name(1) == "000001.png"


def test_a_file_that_changes_while_it_is_read_is_read_again_by_the_next_start(tmp_path):
    path, later = write(tmp_path, content()), content()
    later["images"].append({**later["images"][0], "id": 99, "file_name": "new.png"})

    def build():
        annotations = read_coco(path)
        path.write_text(json.dumps(later))
        return annotations

    before = len(cached_annotations(path, build, tmp_path / "cache"))
    assert len(cached_annotations(path, lambda: read_coco(path), tmp_path / "cache")) == before + 1


def test_a_damaged_cache_is_built_anew_and_a_read_only_folder_does_no_harm(tmp_path):
    path = write(tmp_path, content())
    cache = tmp_path / "cache"
    cached_annotations(path, lambda: read_coco(path), cache)
    (file,) = cache.glob("*.annotations")
    file.write_bytes(b"garbage")
    assert cached_annotations(path, lambda: read_coco(path), cache).num_objects == 2
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert cached_annotations(path, lambda: read_coco(path), blocked).num_objects == 2


def test_cached_annotations_are_pickled_as_a_path(tmp_path):
    """A spawned worker gets the cache file's path, not the arrays."""
    annotations = read(tmp_path, content())
    save_annotations(annotations, tmp_path / "file.annotations")
    mapped = load_annotations(tmp_path / "file.annotations")
    rebuild, arguments = mapped.__reduce__()
    assert arguments == (str(tmp_path / "file.annotations"),)
    rebuild_plain, plain_arguments = annotations.__reduce__()
    for again in (rebuild(*arguments), rebuild_plain(*plain_arguments)):
        assert isinstance(again, Annotations) and (again.boxes_xywh == annotations.boxes_xywh).all()


def test_strict_reading_of_json(tmp_path):
    assert read_json(write(tmp_path, '{"a": [1, 2.5, null]}')) == {"a": [1, 2.5, None]}
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(BadDataError, match="not UTF-8"):
        read_json(path)


def test_objects_are_sorted_by_image_and_keep_their_order(tmp_path):
    value = content()
    value["images"].append({"id": 5, "file_name": "b.jpg", "height": 50, "width": 60})
    extra = {"image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9]}
    value["annotations"] = [{"id": 10, **extra}, *value["annotations"], {"id": 11, **extra, "bbox": [1, 1, 9, 9]}]
    annotations = read(tmp_path, value)
    assert annotations.object_starts.tolist() == [0, 2, 4]
    assert annotations.object_images().tolist() == [0, 0, 1, 1]
    assert annotations.boxes_xywh[2:, 0].tolist() == [0, 1]
    assert np.isfinite(annotations.areas).all()
