"""Scores equal pycocotools' to the last bit: any input, any number of processes."""

import copy
import importlib.util
import inspect
import sys

import numpy as np
import pytest
import torch

import coco_eval
from annotations.labels import LabelMap
from annotations.skeleton import COCO_PERSON_SIGMAS
from coco_eval import CocoEvaluator, format_summary
from evaluation import coco_matching
from evaluation.coco_metrics import build_params, check_sigmas
from evaluation.detections import Detections
from helpers.coco_cases import compare, oracle, random_case, second_oracle, to_annotations, to_detections
from helpers.ranks import run_on_ranks
from pixels.masks import block_from_mask

IOU_TYPES = ("bbox", "segm", "keypoints")


def sigmas_for(iou_type, seed, num_keypoints):
    return np.random.default_rng(seed).uniform(0.02, 0.2, num_keypoints) if iou_type == "keypoints" else None


def case(iou_type, seed):
    num_keypoints = (1, 2, 5, 17, 21)[seed % 5]
    truth, results = random_case(seed, iou_type, num_keypoints)
    return truth, results, sigmas_for(iou_type, seed, num_keypoints)


def score(truth, results, iou_type, sigmas, order=None, **options):
    evaluator = CocoEvaluator(to_annotations(truth), [iou_type], sigmas=sigmas, **options)
    ids = [image["id"] for image in truth["images"]]
    for image_id in ids if order is None else np.random.default_rng(order).permutation(ids).tolist():
        evaluator.add(image_id, to_detections(results, image_id, iou_type))
    return evaluator.compute()


def stats_of(result, iou_type):
    return [-1 if value is None else value for value in result.metrics[iou_type].values()]


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_every_cell_equals_pycocotools_on_random_cases(iou_type):
    different = 0
    for seed in range(200):
        truth, results, sigmas = case(iou_type, seed)
        evaluation = oracle(truth, results, iou_type, sigmas)
        result = score(truth, results, iou_type, sigmas, order=seed)
        different += compare(result, evaluation, iou_type)
        assert stats_of(result, iou_type) == list(evaluation.stats)
    assert different == 0


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_every_cell_equals_hotcoco_on_random_cases(iou_type, capfd):
    """A second oracle, by another author in another language: what pycocotools and we both got wrong would show."""
    for seed in range(500, 530):
        truth, results, sigmas = case(iou_type, seed)
        evaluation = second_oracle(truth, results, iou_type, sigmas)
        result = score(truth, results, iou_type, sigmas, order=seed)
        assert compare(result, evaluation, iou_type) == 0
        assert stats_of(result, iou_type) == list(evaluation.stats)


MUTANTS = {
    "of equal IoUs the first object": ("np.lexsort((-columns,", "np.lexsort((columns,", "bbox"),
    "a crowd is used up": ("(everything if crowd[g] else ~taken[g])", "~taken[g]", "bbox"),
    "ties by rank instead of image": ("(self.ranks, self.images, ", "(self.images, self.ranks, ", "bbox"),
    "area ranges without their borders": ("(areas < low) | (areas > high)", "(areas <= low) | (areas >= high)", "bbox"),
    "unmatched outside the range counts": (
        "ignored = outside.copy()",
        "outside[:] = 0; ignored = outside.copy()",
        "bbox",
    ),
    "ignored objects first": ("& ~skipped[g] &", "& skipped[g] &", "bbox"),
    "recall reached from the right": ('side="left"', 'side="right"', "bbox"),
    "no envelope": ("np.maximum.accumulate(envelope[:, ::-1], axis=1)[:, ::-1]", "envelope", "bbox"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_in_the_matcher_are_noticed(name, monkeypatch):
    before, after, iou_type = MUTANTS[name]
    source = inspect.getsource(coco_matching)
    assert source.count(before) >= 1
    spec = importlib.util.spec_from_loader("mutant", loader=None)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(before, after), "mutant", "exec"), mutant.__dict__)
    for function in ("match_image", "rank_detections", "accumulate", "Matches", "Grid"):
        monkeypatch.setattr(coco_eval, function, getattr(mutant, function))
    assert noticed(iou_type)


def test_objects_without_labelled_points_must_be_ignored(monkeypatch):
    monkeypatch.setattr(CocoEvaluator, "_ignored", lambda self, iou_type: self.annotations.is_crowd)
    assert noticed("keypoints")


def noticed(iou_type):
    for seed in range(200):
        truth, results, sigmas = case(iou_type, seed)
        if compare(score(truth, results, iou_type, sigmas), oracle(truth, results, iou_type, sigmas), iou_type):
            return True
    return False


