"""Results whose ids or boxes mean something else than they say are warned of, and right ones never."""

import json

import numpy as np
import pytest

import score
import sigmas


def drawn(seed=0):
    """Return (ground truth of three classes, results that fit it but for some pixels)."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"day/im_{i}.png", "height": 240, "width": 320} for i in range(1, 7)]
    objects = []
    for image in images:
        for _ in range(4):
            x, y, w, h = (int(v) for v in rng.integers((40, 40, 30, 20), (180, 140, 130, 90)))
            record = {"image_id": image["id"], "category_id": int(rng.integers(1, 4)), "bbox": [x, y, w, h]}
            points = [x, y, 2, x + w, y + h, 2]
            objects.append({**record, "id": len(objects) + 1, "area": w * h, "iscrowd": 0, "keypoints": points})
    truth = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(("nut", "bolt", "washer"))],
    }
    results = []
    for n, o in enumerate(objects):
        bbox = [v + int(d) for v, d in zip(o["bbox"], rng.integers(-1, 2, 4))]
        results.append({k: o[k] for k in ("image_id", "category_id")} | {"bbox": bbox, "score": 0.5 + n / 100})
    return truth, results


def scored(tmp_path, truth, results):
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    flags = ["--ground-truth", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "results.json")]
    return score.run(flags), flags


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c - 1, "0 on 'nut' (id 1), 1 on 'bolt' (id 2), 2 on 'washer' (id 3); the ids seem"),
        (lambda c: c % 3 + 1, "1 on 'washer' (id 3), 2 on 'nut' (id 1), 3 on 'bolt' (id 2)"),
        (lambda c: ("nut", "bolt", "washer")[c - 1], "'bolt' on 'bolt' (id 2)"),
    ],
)
def test_category_ids_of_another_numbering_are_warned_of(tmp_path, capsys, change, expected):
    truth, results = drawn()
    results = [{**r, "category_id": change(r["category_id"])} for r in results]
    assert scored(tmp_path, truth, results)[0] == 0
    out = capsys.readouterr().out
    assert "boxes lie on objects of other categories than their category_id says" in out and expected in out


FORMS = {
    "[x1, y1, x2, y2]": lambda x, y, w, h: [x, y, x + w, y + h],
    "[x, y, width, height] with x and y of the centre": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "[y, x, height, width]": lambda x, y, w, h: [y, x, h, w],
    "[x, y, width, height] as shares of the picture": lambda x, y, w, h: [x / 320, y / 240, w / 320, h / 240],
    "[x1, y1, x2, y2] as shares of the picture": lambda x, y, w, h: [x / 320, y / 240, (x + w) / 320, (y + h) / 240],
    "YOLO's shares of the picture, x and y of the centre": lambda x, y, w, h: [
        (x + w / 2) / 320, (y + h / 2) / 240, w / 320, h / 240
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form_are_warned_of_with_its_name(tmp_path, capsys, form):
    truth, results = drawn()
    results = [{**r, "bbox": FORMS[form](*r["bbox"])} for r in results]
    assert scored(tmp_path, truth, results)[0] == 0
    assert f"boxes barely overlap the objects of their picture, but would as {form}; " in capsys.readouterr().out


def resized(mode, x, y, w, h, size):
    """Return a box on the picture as a model's input has it."""
    width, height = size
    by = {
        "about 0.5 times as large": (0.5, 0.5),
        "their longer side 640 pixels": (640 / max(size),) * 2,
        "their shorter side 800 pixels": (800 / min(size),) * 2,
        "512 x 512 pixels": (512 / width, 512 / height),
        "in the middle of 640 x 640 pixels": (640 / max(size),) * 2,
    }[mode]
    left, top = ((640 - by[0] * side) / 2 if "middle" in mode else 0 for side in size)
    return [x * by[0] + left, y * by[1] + top, w * by[0], h * by[1]]


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", [
    "about 0.5 times as large", "their longer side 640 pixels", "their shorter side 800 pixels", "512 x 512 pixels",
    "in the middle of 640 x 640 pixels",
])  # fmt: skip
def test_boxes_on_resized_pictures_are_warned_of_with_the_resize(tmp_path, capsys, mode, corners):
    truth, results = drawn()
    for image in truth["images"][::2]:  # upright ones too; boxes lie within 240 x 240
        image["height"], image["width"] = 360, 300
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    for r in results:
        x, y, w, h = resized(mode, *r["bbox"], sizes[r["image_id"]])
        r["bbox"] = [x, y, x + w, y + h] if corners else [x, y, w, h]
    results[0]["bbox"] = [3, 3, 200, 100]  # a wrong one
    assert scored(tmp_path, truth, results)[0] == 0
    form = "[x1, y1, x2, y2]" if corners else "[x, y, width, height]"
    assert f"but would as {form} in pixels of resized pictures ({mode}); " in capsys.readouterr().out


@pytest.mark.parametrize("error", [0, 12, 40, 200])
def test_right_ids_and_boxes_are_not_warned_of(tmp_path, capsys, error):
    """However far off the boxes are, and with classes confused in half of the cases."""
    truth, results = drawn(1)
    rng = np.random.default_rng(2)
    for r in results:
        r["bbox"] = [max(1, v + int(d)) for v, d in zip(r["bbox"], rng.integers(-error, error + 1, 4))]
        r["category_id"] = r["category_id"] if rng.random() < 0.5 else int(rng.integers(1, 4))
    assert scored(tmp_path, truth, results)[0] == 0
    out = capsys.readouterr().out
    assert "boxes lie on" not in out and "barely overlap" not in out


def test_no_results_are_a_warning(tmp_path, capsys):
    assert scored(tmp_path, drawn()[0], [])[0] == 0
    assert "results.json: no results at all; every figure is 0" in capsys.readouterr().out


def test_boxes_without_an_inside_are_counted(tmp_path, capsys):
    truth, results = drawn()
    results[3]["bbox"][2] *= -1
    results[5]["bbox"][3] = 0
    assert scored(tmp_path, truth, results)[0] == 0
    assert "2 of 24 boxes have no inside (a width or height of 0 or less) and find nothing" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["im_1", "im_1.png", "day/im_1.png", "im_1.jpg", "C:\\data\\im_1.png"])
def test_file_names_as_image_ids_get_the_right_one_named(tmp_path, capsys, name):
    truth, results = drawn()
    code, flags = scored(tmp_path, truth, [{**results[0], "image_id": name, "keypoints": [1, 1, 2, 1, 1, 2]}])
    expected = f"not in the ground truth: {name}; {name!r} is the file of the image with id 1; give the ids"
    assert code == 1 and expected in capsys.readouterr().err
    assert sigmas.run(["curve", *flags]) == 1  # such results were left out there without a word
    assert expected in capsys.readouterr().err


def test_the_curve_wants_results_with_as_many_keypoints_as_the_truth(tmp_path, capsys):
    truth, results = drawn()
    for points, expected in (
        ([1, 1, 2], "3 numbers under 'keypoints', the ground truth has 3 x 2"),
        (None, "no result has"),
    ):
        _, flags = scored(tmp_path, truth, [{**results[0], "keypoints": points}])
        capsys.readouterr()
        assert sigmas.run(["curve", *flags]) == 1
        assert expected in capsys.readouterr().err
