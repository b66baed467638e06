"""The sigma workbench recovers known sigmas, explains them in pixels, and draws AP against them."""

import json

import numpy as np
import pytest

import sigmas
from evaluation.sigma_estimation import (
    Annotator,
    check_independent,
    estimate_sigmas,
    format_card,
    pixels_for_oks,
    read_annotator,
    read_annotators,
)
from evaluation.similarity import object_keypoint_similarity
from helpers.coco_cases import oracle, random_case

TRUE = np.array([0.02, 0.05, 0.1])


def annotate(num_annotators, num_objects, seed=0):
    """Annotators whose errors have the given sigmas on objects of many sizes; sigma^2 is E[d^2 / s^2] in two dimensions."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 2000, (num_objects, 2)), rng.uniform(50, 400, (num_objects, 2))], axis=1)
    true_points = boxes[:, None, :2] + rng.random((num_objects, 3, 2)) * boxes[:, None, 2:]
    size = np.sqrt(boxes[:, 2] * boxes[:, 3])
    annotators = []
    for _ in range(num_annotators):
        noise = rng.normal(0, 1, (num_objects, 3, 2)) / np.sqrt(2) * TRUE[:, None] * size[:, None, None]
        points = np.concatenate([true_points + noise, np.full((num_objects, 3, 1), 2.0)], axis=2)
        images = {str(n): (boxes[n : n + 1], points[n : n + 1]) for n in range(num_objects)}
        annotators.append(Annotator(images, ("a", "b", "c")))
    return annotators


@pytest.mark.parametrize("num_annotators", [2, 3, 5])
def test_known_sigmas_are_recovered_within_the_interval(num_annotators):
    inside = 0
    for seed in range(10):
        estimate = estimate_sigmas(annotate(num_annotators, 200, seed))
        inside += int(((estimate.low <= TRUE) & (estimate.high >= TRUE)).sum())
        assert estimate.sigmas == pytest.approx(TRUE, rel=0.2)
    assert inside >= 25  # of 30, at 95 %


def test_two_annotators_are_not_biased():
    mean = np.mean([estimate_sigmas(annotate(2, 300, seed)).sigmas for seed in range(5)], axis=0)
    assert mean == pytest.approx(TRUE, rel=0.05)


def test_sigmas_of_two_objects_are_those_of_the_formula():
    """Two objects of 10 x 10; the second point is labelled on one of them, and the third annotator labels nothing."""
    boxes = np.array([[0.0, 0, 10, 10], [50, 50, 10, 10]])
    first = np.array([[[0.0, 0, 2], [5, 5, 2]], [[50, 50, 2], [0, 0, 0]]])
    second = np.array([[[2.0, 0, 2], [5, 8, 1]], [[50, 54, 2], [0, 0, 0]]])
    third = np.full((2, 2, 3), 90.0) * [1, 1, 0]
    expected = np.sqrt([((1 + 1) / 100 + (4 + 4) / 100) / 2, (2.25 + 2.25) / 100])
    for annotations in ([first, second], [first, third, second], [third, second, first]):
        estimate = estimate_sigmas([Annotator({"a": (boxes, points)}) for points in annotations])
        assert estimate.sigmas == pytest.approx(expected)
        assert estimate.num_objects.tolist() == [2, 1]


def test_only_shared_images_with_objects_tell_whether_annotators_are_independent():
    def annotator(**points):
        return Annotator(
            {name: (np.ones((len(p), 4)), np.array(p).reshape(len(p), 1, 3)) for name, p in points.items()}
        )

    one, empty = [[[1.0, 2, 2]]], np.zeros((0, 1, 3))
    check_independent([annotator(a=one), annotator(b=one)], "AB")
    check_independent([annotator(a=empty, b=one), annotator(a=empty)], "AB")
    check_independent([annotator(a=one, b=one), annotator(a=[[[1.0, 3, 2]]], b=one)], "AB")
    with pytest.raises(ValueError, match="A and B have the same keypoints to the last digit on 1 images"):
        check_independent([annotator(a=one, b=one, c=empty), annotator(a=one, c=empty)], "AB")


def test_unlabelled_points_and_strange_objects_are_left_out():
    first, second = annotate(2, 100)
    for n in range(50):
        second.images[str(n)][1][0, 0, 2] = 0
    second.images["60"] = (second.images["60"][0] + 5000, second.images["60"][1])
    del second.images["61"]
    estimate = estimate_sigmas([first, second])
    assert estimate.num_objects.tolist() == [48, 98, 98]
    assert estimate.sigmas == pytest.approx(TRUE, rel=0.3)


def test_what_cannot_be_estimated_is_refused():
    first, second = annotate(2, 3)
    with pytest.raises(ValueError, match="two annotators or more"):
        estimate_sigmas([first])
    with pytest.raises(ValueError, match="different numbers of keypoints"):
        estimate_sigmas([first, Annotator({"0": (np.zeros((1, 4)), np.zeros((1, 2, 3)))})])
    moved = Annotator({k: (b + 5000, p) for k, (b, p) in second.images.items()})
    nothing = Annotator({k: (b[:0], p[:0]) for k, (b, p) in second.images.items()})
    for pair in ([first, moved], [nothing, first], [first, nothing], [nothing, nothing]):
        with pytest.raises(ValueError, match="no object was annotated by two"):
            estimate_sigmas(pair)


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.95])
def test_pixels_of_the_card_give_the_oks_they_promise(threshold):
    pixels = pixels_for_oks(0.05, threshold, 900.0)
    point, truth = np.array([[[100 + pixels, 50, 1]]]), np.array([[100.0, 50, 2]])
    oks = object_keypoint_similarity(point, truth, np.array([80.0, 30, 30, 30]), 900.0, np.array([0.05]))
    assert oks[0] == pytest.approx(threshold, abs=1e-9)
    assert "30 x 30" in format_card(np.array([0.05]), ("a",), np.array([900.0]))


def write_annotator(folder, annotator):
    folder.mkdir(parents=True)
    for stem, (boxes, points) in annotator.images.items():
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        (folder / f"{stem}.json").write_text(json.dumps({"bboxes": corners.tolist(), "keypoints": points.tolist()}))


def test_the_command_reads_folders_and_warns_about_few_objects(tmp_path, capsys):
    for name, annotator in zip(("one", "two"), annotate(2, 30)):
        write_annotator(tmp_path / name / "annotations", annotator)
    assert sigmas.run(["estimate", str(tmp_path / "one"), str(tmp_path / "two" / "annotations")]) == 0
    out = capsys.readouterr().out
    assert "--kpt-oks-sigmas 0.0" in out and "only 30 objects" in out and "95 % interval" in out
    assert sigmas.run(["card", "--ground-truth", str(tmp_path / "one"), "--kpt-oks-sigmas", "0.05"]) == 0
    assert "pixels of error at the median object" in capsys.readouterr().out
    assert sigmas.run(["estimate", str(tmp_path / "one"), str(tmp_path / "nowhere")]) == 1
    assert "nowhere: neither a COCO json nor a folder" in capsys.readouterr().err


def test_one_annotator_given_twice_is_refused_and_named(tmp_path, capsys):
    first, second = annotate(2, 3)
    for name, annotator in (("one", first), ("two", second), ("copy", first)):
        write_annotator(tmp_path / name, annotator)
    one, two, copy = (str(tmp_path / name) for name in ("one", "two", "copy"))
    for flags in ([one, one], [one, two, copy]):
        assert sigmas.run(["estimate", *flags]) == 1
        captured = capsys.readouterr()
        assert f"{one} and {flags[-1]} have the same keypoints to the last digit on 3 images" in captured.err
        assert "--kpt-oks-sigmas" not in captured.out


def test_a_keypoint_on_which_all_agree_is_named(tmp_path, capsys):
    first, second = annotate(2, 3)
    for stem, (_, points) in second.images.items():
        points[:, 1] = first.images[stem][1][:, 1]
    for name, annotator in (("one", first), ("two", second)):
        write_annotator(tmp_path / name, annotator)
    assert sigmas.run(["estimate", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert "nobody differs on 1: a sigma of 0 allows no error at all" in out and "\n--kpt-oks-sigmas" not in out


def test_a_keypoint_that_nobody_labelled_twice_is_named_and_no_refused_flag_is_printed(tmp_path, capsys, recwarn):
    first, second = annotate(2, 60)
    for _, points in second.images.values():
        points[:, 2] = 0
    for name, annotator in (("one", first), ("two", second)):
        write_annotator(tmp_path / name, annotator)
    flags = ["estimate", str(tmp_path / "one"), str(tmp_path / "two")]
    assert sigmas.run(flags) == 0 and not recwarn.list
    out = capsys.readouterr().out
    assert "no object has 2 labelled by two annotators" in out and "objects were annotated twice" not in out
    assert "\n--kpt-oks-sigmas" not in out and "no line with --kpt-oks-sigmas" in out
    for path in (tmp_path / "two").glob("*.json"):
        path.write_text(path.read_text().replace("2.0]", "0]"))
    assert sigmas.run(flags) == 1
    assert "no keypoint of any object was labelled by two annotators" in capsys.readouterr().err


def test_annotators_in_coco_files(tmp_path):
    truth, _ = random_case(3, "keypoints", 5)
    (tmp_path / "a.json").write_text(json.dumps(truth))
    annotator = read_annotator(tmp_path / "a.json")
    estimate = estimate_sigmas([annotator, annotator])
    assert np.nanmax(estimate.sigmas) == 0  # nobody disagrees with themselves


def test_the_curve_is_ap_at_scaled_sigmas(tmp_path, capsys):
    truth, results = random_case(3, "keypoints", 5)
    (tmp_path / "t.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps(results))
    flags = ["--ground-truth", str(tmp_path / "t.json"), "--predictions", str(tmp_path / "r.json")]
    assert sigmas.run(["curve", *flags, "--kpt-oks-sigmas", "0.06"]) == 0
    rows = {float(r.split()[0]): r.split()[1] for r in capsys.readouterr().out.splitlines()[2:]}
    for factor in (0.25, 1.0, 4.0):
        expected = oracle(truth, results, "keypoints", np.full(5, 0.06) * factor).stats[0]
        assert rows[factor] == f"{expected:.4f}"


def test_images_with_several_objects_and_without_any_are_read(tmp_path):
    """The second annotator saw nothing where the first saw two objects, and one more elsewhere."""
    boxes, points = [[0, 0, 10, 10], [20, 30, 60, 80]], [[[1, 2, 2], []], [[25, 35, 2], [30, 70, 1]]]
    moved = [[[1, 4, 2], []], [[25, 35, 2], [33, 70, 1]]]
    found = {"one": {"a": (boxes, points), "b": ([], []), "c": (boxes, points)},
             "two": {"a": (boxes, moved), "b": (boxes, moved), "c": ([], [])}}  # fmt: skip
    for folder, images in found.items():
        (tmp_path / folder).mkdir()
        for stem, (bboxes, keypoints) in images.items():
            (tmp_path / folder / f"{stem}.json").write_text(json.dumps({"bboxes": bboxes, "keypoints": keypoints}))
    one, two = (read_annotator(tmp_path / folder) for folder in found)
    assert one.images["a"][0].tolist() == [[0, 0, 10, 10], [20, 30, 40, 50]]
    assert one.images["a"][1].tolist() == [[[1, 2, 2], [0, 0, 0]], [[25, 35, 2], [30, 70, 1]]]
    estimate = estimate_sigmas([one, two])
    assert estimate.sigmas == pytest.approx(np.sqrt([2 / 100 / 2, 4.5 / 2000]))
    assert estimate.num_objects.tolist() == [2, 1]
    assert sigmas.run(["estimate", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    (tmp_path / "two" / "d.json").write_text(json.dumps({"bboxes": [], "keypoints": points}))
    with pytest.raises(ValueError, match=r"d\.json: expected bboxes"):
        read_annotator(tmp_path / "two")


def test_jsons_of_boxes_alone_are_refused_for_what_they_lack(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"bboxes": [[0, 0, 10, 10]], "keypoints": []}))
    with pytest.raises(ValueError, match=f"{tmp_path}: no keypoints"):
        read_annotator(tmp_path)


def test_images_of_equal_name_in_different_folders_are_different_images(tmp_path):
    text = json.dumps({"bboxes": [[0, 0, 10, 10]], "keypoints": [[[1, 2, 2]]]})
    (tmp_path / "day2").mkdir()
    for name in ("a.json", "b.JSON", "day2/a.json"):
        (tmp_path / name).write_text(text)
    assert sorted(read_annotator(tmp_path).images) == ["a", "b", "day2/a"]
    (tmp_path / "a.JSON").write_text(text)
    with pytest.raises(ValueError, match="two entries are of one image, a, or of two that differ by their suffix"):
        read_annotator(tmp_path)

    point = {"category_id": 1, "bbox": [0, 0, 10, 10], "keypoints": [1, 2, 2]}
    names, sizes = ["./day1/a.jpg", "day2/a.jpg"], {"height": 20, "width": 20}
    truth = {
        "images": [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)],
        "annotations": [{"id": i + 1, "image_id": i, **point} for i in range(len(names))],
        "categories": [{"id": 1, "name": "tube"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(truth))
    assert sorted(read_annotator(tmp_path / "coco.json").images) == ["day1/a", "day2/a"]
    (tmp_path / "one" / "day2").mkdir(parents=True)
    (tmp_path / "one" / "day2" / "a.json").write_text(text)
    both = read_annotators([tmp_path / "coco.json", tmp_path / "one"])
    assert [sorted(a.images) for a in both] == [["day1/a", "day2/a"], ["day2/a"]]
    alone = read_annotators([tmp_path / "one", tmp_path / "one" / "day2"])  # of tools that begin at other folders
    assert [sorted(a.images) for a in alone] == [["a"], ["a"]]
    truth["images"][1]["file_name"] = "day1/a.png"
    (tmp_path / "coco.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="two entries are of one image, day1/a"):
        read_annotator(tmp_path / "coco.json")


def test_pictures_without_objects_are_read_as_training_reads_them(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"bboxes": [[0, 0, 10, 10]], "keypoints": [[[1, 2, 2]]]}))
    (tmp_path / "none.json").write_text(json.dumps({"bboxes": []}))
    assert sigmas.run(["card", "--ground-truth", str(tmp_path)]) == 0
    assert "median object (10 x 10 pixels)" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps({"bboxes": [[0, 0, 10, 10]]}))
    assert sigmas.run(["card", "--ground-truth", str(tmp_path)]) == 1
    assert "a.json: expected bboxes" in capsys.readouterr().err


def test_the_card_goes_by_the_nearest_dataset_json(tmp_path, capsys, monkeypatch):
    folder, info = tmp_path / "custom" / "train" / "annotations", {"keypoint_names": ["a", "b"]}
    write_annotator(folder, annotate(1, 2)[0])
    (tmp_path / "custom" / "dataset.json").write_text(json.dumps({**info, "oks_sigmas": [0.01, 0.02]}))
    assert sigmas.run(["card", "--ground-truth", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "dataset.json: keypoint_names: 2 keypoint names for objects with 3 keypoints; name every" in said
    assert "dataset.json: oks_sigmas: 2 OKS sigmas for objects with 3 keypoints" in said

    info["keypoint_names"].append("c")
    (tmp_path / "dataset.json").write_text(json.dumps({"keypoint_names": ["another", "dataset"]}))
    (tmp_path / "custom" / "dataset.json").write_text(json.dumps({**info, "oks_sigmas": [0.01, 0.02, 0.03]}))
    monkeypatch.chdir(tmp_path / "custom" / "train")
    for path in (folder, folder.parent, "annotations", "."):
        assert sigmas.run(["card", "--ground-truth", str(path)]) == 0
        rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]]
        assert rows == [["a", "0.0100"], ["b", "0.0200"], ["c", "0.0300"]]
