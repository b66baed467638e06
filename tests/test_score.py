"""Results files: written the same at any number of processes, scored as pycocotools scores them, refused when wrong."""

import copy
import json
import re

import numpy as np
import pytest
from pycocotools import mask as mask_util

import score
from coco_eval import CocoEvaluator
from coco_utils import read_coco
from evaluation.analysis import build_analysis, format_classes
from evaluation.coco_matching import match_across_classes
from evaluation.detections import Detections
from evaluation.results_files import (
    PredictionWriter,
    detections_of_results,
    read_results,
    read_results_of_images,
    rle_of_block,
)
from helpers.coco_cases import compare, oracle, random_case, to_annotations, to_detections
from helpers.ranks import run_on_ranks
from helpers.run_lengths import run_lengths
from pixels.masks import block_from_mask


def write(tmp_path, truth, results):
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return ["--ground-truth", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "results.json")]


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_a_results_file_gets_pycocotools_figures(tmp_path, capsys, iou_type):
    for seed in (1, 4, 7):
        truth, results = random_case(seed, iou_type, 5)
        flags = write(tmp_path, truth, results)
        sigmas = ["--kpt-oks-sigmas", "0.05", "0.06", "0.07", "0.08", "0.09"] if iou_type == "keypoints" else []
        assert score.run([*flags, *sigmas, "--iou-types", iou_type, "--json", str(tmp_path / "out.json")]) == 0
        figures = json.loads((tmp_path / "out.json").read_text())
        values = np.array([0.05, 0.06, 0.07, 0.08, 0.09]) if sigmas else None
        expected = oracle(truth, results, iou_type, values).stats
        assert [-1 if v is None else v for v in figures[iou_type].values()] == list(expected)
        assert "best F1" in capsys.readouterr().out


def compressed(rle):
    return (
        mask_util.frPyObjects(rle, *rle["size"])["counts"].decode()
        if isinstance(rle["counts"], list)
        else rle["counts"]
    )


FORMS_OF_MASKS = {
    "compressed": lambda rle: {**rle, "counts": compressed(rle)},
    "uncompressed": lambda rle: {**rle, "counts": run_lengths(compressed(rle).encode())},
    "uncompressed floats": lambda rle: {**rle, "counts": [float(c) for c in run_lengths(compressed(rle).encode())]},
}


@pytest.mark.parametrize("form", FORMS_OF_MASKS)
def test_masks_in_other_forms_get_the_same_figures(tmp_path, form):
    truth, results = random_case(4, "segm")
    figures = []
    for name in ("plain", "other"):
        flags = write(tmp_path, truth, results)
        assert score.run([*flags, "--iou-types", "segm", "--json", str(tmp_path / f"{name}.json")]) == 0
        figures.append(json.loads((tmp_path / f"{name}.json").read_text())["segm"])
        results = copy.deepcopy(results)
        for record in results:
            record["segmentation"] = FORMS_OF_MASKS[form](record["segmentation"])
    assert figures[0] == figures[1] and figures[0]["AP"] > 0


