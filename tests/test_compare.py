"""Two runs on the same images: nothing between a run and itself, right intervals, and refusals in one line."""

import copy
import dataclasses
import json

import numpy as np
import pytest

import compare
from evaluation.bootstrap import Difference, compare_figure, draw_weights, resample
from evaluation.coco_matching import Matches
from helpers.coco_cases import random_case
from helpers.outcomes import drawn_outcomes, evaluate


def save_run(folder, outcomes, kind="bbox", which="best", epoch=3):
    (folder / which).mkdir(parents=True, exist_ok=True)
    outcomes.save(folder / which / f"matches_{kind}.npz")
    (folder / which / "summary.json").write_text(json.dumps({"epoch": epoch}))
    return str(folder)


def run_json(tmp_path, *flags):
    assert compare.run([*flags, "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def of_case(seed, kind="bbox"):
    evaluator, result = evaluate(*random_case(seed, kind), kind)
    return result.saved[kind], result


def dropped(outcomes, rng, share):
    """Return the outcomes of the same detector with a share of its detections missing."""
    return dataclasses.replace(outcomes, matches=outcomes.matches.take(rng.random(len(outcomes.matches)) > share))


def test_a_run_equals_itself(tmp_path, capsys):
    outcomes, result = of_case(3)
    run = save_run(tmp_path / "a", outcomes)
    content = run_json(tmp_path, run, run)
    for name, row in content["bbox"].items():
        if name != "per_class":
            assert row["first"] == row["second"] == pytest.approx(result.metrics["bbox"][name])
            assert row["low"] == row["high"] == 0 and row["probability"] == 0.5
    assert set(content["bbox"]["per_class"]) == set(result.per_class["bbox"])
    out = capsys.readouterr().out
    assert "best, epoch 3" in out and "  *" not in out


def test_a_worse_run_is_called_worse_and_the_order_turns_the_sign(tmp_path):
    rng = np.random.default_rng(0)
    outcomes = drawn_outcomes(rng)
    first = save_run(tmp_path / "a", outcomes)
    second = save_run(tmp_path / "b", dropped(outcomes, rng, 0.4))
    there, back = run_json(tmp_path, first, second)["bbox"], run_json(tmp_path, second, first)["bbox"]
    row = there["AP"]
    assert row["low"] < row["second"] - row["first"] < row["high"] < 0 and row["probability"] < 0.01
    assert back["AP"]["low"] == pytest.approx(-row["high"]) and back["AP"]["probability"] > 0.99
    assert set(there["per_class"]) == set("abcdef")


@pytest.mark.slow
def test_the_interval_of_a_difference_holds_as_often_as_it_says():
    """Two detectors of equal quality on the same images: zero lies inside in 95 of 100 cases."""
    rng = np.random.default_rng(5)
    held, widths, unpaired = [], [], []
    for seed in range(100):
        outcomes = drawn_outcomes(rng)
        detectors = []
        for _ in range(2):
            scores = outcomes.matches.scores + rng.normal(0, 0.5, len(outcomes.matches))
            images, categories, ranks, partners, _, positive, ignored = outcomes.matches.columns()
            matches = Matches(images, categories, ranks, partners, scores, positive, ignored).sorted()
            detectors.append(dropped(dataclasses.replace(outcomes, matches=matches), rng, 0.1))
        weights = np.concatenate([np.ones((1, 60), np.int32), draw_weights(60, 200, seed)])
        a, b = (resample(outcomes, weights).figure("AP") for outcomes in detectors)
        difference = compare_figure(a, b)
        held.append(not difference.is_clear)
        widths.append(difference.high - difference.low)
        other = resample(detectors[1], draw_weights(60, 201, 1000 + seed)).figure("AP")
        unpaired.append(np.ptp(np.quantile(other - a, [0.025, 0.975])))
    assert 0.88 <= np.mean(held) <= 0.99
    assert np.mean(widths) < 0.8 * np.mean(unpaired)  # why the same images are drawn for both


def test_one_class_and_none_are_compared():
    nothing = compare_figure(np.full(5, np.nan), np.full(5, np.nan))
    assert nothing == Difference() and not nothing.is_clear
    text = compare.format_differences("figure", {"AP": nothing})
    assert "n/a" in text


def other_images(outcomes):
    return dataclasses.replace(outcomes, image_ids=outcomes.image_ids + 1)


def with_settings(**changes):
    return lambda outcomes: dataclasses.replace(outcomes, settings={**outcomes.settings, **changes})


REFUSED = {
    "other images": (other_images, r"evaluated on different images \(\d+ and \d+ images, \d+ in common\)"),
    "other classes": (lambda o: dataclasses.replace(o, class_names=("x",)), r"different classes \(.*x"),
    "other annotations": (lambda o: dataclasses.replace(o, fingerprint="1"), "the annotations differ between the runs"),
    "other limit": (with_settings(max_dets_keypoints=[7]), r"max_dets_keypoints differs between the runs: \[20\] and"),
    "other sigmas": (with_settings(kpt_oks_sigmas=[0.5]), "kpt_oks_sigmas differs between the runs"),
    "other areas": (with_settings(oks_area="box"), "oks_area differs between the runs: annotation and box"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(name, tmp_path, capsys):
    import re

    change, message = REFUSED[name]
    outcomes, _ = of_case(4, "keypoints")
    first = save_run(tmp_path / "a", outcomes, "keypoints")
    second = save_run(tmp_path / "b", change(outcomes), "keypoints")
    assert compare.run([first, second]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err)


def test_what_is_missing_is_named(tmp_path, capsys):
    outcomes, _ = of_case(4)
    run = save_run(tmp_path / "a", outcomes)
    masks = save_run(tmp_path / "b", outcomes, "segm")
    (tmp_path / "empty").mkdir()
    (tmp_path / "found.json").write_text("[]")
    for other, message in (
        (tmp_path / "nowhere", "nowhere: no such folder; give the folder of a run"),
        (tmp_path / "found.json", "found.json: a file, expected a folder; give the folder of a run; score.py compares"),
        (
            f"{run}/best/matches_bbox.npz",
            f"npz: a file, expected a folder; give the folder of a run; is its run, {run}, m",
        ),
        (tmp_path / "found.json" / "x", f"x: no such folder, as {tmp_path / 'found.json'} is a file; give"),
        (tmp_path / "empty", "no matches_*.npz; is"),
        (masks, "no kind of score in common: bbox and segm"),
    ):
        assert compare.run([run, str(other)]) == 1
        assert message in capsys.readouterr().err
    assert compare.run([run, run, "--evaluation", "newest"]) == 1
    with pytest.raises(SystemExit):
        compare.run([run, run, "--resamples", "1"])


def test_an_annotation_moved_by_a_pixel_is_noticed(tmp_path, capsys):
    truth, results = random_case(3, "bbox")
    moved = copy.deepcopy(truth)
    moved["annotations"][0]["bbox"][0] += 1
    runs = []
    for name, case in (("a", truth), ("b", moved)):
        evaluator, result = evaluate(case, results, "bbox")
        runs.append(save_run(tmp_path / name, result.saved["bbox"]))
    assert compare.run(runs) == 1
    assert "the annotations differ" in capsys.readouterr().err
