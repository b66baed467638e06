"""The files of an evaluation say what the evaluation said, and the best epoch's stay."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import compare
import score
import train
from drawing import pictures as drawing
from evaluation.analysis import score_images
from evaluation.results_files import read_results, read_results_of_images
from helpers.drawn import draw_coco
from helpers.near_truth import KINDS, evaluate_once
from helpers.thin import use_thin_models
from loading.splits import Source, load_data
from report import page
from runtime import run_folder
from runtime.run_folder import read_summary
from runtime.trackers import read_metrics


@pytest.fixture
def mask_data(drawn_coco):
    return load_data(Source("coco", drawn_coco), "mask", test_only=True)


@pytest.fixture
def keypoint_data(tmp_path):
    root = draw_coco(tmp_path / "people", num_keypoints=17)
    return load_data(Source("coco_kp", root), "keypoint", test_only=True)


def table(path):
    """Return a csv as {name of the row: {column: text}}, and the header."""
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    return {row[0]: dict(zip(header[1:], row[1:])) for row in rows}, header


def number(text):
    return None if text == "" else float(text)


def check_tables(folder, result, report, intervals):
    """Compare every number in the tables of a folder with the evaluation."""
    with (folder / "figures.csv").open(newline="") as file:
        figures = {(row["kind"], row["figure"]): row for row in csv.DictReader(file)}
    for kind, of_kind in result.metrics.items():
        rows, header = table(folder / f"classes_{kind}.csv")
        for name, value in of_kind.items():
            row = figures.pop((kind, name))
            assert number(row["value"]) == value
            assert [number(row["low"]), number(row["high"])] == (intervals[kind].get(name) or [None, None])
        for k, name in enumerate(report.class_names):
            assert int(rows[name]["objects"]) == result.num_truths[kind][k, 0]
            for column in [c for c in header if c.startswith("A")]:
                assert number(rows[name][column]) == result.per_class[kind][name][column]
            best = report.best_f1[kind][name]
            for column, key in (("best_f1", "f1"), ("score_threshold", "score"), ("recall", "recall")):
                assert number(rows[name][column]) == best.get(key)
        curve, header = table(folder / f"pr_{kind}.csv")
        assert header[:2] == ["recall", "(mean)"] and len(curve) == 101
        mean = [number(row["(mean)"]) for row in curve.values()]
        if of_kind["AP50"] is not None:
            assert np.mean(mean) == pytest.approx(of_kind["AP50"], abs=1e-12)
        for name in report.class_names:
            column = [number(row[name]) for row in curve.values()]
            ap50 = result.per_class[kind][name]["AP50"]
            assert (None if None in column else pytest.approx(np.mean(column), abs=1e-12)) == ap50
    assert not figures
    confusion, header = table(folder / "confusion.csv")
    assert header[1:] == [*report.class_names, "(missed)"] and list(confusion)[-1] == "(no object)"
    assert [[int(v) for v in row.values()] for row in confusion.values()] == report.confusion.tolist()
    if result.keypoint_errors:
        errors, _ = table(folder / "keypoints.csv")
        assert {name: {k: number(v) for k, v in row.items()} for name, row in errors.items()} == result.keypoint_errors


@pytest.mark.parametrize("task", KINDS)
def test_the_tables_hold_the_evaluations_numbers(task, request, tmp_path):
    data, out = request.getfixturevalue(f"{task}_data"), tmp_path / "run"
    evaluator, evaluation = evaluate_once(data, out, task, epoch=0, noise=1.5)
    result, report = evaluation.result, evaluation.analysis
    assert 0.1 < result.metrics["bbox"]["AP"] < 1  # else equal numbers would say little
    for folder in (out / "eval", out / "best"):
        check_tables(folder, result, report, evaluation.intervals)
        summary = read_summary(folder)
        assert summary["epoch"] == 0 and summary["bbox"] == result.metrics["bbox"]
        assert summary["score_threshold"] == report.score_threshold
    (line,) = read_metrics(out)
    assert {k: v for k, v in read_summary(out / "eval").items() if k in line} == {
        k: v for k, v in line.items() if k != "train"
    }
    for name in ["confusion", *(f"pr_{kind}" for kind in evaluator.iou_types)]:
        assert min(Image.open(out / "eval" / f"{name}.png").size) > 150


def test_images_are_judged_by_the_f1_of_their_boxes(mask_data, tmp_path):
    evaluator, evaluation = evaluate_once(mask_data, tmp_path / "run", "mask", epoch=0, noise=2)
    with (tmp_path / "run" / "eval" / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(mask_data.val.annotations)
    objects, detections, hits = (sum(int(row[c]) for row in rows) for c in ("objects", "detections", "hits"))
    threshold = evaluation.analysis.score_threshold
    # The threshold is the one of the best F1 over all boxes: the images' counts must add up to that F1.
    matches = evaluation.result.saved["bbox"].matches
    best = max(
        2 * (matches.positive[chosen] & np.uint64(1)).sum()
        / (objects + (~((matches.ignored[chosen] & np.uint64(1)) > 0) | ((matches.positive[chosen] & np.uint64(1)) > 0)).sum())
        for chosen in (matches.scores >= s for s in matches.scores)
    )  # fmt: skip
    assert 2 * hits / (objects + detections) == pytest.approx(best)
    f1 = [float(row["f1"]) for row in rows if row["f1"]]
    assert f1 == sorted(f1) and threshold > 0
    ranked = score_images(evaluation.result, threshold).ranked()
    ids = mask_data.val.annotations.image_ids
    assert [int(row["image_id"]) for row in rows[: len(ranked)]] == ids[ranked].tolist()


def test_pictures_show_the_worst_and_the_best(keypoint_data, tmp_path):
    evaluate_once(keypoint_data, tmp_path / "run", "keypoint", epoch=0, noise=3)
    folder = tmp_path / "run" / "eval"
    examples = read_summary(folder)["examples"]
    with (folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    worst = [e for e in examples if e["sort"] == "worst"]
    best = [e for e in examples if e["sort"] == "best"]
    assert worst and best and worst[0]["f1"] <= best[0]["f1"]
    assert [e["image_id"] for e in worst] == [int(row["image_id"]) for row in rows[: len(worst)]]
    assert not {e["image_id"] for e in worst} & {e["image_id"] for e in best}
    for example in examples:
        picture = Image.open(folder / example["picture"])
        sizes = dict(zip(keypoint_data.val.annotations.image_ids.tolist(), [(60, 80), (80, 60), (64, 64)] * 2))
        height, width = sizes[example["image_id"]]
        assert (picture.width > picture.height) == (height > width)  # portraits beside, others above each other


@pytest.mark.parametrize("task", KINDS)
def test_the_page_of_the_examples_has_their_objects_and_detections(task, request, tmp_path):
    data = request.getfixturevalue(f"{task}_data")
    evaluate_once(data, tmp_path / "run", task, epoch=0, noise=3)
    folder, truth = tmp_path / "run" / "eval", data.val.annotations
    pictures = json.loads((folder / "pictures.json").read_text())["pictures"]
    found, _ = read_results(tmp_path / "run" / "predictions_bbox.json")
    for picture, example in zip(pictures, read_summary(folder)["examples"], strict=True):
        i = truth.image_ids.tolist().index(example["image_id"])
        span = truth.objects(i)
        kept = [r for r in found if r["image_id"] == example["image_id"] and r["score"] >= 0.05]
        detected = [o for o in picture["objects"] if o[1] is not None]
        annotated = [o for o in picture["objects"] if o[1] is None]
        for objects, boxes in ((detected, [r["bbox"] for r in kept]), (annotated, truth.boxes_xywh[span])):
            x, y, w, h = np.reshape(boxes, (-1, 4)).T
            np.testing.assert_allclose([o[2:6] for o in objects], np.stack([x, y, x + w, y + h], axis=1), atol=0.051)
        assert [o[0] for o in annotated] == truth.category_ids[span].tolist()
        assert ["crowd" in o[8] if len(o) > 8 else False for o in annotated] == truth.is_crowd[span].tolist()
        if task == "keypoint":
            np.testing.assert_allclose([o[7] for o in annotated], truth.keypoints[span].reshape(len(annotated), -1))
        else:
            assert all(o[6].startswith("M") for o in annotated)


def test_a_results_file_is_read_for_some_images_only(mask_data, tmp_path):
    evaluate_once(mask_data, tmp_path, "mask", epoch=0, noise=3)
    for kind in ("bbox", "segm"):
        path = tmp_path / f"predictions_{kind}.json"
        everything, _ = read_results(path)
        for ids in ([10], [12, 15], [11, 4711]):
            expected = {i: [r for r in everything if r["image_id"] == i] for i in ids}
            assert read_results_of_images(path, ids) == expected


@pytest.mark.slow
def test_the_best_epoch_stays_with_its_predictions(mask_data, drawn_coco, tmp_path, caplog):
    out = tmp_path / "run"
    figures = []
    for epoch, noise in enumerate((2.0, 0.7, 3.0)):
        _, evaluation = evaluate_once(mask_data, out, "mask", epoch=epoch, noise=noise, seed=epoch, is_best=epoch < 2)
        figures.append(evaluation.result.metrics)
    assert read_summary(out / "best")["epoch"] == 1 and read_summary(out / "eval")["epoch"] == 2
    truth = drawn_coco / "annotations" / "instances_val2017.json"
    for folder, epoch in ((out / "best", 1), (out, 2)):
        for kind in ("bbox", "segm"):
            flags = ["--ground-truth", truth, "--predictions", folder / f"predictions_{kind}.json"]
            assert score.run([*map(str, flags), "--iou-types", kind, "--json", str(tmp_path / "s.json")]) == 0
            assert json.loads((tmp_path / "s.json").read_text())[kind] == figures[epoch][kind]
    assert compare.run([str(out), str(out)]) == 0
    assert not list(out.glob("*.tmp"))

    # Back to an earlier epoch: what came after it is no longer part of the run.
    evaluate_once(mask_data, out, "mask", epoch=1, noise=2.5)
    assert read_summary(out / "best")["epoch"] == 1
    assert read_summary(out / "best")["bbox"] == read_summary(out / "eval")["bbox"]
    assert [line["epoch"] for line in read_metrics(out)] == [0, 1]


def test_the_best_is_what_the_caller_says(mask_data, tmp_path):
    evaluate_once(mask_data, tmp_path, "mask", epoch=0, noise=0.7)
    evaluate_once(mask_data, tmp_path, "mask", epoch=1, noise=3, is_best=True)
    evaluate_once(mask_data, tmp_path, "mask", epoch=2, noise=0.1, is_best=False)
    assert read_summary(tmp_path / "best")["epoch"] == 1


def test_without_predictions_there_are_no_pictures_and_all_else(mask_data, tmp_path):
    evaluate_once(mask_data, tmp_path, "mask", epoch=0, noise=1, with_predictions=False)
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert {"figures.csv", "confusion.png", "matches_segm.npz"} <= names
    assert not [name for name in names if name.endswith(".jpg") or name.startswith(("predictions", "pictures"))]


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_costs_its_files_and_one_line(library, mask_data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_folder, "find_spec", lambda name: None if name == library else object())
    monkeypatch.setitem(sys.modules, library, None)  # an import of it fails
    run_folder.is_installed.cache_clear()
    drawing._font.cache_clear()
    for epoch in (0, 1):
        evaluate_once(mask_data, tmp_path, "mask", epoch=epoch, noise=1)
    run_folder.is_installed.cache_clear()
    drawing._font.cache_clear()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [w for w in warnings if library in w] == [
        f"{library} is not installed, what needs it is left out: pip install {library}"
    ]
    assert not any("no complete report" in w for w in warnings)
    assert bool(list((tmp_path / "eval").glob("*.png"))) == (library != "matplotlib")
    assert (tmp_path / "report.html").exists() == (library != "jinja2")
    assert (tmp_path / "best" / "figures.csv").exists() and list((tmp_path / "eval").glob("*.jpg"))


@pytest.mark.parametrize("noticed", ["while writing", "at the end"])
def test_an_evaluation_without_predictions_shows_none_of_the_one_before(mask_data, tmp_path, caplog, noticed):
    evaluate_once(mask_data, tmp_path, "mask", epoch=0, noise=1)
    blocked = tmp_path / ("predictions_segm.0.tmp" if noticed == "while writing" else "predictions_segm.json")
    blocked.unlink(missing_ok=True)
    blocked.mkdir()  # a folder in the place of the file stands for a disk that cannot be written
    evaluate_once(mask_data, tmp_path, "mask", epoch=1, noise=1)
    assert caplog.text.count("no predictions are written: ") == 1 and "no complete report" not in caplog.text
    assert not [path for path in tmp_path.glob("**/predictions*") if path != blocked]
    for folder in ("eval", "best"):
        assert read_summary(tmp_path / folder)["epoch"] == 1 and not list((tmp_path / folder).glob("*.jpg"))


def test_a_report_that_fails_is_a_warning(mask_data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(page, "write_page", lambda run_dir: 1 / 0)
    evaluate_once(mask_data, tmp_path, "mask", epoch=0, noise=1)
    assert f"no complete report in {tmp_path}: ZeroDivisionError: division by zero" in caplog.text


def test_pictures_are_drawn_where_all_ids_are_text(tmp_path, caplog):
    path = draw_coco(tmp_path / "coco") / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for record, key in (
        *((r, "id") for r in (*content["images"], *content["categories"])),
        *((r, key) for r in content["annotations"] for key in ("image_id", "category_id")),
    ):
        record[key] = f"no. {record[key]}"
    path.write_text(json.dumps(content))
    data = load_data(Source("coco", tmp_path / "coco"), "mask", test_only=True)
    evaluator, _ = evaluate_once(data, tmp_path / "run", "mask", epoch=0, noise=1)
    assert "no complete report" not in caplog.text
    pictures = json.loads((tmp_path / "run" / "eval" / "pictures.json").read_text())["pictures"]
    shown = {o[0] for picture in pictures for o in picture["objects"] if o[1] is not None}
    assert shown == {id_ for id_, _ in evaluator.annotations.categories}


def test_strange_names_and_empty_images_are_drawn(tmp_path, caplog):
    root = draw_coco(tmp_path / "coco")
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": k + 1, "name": n} for k, n in enumerate(["$a_{b", "<b>&", "管" * 40])]
    content["categories"] += [{"id": k, "name": f"c{k}"} for k in range(4, 30)]
    content["annotations"] = [r for r in content["annotations"] if r["image_id"] not in (11, 12)]
    path.write_text(json.dumps(content))
    data = load_data(Source("coco", root), "mask", test_only=True)
    evaluate_once(data, tmp_path / "run", "mask", epoch=0, noise=1)
    content["annotations"] = []
    path.write_text(json.dumps(content))
    data = load_data(Source("coco", root), "mask", test_only=True)
    evaluate_once(data, tmp_path / "run", "mask", epoch=1, noise=1, is_best=False)
    assert "no complete report" not in caplog.text
    assert "&lt;b&gt;&amp;" in (tmp_path / "run" / "report.html").read_text()


QUICK = ["--device", "cpu", "--epochs", "2", "--lr", "0.001", "--workers", "0", "--print-freq", "50"]


def check_run(out, kinds):
    """Open every file of a run's folder and compare its numbers with those of metrics.jsonl."""
    lines = read_metrics(out)
    assert [line["epoch"] for line in lines] == [0, 1] and all(line["train"]["lr"] > 0 for line in lines)
    best = read_summary(out / "best")["epoch"]
    for folder, line in ((out / "eval", lines[1]), (out / "best", lines[best])):
        for kind in kinds:
            rows, _ = table(folder / f"classes_{kind}.csv")
            for name, figures in line["per_class"][kind].items():
                assert {c: number(rows[name][c]) for c in figures if c in rows[name]} == {
                    c: v for c, v in figures.items() if c in rows[name]
                }
            assert np.load(folder / f"matches_{kind}.npz")["match_scores"].size >= 0
            assert Image.open(folder / f"pr_{kind}.png").format == "PNG"
        with (folder / "figures.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                assert number(row["value"]) == line[row["kind"]][row["figure"]]
        if "keypoints" in kinds:
            errors, _ = table(folder / "keypoints.csv")
            assert {k: {c: number(v) for c, v in row.items()} for k, row in errors.items()} == line["keypoint_errors"]
        confusion, _ = table(folder / "confusion.csv")
        assert len(confusion) == len(line["per_class"]["bbox"]) + 1
        assert Image.open(folder / "confusion.png").format == "PNG"
        for example in read_summary(folder)["examples"]:
            assert Image.open(folder / example["picture"]).format == "JPEG"
    page = (out / "report.html").read_text()
    figure = lines[best][kinds[-1]]["AP"]
    assert f'<div class="large">{figure:.4f}</div>' in page
    return lines, best


@pytest.mark.slow
def test_two_epochs_on_tiny_coco_leave_every_file(tiny_coco, tmp_path, capsys):
    out, root = tmp_path / "out", tmp_path / "coco"
    shutil.copytree(tiny_coco, root)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    kept = {image["id"] for image in content["images"][:16]}
    content["images"] = content["images"][:16]
    content["annotations"] = [r for r in content["annotations"] if r["image_id"] in kept]
    path.write_text(json.dumps(content))
    flags = ["--data-path", root, "--model", "ssdlite320_mobilenet_v3_large", "--output-dir", out, "--batch-size", 8]
    assert train.run_as_command([*QUICK, "--data-augmentation", "ssdlite", *map(str, flags)]) == 0
    lines, best = check_run(out, ["bbox"])
    log = capsys.readouterr().out
    assert f"AP         {lines[1]['bbox']['AP']:.4f}" in log and f"report: {out / 'report.html'}" in log
    truth = root / "annotations" / "instances_val2017.json"
    predictions = out / "best" / "predictions_bbox.json"
    files = ["--ground-truth", truth, "--predictions", predictions, "--json", tmp_path / "s.json"]
    assert score.run([str(file) for file in files]) == 0
    scored = json.loads((tmp_path / "s.json").read_text())
    assert scored["bbox"] == lines[best]["bbox"] and scored["intervals"] == lines[best]["intervals"]


@pytest.mark.slow
def test_two_epochs_on_glue_tubes_leave_every_file(glue_tubes, monkeypatch):
    use_thin_models(monkeypatch)
    for role, kept in (("train", 2), ("test", 3)):
        for kind in ("images", "annotations"):
            for path in sorted((glue_tubes / role / kind).iterdir())[kept:]:
                path.unlink()
    out = glue_tubes / "result"
    flags = ["--dataset", "custom", "--data-path", glue_tubes, "--model", "keypointrcnn_resnet50_fpn"]
    flags += ["--min-size", 96, "--max-size", 160, "--batch-size", 2, "--max-dets", 10]
    assert train.run_as_command([*QUICK, *map(str, flags)]) == 0
    lines, _ = check_run(out, ["bbox", "keypoints"])
    assert lines[1]["keypoint_errors"]["all"]["labelled"] > 0