def test_polygons_in_results_are_scored_as_pycocotools_fills_them(tmp_path):
    rng = np.random.default_rng(5)
    truth, _ = random_case(4, "segm")
    results, as_runs = [], []
    for record in truth["annotations"]:
        x, y, w, h = record["bbox"]
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h], [x + 1, y, x + w, y + 2, x, y + h]]
        base = {k: record[k] for k in ("image_id", "category_id")} | {"score": float(rng.random())}
        results.append({**base, "segmentation": polygons})
        rle = mask_util.merge(mask_util.frPyObjects(polygons, 60, 80))
        as_runs.append({**base, "segmentation": {**rle, "counts": rle["counts"].decode()}})
    flags = write(tmp_path, truth, results)
    assert score.run([*flags, "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())["segm"]
    assert [-1 if v is None else v for v in figures.values()] == list(oracle(truth, as_runs, "segm").stats)


BROKEN_MASKS = {
    "text of bytes": ({"counts": "b'0'"}, r"\[0\]: counts is .*the text of Python's bytes"),
    "cut off": ({"counts": "o"}, r"\[0\]: the compressed run lengths end within a number"),
    "another sum": ({"counts": "5"}, r"\[0\]: the run lengths do not add up to the picture's 4800 pixels"),
    "no string": ({"counts": "\x01"}, r"\[0\]: the counts are not COCO's compressed string"),
    "another list": ({"counts": [3, -1]}, r"\[0\]: the run lengths do not add up"),
    "number": ({"counts": 7}, r"\[0\]: counts is 7, expected run lengths"),
    "turned size": ({"size": [80, 60]}, r"\[0\]: the mask has size \[80, 60\], which are width and height, the image \[60, 80\]"),
    "no size": ({"size": None}, r"\[0\]: the mask has size None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MASKS)
def test_broken_masks_are_refused_and_never_score_zero(tmp_path, capsys, name):
    change, message = BROKEN_MASKS[name]
    truth, results = random_case(4, "segm")
    results[0]["segmentation"].update(change)
    flags = write(tmp_path, truth, results)
    assert score.run(flags) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_broken_part_that_is_not_scored_is_a_warning(tmp_path, capsys):
    truth, results = random_case(2, "bbox")
    results[0] |= {"segmentation": 5, "keypoints": [1]}
    assert score.run([*write(tmp_path, truth, results), "--iou-types", "bbox"]) == 0
    output = capsys.readouterr().out
    assert "[0]: segmentation is 5" in output and "[0]: keypoints is [1]" in output


def test_ids_of_text_are_scored_and_come_back_in_results(tmp_path):
    """From a file with text for ids, over written predictions, to their score."""
    truth, results = random_case(2, "bbox")
    results = [record for record in results if record["category_id"] != 99]  # of no category
    for n, record in enumerate(results):  # between equal scores the order of ids decides
        record["score"] += 1e-6 * n
    expected = list(oracle(truth, results, "bbox").stats)
    own = {record["id"]: f"frame {record['id']}" for record in truth["images"]}
    classes = {record["id"]: f"{record['id']:03d}" for record in truth["categories"]}
    for record in [*truth["images"], *truth["categories"]]:
        record["id"] = (own if "file_name" in record else classes)[record["id"]]
    for record in [*truth["annotations"], *results]:
        record.update(image_id=own[record["image_id"]], category_id=classes[record["category_id"]])
    flags = write(tmp_path, truth, results)
    assert score.run([*flags, "--json", str(tmp_path / "a.json")]) == 0
    annotations = read_coco(tmp_path / "truth.json")
    records, _ = read_results(tmp_path / "results.json")
    writer = PredictionWriter(
        tmp_path, ["bbox"], dict.fromkeys(annotations.image_ids.tolist(), (60, 80)), annotations.id_texts
    )
    for image_id in annotations.image_ids.tolist():
        of_image = [record for record in records if record["image_id"] == image_id]
        writer.add([image_id], [detections_of_results(of_image, "bbox")])
    writer.close()
    written = json.loads((tmp_path / "predictions_bbox.json").read_text())
    assert {record["image_id"] for record in written} <= set(own.values())
    assert sorted(map(str, written)) == sorted(str({k: r[k] for k in written[0]}) for r in results)
    some = written[0]["image_id"]
    found = read_results_of_images(tmp_path / "predictions_bbox.json", [some])
    assert found == {some: [record for record in written if record["image_id"] == some]}
    flags[-1] = str(tmp_path / "predictions_bbox.json")
    assert score.run([*flags, "--json", str(tmp_path / "b.json")]) == 0
    for name in "ab":
        figures = json.loads((tmp_path / f"{name}.json").read_text())["bbox"]
        assert [-1 if v is None else v for v in figures.values()] == expected


def numbered_anew(results, order):
    """The same detections, each under the id of another image."""
    return [{**record, "image_id": order[record["image_id"]]} for record in results]


def test_results_of_another_numbering_are_noticed(tmp_path, capsys, tiny_coco):
    """Detections near the objects of real pictures, numbered in another order; a poor detector is not suspected."""
    path = tiny_coco / "annotations" / "instances_val2017.json"
    truth, rng = json.loads(path.read_text()), np.random.default_rng(0)
    good = [
        {k: r[k] for k in ("image_id", "category_id")} | {"score": 0.9, "bbox": [v + 1 for v in r["bbox"]]}
        for r in truth["annotations"]
    ]
    ids = [record["id"] for record in truth["images"]]
    turned = dict(zip(ids, ids[1:] + ids[:1]))
    poor = [{**r, "bbox": [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(10, 200, 2).tolist()]} for r in good]
    for results, is_noticed in ((good, False), (numbered_anew(good, turned), True), (poor, False)):
        assert score.run(write(tmp_path, truth, results)) == 0
        assert ("seem to be of another numbering" in capsys.readouterr().out) == is_noticed


def test_one_sigma_serves_all_points_and_a_wrong_count_is_refused(tmp_path, capsys):
    truth, results = random_case(4, "keypoints", 5)
    flags = write(tmp_path, truth, results)
    assert score.run([*flags, "--kpt-oks-sigmas", "0.05", "0.06"]) == 1
    assert "2 OKS sigmas (from --kpt-oks-sigmas) for objects with 5 keypoints" in capsys.readouterr().err
    assert score.run([*flags, "--kpt-oks-sigmas", "0.05", "--json", str(tmp_path / "o.json")]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["settings"]["kpt_oks_sigmas"] == [0.05] * 5


def test_results_of_a_picture_that_skip_leaves_out_are_left_out_and_counted(tmp_path, capsys):
    truth, results = random_case(4, "bbox")
    bad = next(image for image in truth["images"] if any(r["image_id"] == image["id"] for r in results))
    others = [r for r in results if r["image_id"] != bad["id"]]
    objects = [r for r in truth["annotations"] if r["image_id"] != bad["id"]]
    images = [image for image in truth["images"] if image is not bad]
    expected = oracle({**truth, "images": images, "annotations": objects}, others, "bbox").stats
    bad["width"] = -5
    flags = [*write(tmp_path, truth, results), "--on-bad-data", "skip", "--json", str(tmp_path / "out.json")]
    assert score.run(flags) == 0
    figures = json.loads((tmp_path / "out.json").read_text())["bbox"]
    assert [-1 if v is None else v for v in figures.values()] == list(expected)
    said = f"{len(results) - len(others)} result(s) do not count: their 1 image(s) are left out of the ground truth"
    assert said in capsys.readouterr().out
    results[0]["image_id"] = 4711
    assert score.run([*write(tmp_path, truth, results), "--on-bad-data", "skip"]) == 1
    assert "1 image id(s) are not in the ground truth: 4711" in capsys.readouterr().err


BAD_RESULTS = {
    "no list": ({}, "expected a list of results"),
    "NaN score": (
        [{"image_id": 1, "category_id": 1, "score": float("nan")}],
        r"number NaN at line 1 column \d+ is not allowed",
    ),
    "no score": (
        [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "expected a list of results, got a list of annotations alone",
    ),
    "text id": (
        [{"image_id": "a", "category_id": 1, "score": 0.5, "bbox": [1, 2, 3, 4]}],
        r"not in the ground truth: a",
    ),
    "fraction as id": ([{"image_id": 1.5, "category_id": 1, "score": 0.5}], r"\[0\]: image_id is 1\.5"),
    "short box": ([{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 2]}], r"bbox is \[1, 2\]"),
    "unknown image": (
        [{"image_id": 4711, "category_id": 1, "score": 0.5, "bbox": [1, 2, 3, 4]}],
        r"not in the ground truth: 4711",
    ),
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_bad_results_are_refused_with_their_position(tmp_path, capsys, name):
    results, message = BAD_RESULTS[name]
    truth, _ = random_case(2, "bbox")
    assert score.run(write(tmp_path, truth, results)) == 1
    assert re.search(message, capsys.readouterr().err)


def test_unknown_categories_are_counted_and_do_not_score(tmp_path, capsys, caplog):
    truth, results = random_case(2, "bbox")
    image_id = truth["images"][0]["id"]
    extra = [{"image_id": image_id, "category_id": 4711, "score": 0.99, "bbox": [1, 2, 3, 4]}]
    flags = write(tmp_path, truth, results + extra)
    assert score.run([*flags, "--json", str(tmp_path / "a.json")]) == 0
    assert "result(s) of unknown categories do not count" in capsys.readouterr().out
    figures = json.loads((tmp_path / "a.json").read_text())["bbox"]
    assert [-1 if v is None else v for v in figures.values()] == list(oracle(truth, results, "bbox").stats)


def test_empty_results_score_zero(tmp_path, capsys):
    truth, _ = random_case(2, "bbox")
    assert score.run(write(tmp_path, truth, [])) == 0
    assert "AP         0.0000" in capsys.readouterr().out


def _write_shard(rank, world_size, folder, seed):
    truth, results = random_case(seed, "segm")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    writer = PredictionWriter(folder, ["bbox", "segm"], sizes)
    for image_id in list(sizes)[rank::world_size]:
        detections = to_detections(results, image_id, "segm")
        detections.boxes_xywh = np.arange(4.0 * len(detections)).reshape(-1, 4)
        writer.add([image_id], [detections])
    writer.close()


@pytest.mark.slow
def test_the_file_is_the_same_at_any_number_of_processes(tmp_path):
    files = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        if processes == 1:
            _write_shard(0, 1, folder, 3)
        else:
            run_on_ranks(processes, _write_shard, folder, 3)
        assert sorted(p.name for p in folder.iterdir()) == ["predictions_bbox.json", "predictions_segm.json"]
        files.append((folder / "predictions_segm.json").read_bytes())
    assert files[0] == files[1] == files[2]
    truth, results = random_case(3, "segm")
    evaluator = CocoEvaluator(to_annotations(truth), ["segm"])
    read, _ = read_results(tmp_path / "1" / "predictions_segm.json")
    for image in truth["images"]:
        evaluator.add(image["id"], detections_of_results([r for r in read if r["image_id"] == image["id"]], "segm"))
    assert compare(evaluator.compute(), oracle(truth, results, "segm"), "segm") == 0


def test_run_lengths_of_blocks_equal_pycocotools():
    from pycocotools import mask as mask_util

    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(v) for v in rng.integers(1, 30, 2))
        mask = np.zeros((height, width), np.uint8)
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        h, w = int(rng.integers(0, height - y + 1)), int(rng.integers(0, width - x + 1))
        mask[y : y + h, x : x + w] = rng.random((h, w)) < rng.choice([0.3, 0.9, 1.0])
        expected = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        assert rle_of_block(block_from_mask(mask), height, width)["counts"] == expected


def simple_truth():
    """Two classes, three objects, one image without any."""
    images = [{"id": i, "file_name": f"{i}", "height": 100, "width": 100} for i in (1, 2)]
    objects = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [40, 40, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [70, 70, 20, 20], "area": 400, "iscrowd": 0},
    ]
    return {
        "images": images,
        "annotations": objects,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def test_the_report_counts_confusions_thresholds_and_false_alarms():
    boxes = {
        1: [([0, 0, 20, 20], 1, 0.9), ([40, 40, 20, 20], 1, 0.8), ([70, 70, 20, 20], 2, 0.7), ([20, 70, 9, 9], 2, 0.6)],
        2: [([5, 5, 20, 20], 2, 0.65), ([50, 5, 20, 20], 2, 0.1)],
    }
    evaluator = CocoEvaluator(to_annotations(simple_truth()), ["bbox"])
    for image_id, rows in boxes.items():
        places, labels, scores = zip(*rows)
        evaluator.add(image_id, Detections(np.array(labels), np.array(scores), np.array(places, dtype=float)))
    result = evaluator.compute()
    report = build_analysis(result)
    assert report.best_f1["bbox"]["cat"] == {"f1": 1.0, "score": 0.9, "precision": 1.0, "recall": 1.0}
    assert report.best_f1["bbox"]["dog"]["f1"] == pytest.approx(2 / 3)
    assert report.score_threshold == 0.7  # two hits of three objects, one miss
    assert report.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert (report.background_images, report.background_false_positives) == (1, 0)
    assert report.to_plain()["false_positives_per_background_image"] == 0
    assert "dog" in format_classes(result, report)
    assert np.isfinite(report.precision["bbox"]).all()


def test_detections_inside_crowds_are_no_confusion():
    iou = np.array([[0.9, 0.0], [0.6, 0.0], [0.0, 0.2]])
    partners = match_across_classes(iou, np.array([0.5, 0.9, 0.9]), np.array([True, False]))
    assert partners.tolist() == [-2, -2, -1]
    partners = match_across_classes(iou, np.array([0.5, 0.9, 0.9]), np.array([False, False]))
    assert partners.tolist() == [-1, 0, -1]  # the better score takes the object


def test_a_confusion_row_adds_up_to_its_objects():
    for seed in range(30):
        truth, results = random_case(seed, "bbox")
        annotations = to_annotations(copy.deepcopy(truth))
        evaluator = CocoEvaluator(annotations, ["bbox"])
        for image in truth["images"]:
            evaluator.add(image["id"], to_detections(results, image["id"], "bbox"))
        result = evaluator.compute()
        report = build_analysis(result)
        assert (report.confusion[:-1].sum(axis=1) == report.num_truths).all()
        assert (report.confusion >= 0).all()


def test_results_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys):
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "raccoon", "keypoints": ["a", "b"]}, {"id": 2, "name": "raccoon"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": [5, 5, 9 * n, 9], "area": 81 * n, "iscrowd": 0,
             "keypoints": [6, 6, 2, 7, 7, 2]} for n in (1, 2)
        ],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results, base = tmp_path / "results.json", {"image_id": 1, "category_id": 1, "score": 0.9}
    common = ["--ground-truth", str(tmp_path / "truth.json"), "--predictions", str(results)]
    for record, flags, expected in (
        ({"segmentation": [[1, 1, 5, 1, 5]]}, [], "[0]: segmentation is [[1, 1, 5"),
        ({"segmentation": [[1, 1, 5, 1, 5, 5]]}, [], "no segmentation, but masks are used"),
        ({"keypoints": [1, 1, 2]}, [], "3 numbers under 'keypoints', the ground truth has 3 x 2"),
        ({"bbox": [5, 5, 9, 9]}, ["--iou-types", "segm"], "no result has 'segmentation'"),
    ):
        results.write_text(json.dumps([{**base, **record}]))
        assert score.run([*common, *flags]) == 1
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score.run([*common, "--max-dets", "0"])
    assert score.run([*common[:3], str(tmp_path)]) == 1  # a folder
    # Two categories of one name keep their own figures.
    results.write_text(json.dumps([{**base, "bbox": [5, 5, 9, 9]}]))
    assert score.run([*common, "--json", str(tmp_path / "figures.json")]) == 0
    per_class = json.loads((tmp_path / "figures.json").read_text())["per_class"]["bbox"]
    assert per_class["raccoon (id 1)"]["AP"] > 0.99 and per_class["raccoon (id 2)"]["AP"] == 0.0
