"""Resampled figures: pycocotools' own on repeated images, and intervals that hold as often as they say."""

import numpy as np
import pytest

from evaluation.bootstrap import (
    MAX_WORK,
    RESAMPLED,
    Difference,
    draw_weights,
    format_intervals,
    interval,
    metric_intervals,
    num_resamples,
    resample,
)
from evaluation.eval_result import SavedMatches
from helpers.coco_cases import oracle, random_case
from helpers.outcomes import drawn_outcomes, evaluate

KINDS = ("bbox", "segm", "keypoints")


def repeat_images(truth, results, counts):
    """Return the case with image number i standing there ``counts[i]`` times, as images of their own."""
    repeated = {"info": {}, "images": [], "annotations": [], "categories": truth["categories"]}
    detections = []
    for image, count in zip(sorted(truth["images"], key=lambda image: image["id"]), counts):
        for copy_number in range(count):
            new_id = 100 * image["id"] + copy_number
            repeated["images"].append({**image, "id": new_id})
            for record in truth["annotations"]:
                if record["image_id"] == image["id"]:
                    new = {**record, "image_id": new_id, "id": len(repeated["annotations"]) + 1}
                    repeated["annotations"].append(new)
            detections += [{**r, "image_id": new_id} for r in results if r["image_id"] == image["id"]]
    return repeated, detections


@pytest.mark.parametrize("iou_type", KINDS)
def test_weights_are_images_that_stand_there_more_than_once(iou_type):
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(40):
        truth, results = random_case(seed, iou_type)
        for n, result in enumerate(rng.permutation(results)):  # equal scores in one image would change their order
            result["score"] = round(result["score"], 1) + n * 1e-6
        evaluator, result = evaluate(truth, results, iou_type)
        outcomes = result.saved[iou_type]
        weights = np.stack([np.ones(len(truth["images"]), int), *rng.integers(0, 4, (3, len(truth["images"])))])
        resampled = resample(outcomes, weights)
        for b, counts in enumerate(weights.tolist()):
            if not sum(counts):
                continue
            expected = oracle(*repeat_images(truth, results, counts), iou_type).stats
            positions = (0, 1, 2, 5 if iou_type == "keypoints" else 8)
            for name, position in zip(RESAMPLED, positions):
                value = resampled.figure(name)[b]
                assert (-1 if np.isnan(value) else value) == pytest.approx(expected[position], abs=1e-12)
                compared += expected[position] not in (-1, 0)
    assert compared > 150


def test_figures_of_single_classes_are_those_of_the_evaluation():
    truth, results = random_case(3, "bbox")
    evaluator, result = evaluate(truth, results, "bbox")
    outcomes = result.saved["bbox"]
    resampled = resample(outcomes, np.ones((1, len(outcomes.image_ids)), int))
    for k, name in enumerate(outcomes.class_names):
        for figure in RESAMPLED:
            expected = result.per_class["bbox"][name][figure]
            assert resampled.figure(figure, k)[0] == pytest.approx(
                np.nan if expected is None else expected, nan_ok=True
            )


@pytest.mark.parametrize("chunk", [1, 40])
def test_resamples_that_are_worked_on_in_parts_are_the_same(monkeypatch, chunk):
    """Of classes with fewer detections than a part and with more."""
    _, result = evaluate(*random_case(3, "bbox"), "bbox")
    outcomes = result.saved["bbox"]
    weights = draw_weights(len(outcomes.image_ids), 30)
    whole = resample(outcomes, weights)
    monkeypatch.setattr("evaluation.bootstrap._CHUNK", chunk)
    parts = resample(outcomes, weights)
    assert np.array_equal(parts.precision, whole.precision, equal_nan=True)
    assert np.array_equal(parts.recall, whole.recall, equal_nan=True)


def test_only_evaluated_images_are_resampled():
    truth, results = random_case(12, "bbox")
    evaluator, result = evaluate(truth, results, "bbox", indices=np.array([0, 2]))
    outcomes = result.saved["bbox"]
    ids = sorted(truth["images"][i]["id"] for i in (0, 2))
    assert outcomes.image_ids.tolist() == ids
    value = resample(outcomes, np.ones((1, 2), int)).figure("AP")[0]
    assert value == pytest.approx(result.metrics["bbox"]["AP"])