def _on_ranks(rank, world_size, seeds):
    """Score cases with padded duplicates, as a padding sampler would hand them out; returns what rank 0 compares."""
    different = 0
    metrics = []
    for seed in seeds:
        for iou_type in IOU_TYPES:
            truth, results, sigmas = case(iou_type, seed)
            evaluator = CocoEvaluator(to_annotations(truth), [iou_type], sigmas=sigmas)
            ids = [image["id"] for image in truth["images"]]
            padded = ids + ids[: -len(ids) % world_size]
            for image_id in padded[rank::world_size]:
                evaluator.add(image_id, to_detections(results, image_id, iou_type))
            result = evaluator.compute()
            metrics.append(result.metrics)
            if rank == 0:
                different += compare(result, oracle(truth, results, iou_type, sigmas), iou_type)
    return different, metrics


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_give_the_same_cells_and_all_get_the_metrics(world_size):
    results = run_on_ranks(world_size, _on_ranks, list(range(40)))
    assert results[0][0] == 0
    assert all(metrics == results[0][1] for _, metrics in results)


def test_the_order_of_images_does_not_show():
    truth, results, _ = case("bbox", 3)
    a, b = (score(truth, results, "bbox", None, order=order) for order in (1, 2))
    assert (a.curves["bbox"].precision == b.curves["bbox"].precision).all()


def test_an_image_seen_twice_counts_once():
    truth, results, _ = case("bbox", 5)
    doubled = copy.deepcopy(truth)
    evaluator = CocoEvaluator(to_annotations(doubled), ["bbox"])
    for image in truth["images"] * 2:
        evaluator.add(image["id"], to_detections(results, image["id"], "bbox"))
    assert compare(evaluator.compute(), oracle(truth, results, "bbox"), "bbox") == 0


def test_a_subset_is_scored_as_a_subset():
    truth, results, _ = case("bbox", 8)
    annotations = to_annotations(truth)
    keep = np.array([0, 2])
    ids = annotations.image_ids[keep].tolist()
    part = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] in ids],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in ids],
    }
    evaluator = CocoEvaluator(annotations, ["bbox"], indices=keep)
    for image_id in ids:
        evaluator.add(image_id, to_detections(results, image_id, "bbox"))
    in_part = [r for r in results if r["image_id"] in ids]
    assert compare(evaluator.compute(), oracle(part, in_part, "bbox"), "bbox") == 0