def test_a_file_gives_back_what_was_saved(tmp_path):
    truth, results = random_case(3, "segm")
    evaluator, result = evaluate(truth, results, "segm")
    outcomes = result.saved["segm"]
    outcomes.save(tmp_path / "matches.npz")
    read = SavedMatches.load(tmp_path / "matches.npz")
    for name in ("truth_images", "truth_categories", "image_ids", "thresholds", "recall_grid"):
        assert (getattr(read, name) == getattr(outcomes, name)).all()
    for a, b in zip(read.matches.columns(), outcomes.matches.columns()):
        assert a.dtype == b.dtype and (a == b).all()
    for name in ("class_names", "fingerprint", "settings"):
        assert getattr(read, name) == getattr(outcomes, name)
    (tmp_path / "other.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="other.npz: not the matches of an evaluation"):
        SavedMatches.load(tmp_path / "other.npz")


def test_intervals_hold_as_often_as_they_say():
    rng = np.random.default_rng(1)
    figures, resampled = [], []
    for seed in range(120):
        outcomes = drawn_outcomes(rng)
        figures.append(resample(outcomes, np.ones((1, 60), int)).figure("AP")[0])
        resampled.append(resample(outcomes, draw_weights(60, 200, seed)).figure("AP"))
    expected = np.mean(figures)
    bounds = [interval(f, r) for f, r in zip(figures, resampled)]
    held = np.mean([low <= expected <= high for low, high in bounds])
    assert 0.9 <= held <= 0.99
    plain = [np.quantile(r, [0.025, 0.975]) for r in resampled]
    assert np.mean([low <= expected <= high for low, high in plain]) < held  # the reason for the centring


def test_weights_depend_on_the_seed_only_and_draw_with_repetition():
    weights = draw_weights(50, 400)
    assert (weights == draw_weights(50, 400)).all() and (weights != draw_weights(50, 400, seed=1)).any()
    drawn = np.random.default_rng(0).integers(0, 50, (400, 50))
    assert (weights == [np.bincount(row, minlength=50) for row in drawn]).all()
    assert np.mean(weights == 0) == pytest.approx(np.exp(-1), abs=0.02)


def test_the_number_of_resamples_is_bounded():
    assert num_resamples(0, 10) == num_resamples(1000, 10) == 1000
    assert num_resamples(MAX_WORK // 200, 10) == num_resamples(10, MAX_WORK // 200) == 200
    assert num_resamples(MAX_WORK // 100, 10) == 100  # a tenth is the least
    assert num_resamples(MAX_WORK // 99, 10) == num_resamples(10, MAX_WORK // 99) == 0


@pytest.mark.parametrize(
    ("low", "high", "is_clear"),
    [(0.01, 0.2, True), (-0.2, -0.01, True), (-0.1, 0.1, False), (0.0, 0.1, False), (None, None, False)],
)
def test_a_difference_is_clear_where_its_interval_leaves_out_zero(low, high, is_clear):
    assert Difference(0.5, 0.6, low, high, 0.9).is_clear == is_clear


def test_intervals_do_not_leave_the_range_of_a_figure():
    truth, results = random_case(3, "bbox")
    _, result = evaluate(truth, results, "bbox")
    figures = dict.fromkeys(RESAMPLED, 0.999)
    result.metrics["bbox"] |= figures
    assert metric_intervals(result)["bbox"]["AP"][1] == 1.0
    result.metrics["bbox"] |= dict.fromkeys(RESAMPLED, 0.001)
    assert metric_intervals(result)["bbox"]["AP"][0] == 0.0


def test_intervals_of_ap_are_told_where_there_are_objects():
    intervals = {"bbox": {"AP": [0.25, 0.5]}, "segm": {"AP": None}}
    assert format_intervals(intervals) == "AP, bbox: 95% interval over images 0.2500 to 0.5000"


def test_intervals_stand_beside_the_figures(monkeypatch):
    truth, results = random_case(3, "bbox")
    evaluator, result = evaluate(truth, results, "bbox")
    of_boxes = metric_intervals(result)["bbox"]
    assert of_boxes["resamples"] == 1000
    for name in RESAMPLED:
        low, high = of_boxes[name]
        assert 0 <= low <= result.metrics["bbox"][name] <= high <= 1 and low < high
    monkeypatch.setattr("evaluation.bootstrap.MAX_WORK", 1)
    assert metric_intervals(result) == {}
    truth["annotations"] = []
    monkeypatch.undo()
    evaluator, result = evaluate(truth, results, "bbox")
    assert metric_intervals(result)["bbox"]["AP"] is None