def test_torchvision_outputs_are_converted_as_in_its_scripts():
    """Boxes to xywh in float32, masks at 0.5, labels mapped to category ids; against pycocotools on the same."""
    rng = np.random.default_rng(0)
    label_map = LabelMap((3, 8, -1), ("a", "b", "N/A"))
    truth = {
        "images": [{"id": 7, "file_name": "x", "height": 40, "width": 50}],
        "categories": [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}],
    }
    boxes = rng.uniform(0, 20, (12, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((12, 1, 40, 50), np.float32)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
        mask[0, y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1))
    labels = rng.integers(1, 4, 12)
    output = {
        "boxes": torch.from_numpy(boxes),
        "scores": torch.from_numpy(rng.random(12).astype(np.float32)),
        "labels": torch.from_numpy(labels),
        "masks": torch.from_numpy(masks),
    }
    from pycocotools import mask as mask_util

    encoded = [mask_util.encode(np.asfortranarray(m[0] > 0.5, dtype=np.uint8)) for m in masks]
    truth["annotations"] = [
        {"id": n + 1, "image_id": 7, "category_id": (3, 8)[n % 2], "bbox": (boxes[n] - [0, 0, *boxes[n, :2]]).tolist(),
         "area": 100.0, "iscrowd": 0, "segmentation": {"size": [40, 50], "counts": encoded[n]["counts"].decode()}}
        for n in range(6)
    ]  # fmt: skip
    xywh = torch.from_numpy(boxes).clone()
    xywh[:, 2:] -= xywh[:, :2]
    evaluator = CocoEvaluator(to_annotations(truth), ["bbox", "segm"])
    evaluator.update([7], [output], label_map)
    result = evaluator.compute()
    for iou_type in ("bbox", "segm"):
        results = []
        for n, label in enumerate(labels.tolist()):
            record = {"image_id": 7, "category_id": (3, 8, 99)[label - 1], "score": output["scores"][n].item()}
            if iou_type == "bbox":
                record["bbox"] = xywh[n].tolist()
            else:
                record["segmentation"] = {"size": [40, 50], "counts": encoded[n]["counts"].decode()}
            results.append(record)
        evaluation = oracle(truth, results, iou_type)
        assert compare(result, evaluation, iou_type) == 0
        assert evaluation.stats[0] > 0


def test_max_dets_changes_limit_and_summary():
    truth, results, _ = case("bbox", 11)
    result = score(truth, results, "bbox", None, max_dets=5)
    evaluation = oracle(truth, results, "bbox", max_dets=[1, 5, 5])
    assert (result.curves["bbox"].precision[..., -1] == evaluation.eval["precision"][..., -1]).all()
    assert result.metrics["bbox"]["AP"] is not None
    assert build_params("bbox", max_dets=300).maxDets == [1, 10, 300]
    assert build_params("keypoints", max_dets=30).maxDets == [30]


@pytest.mark.parametrize(("oks_area", "factor"), [("box", 1.0), ("box53", 0.53)])
def test_the_oks_area_rule_replaces_the_files_area(oks_area, factor):
    truth, results, sigmas = case("keypoints", 3)
    changed = copy.deepcopy(truth)
    for record in changed["annotations"]:
        record["area"] = record["bbox"][2] * record["bbox"][3] * factor
    result = score(truth, results, "keypoints", sigmas, oks_area=oks_area)
    assert compare(result, oracle(changed, results, "keypoints", sigmas), "keypoints") == 0
    assert result.settings["oks_area"] == oks_area
    with pytest.raises(ValueError, match="unknown OKS area 'mask'"):
        score(truth, results, "keypoints", sigmas, oks_area="mask")


def test_no_detections_give_zero_and_no_objects_give_none():
    truth, _, _ = case("bbox", 2)
    assert score(truth, [], "bbox", None).metrics["bbox"]["AP"] == 0.0
    empty = {**truth, "annotations": []}
    result = score(empty, [], "bbox", None)
    assert result.metrics["bbox"]["AP"] is None
    assert "n/a" in format_summary(result)


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_the_log_holds_the_lines_that_pycocotools_prints(iou_type, capsys):
    truth, results, sigmas = case(iou_type, 2)
    evaluation = oracle(truth, results, iou_type, sigmas)
    capsys.readouterr()
    evaluation.summarize()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == (10 if iou_type == "keypoints" else 12)
    assert f"IoU metric: {iou_type}\n{printed.rstrip()}" in format_summary(score(truth, results, iou_type, sigmas))


def test_figures_without_objects_are_printed_as_pycocotools_does(capsys):
    truth, _, _ = case("bbox", 2)
    empty = {**truth, "annotations": []}
    evaluation = oracle(empty, [], "bbox")
    capsys.readouterr()
    evaluation.summarize()
    assert capsys.readouterr().out.rstrip() in format_summary(score(empty, [], "bbox", None))


@pytest.mark.parametrize("field", ["scores", "boxes_xywh"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(field, value):
    truth, _, _ = case("bbox", 2)
    detections = Detections(np.array([truth["categories"][0]["id"]]), np.array([0.5]), np.array([[1.0, 1, 5, 5]]))
    getattr(detections, field)[0] = value
    evaluator = CocoEvaluator(to_annotations(truth), ["bbox"])
    with pytest.raises(ValueError, match=f"image id {truth['images'][0]['id']}.*not finite"):
        evaluator.add(truth["images"][0]["id"], detections)


def test_unknown_images_and_masks_of_another_size_are_refused():
    truth, _, _ = case("segm", 2)
    evaluator = CocoEvaluator(to_annotations(truth), ["segm"])
    rle = {"size": [9, 9], "counts": b"0"}
    detections = Detections(np.array([truth["categories"][0]["id"]]), np.array([0.5]), masks=[rle])
    with pytest.raises(ValueError, match="image id 12345 is not among"):
        evaluator.add(12345, detections)
    with pytest.raises(ValueError, match=r"mask of size \[9, 9\] for an image of \[60, 80\]"):
        evaluator.add(truth["images"][0]["id"], detections)


def test_sigmas_are_counted_and_checked():
    with pytest.raises(ValueError, match=r"17 OKS sigma\(s\) for objects with 5 keypoints"):
        check_sigmas(COCO_PERSON_SIGMAS, 5)
    with pytest.raises(ValueError, match="must be positive and finite"):
        check_sigmas(np.array([0.1, 0.0]), 2)


def test_coco_sigmas_are_pycocotools_doubles():
    assert (build_params("keypoints").kpt_oks_sigmas == COCO_PERSON_SIGMAS).all()


def test_blocks_and_run_lengths_of_the_same_mask_score_the_same():
    truth, results, _ = case("segm", 9)
    from pycocotools import mask as mask_util

    evaluators = [CocoEvaluator(to_annotations(truth), ["segm"]) for _ in range(2)]
    for image in truth["images"]:
        detections = to_detections(results, image["id"], "segm")
        evaluators[0].add(image["id"], detections)
        detections.masks = [block_from_mask(mask_util.decode(mask)) for mask in detections.masks]
        evaluators[1].add(image["id"], detections)
    a, b = (evaluator.compute().curves["segm"] for evaluator in evaluators)
    assert (a.precision == b.precision).all() and (a.scores == b.scores).all()
