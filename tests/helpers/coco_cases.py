"""Random ground truth and detections that provoke COCOeval's corner cases, and the oracle's own answer."""

import contextlib
import copy
import io
import warnings

import hotcoco
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from annotations.findings import Findings
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from evaluation.detections import Detections


def random_case(seed, iou_type, num_keypoints=17):
    """Return (ground truth as COCO's dict, results as COCO's list) with ties, crowds, odd areas and empty images."""
    rng = np.random.default_rng(seed)
    height, width = 60, 80
    image_ids = rng.permutation(40)[: rng.integers(1, 9)].tolist()
    categories = [{"id": int(c), "name": f"c{c}"} for c in rng.choice(np.arange(1, 20), rng.integers(1, 4), False)]
    truths, results = [], []
    for image_id in image_ids:
        for _ in range(rng.integers(0, 7)):
            truths.append(_random_object(rng, height, width, iou_type, num_keypoints))
            truths[-1].update(id=len(truths), image_id=image_id, category_id=int(rng.choice(categories)["id"]))
            if rng.random() < 0.2 and len(truths) > 1 and truths[-2]["image_id"] == image_id:
                # Two objects in one place, of other sizes by their area: equal similarity, unequal consequences.
                same = ("bbox", "category_id", "segmentation", "keypoints", "num_keypoints")
                truths[-1].update({k: truths[-2][k] for k in same if k in truths[-2]})
                truths[-1]["area"] = float(rng.choice([100.0, 2000.0, 20000.0]))
        for _ in range(rng.integers(0, 30) if rng.random() < 0.9 else 0):
            results.append(_random_result(rng, height, width, iou_type, num_keypoints, truths, image_id, categories))
        if iou_type == "bbox" and rng.random() < 0.3:
            _add_rivals(rng, truths, results, image_id, int(categories[0]["id"]))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in image_ids]
    truth = {"info": {}, "images": images, "annotations": truths, "categories": categories}
    return truth, results


def _add_rivals(rng, truths, results, image_id, category_id):
    """Add two objects that the better detection overlaps equally, and a second one that reaches only one of them."""
    x, y = (float(v) for v in rng.integers(0, 40, 2))
    common = {"image_id": image_id, "category_id": category_id}
    for shift in rng.permutation([0, 2]).tolist():
        truths.append(
            {**common, "id": len(truths) + 1, "bbox": [x + shift, y, 10.0, 10.0], "area": 100.0, "iscrowd": 0}
        )
    for shift, score in ((1, 0.95), (float(rng.choice([-1, 3])), 0.9)):
        results.append({**common, "score": score, "bbox": [x + shift, y, 10.0, 10.0]})


def _random_object(rng, height, width, iou_type, num_keypoints):
    box = _random_box(rng, height, width)
    record = {"bbox": box, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.15)}
    if rng.random() < 0.2:  # areas on and around the borders of COCO's ranges
        record["area"] = float(rng.choice([0.0, 1024.0, 1024.0000001, 1023.9999, 9216.0, 9216.5, 1e10]))
    if iou_type == "segm":
        record["segmentation"] = _random_segmentation(rng, box, height, width)
    if iou_type == "keypoints":
        points = np.zeros((num_keypoints, 3))
        points[:, :2] = rng.integers(0, (width, height), (num_keypoints, 2))
        points[:, 2] = rng.integers(0, 3, num_keypoints)
        if rng.random() < 0.2:
            points[:] = 0
        record["keypoints"] = points.reshape(-1).tolist()
        record["num_keypoints"] = int((points[:, 2] > 0).sum())
    return record


def _random_box(rng, height, width):
    if rng.random() < 0.5:  # a coarse grid makes equal IoUs and IoUs exactly on a threshold likely
        x, y = rng.integers(0, 5, 2) * 10
        w, h = rng.integers(1, 4, 2) * 10
        return [float(x), float(y), float(w), float(h)]
    x, y = rng.uniform(0, (width - 5, height - 5))
    return [float(v) for v in np.round([x, y, rng.uniform(0.5, width - x), rng.uniform(0.5, height - y)], 2)]


def _random_segmentation(rng, box, height, width):
    x, y, w, h = box
    if rng.random() < 0.3:
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
        mask &= (rng.random(mask.shape) < 0.8).astype(np.uint8)
        rle = mask_util.encode(np.asfortranarray(mask))
        return {"size": [height, width], "counts": rle["counts"].decode()}
    polygons = []
    for _ in range(rng.integers(1, 3)):
        n = rng.integers(3, 8)
        points = np.array([x, y]) + rng.random((n, 2)) * [w, h]
        polygons.append(np.round(points, 2).reshape(-1).tolist())
    return polygons


def _random_result(rng, height, width, iou_type, num_keypoints, truths, image_id, categories):
    score = float(rng.random())
    if rng.random() < 0.5:
        score = float(np.round(score, 1))  # ties
    known = [c["id"] for c in categories]
    result = {"image_id": image_id, "category_id": int(rng.choice([*known, *known, 99])), "score": score}
    near = [t for t in truths if t["image_id"] == image_id]
    like = near[rng.integers(len(near))] if near and rng.random() < 0.7 else None
    if like is not None:
        result["category_id"] = like["category_id"]
    if iou_type == "bbox":
        box = like["bbox"] if like is not None else _random_box(rng, height, width)
        if rng.random() < 0.5:
            box = [float(v) for v in np.array(box) + rng.normal(0, 1.5, 4)]
        result["bbox"] = [box[0], box[1], max(box[2], 0.1), max(box[3], 0.1)]
    elif iou_type == "segm":
        box = like["bbox"] if like is not None else _random_box(rng, height, width)
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        dx, dy = rng.integers(-2, 3, 2)
        x1, y1 = max(int(box[0]) + dx, 0), max(int(box[1]) + dy, 0)
        mask[y1 : max(int(box[1] + box[3]) + dy, 0), x1 : max(int(box[0] + box[2]) + dx, 0)] = 1
        rle = mask_util.encode(mask)
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    else:
        points = np.ones((num_keypoints, 3))
        points[:, :2] = rng.uniform(0, (width, height), (num_keypoints, 2))
        if like is not None and like["num_keypoints"]:
            points[:, :2] = np.array(like["keypoints"]).reshape(-1, 3)[:, :2]
            if rng.random() < 0.6:
                points[:, :2] += rng.normal(0, rng.uniform(0.2, 6), (num_keypoints, 2))
        result["keypoints"] = points.reshape(-1).tolist()
    return result


def oracle_of_files(truth, results, iou_type):
    """Return pycocotools' figures of what two files hold; None where it cannot read them."""
    try:
        return list(oracle(truth, results, iou_type, [0.1] * 2 if iou_type == "keypoints" else None).stats)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, OverflowError):
        return None


def oracle(truth, results, iou_type, sigmas=None, max_dets=None):
    """Return pycocotools' own COCOeval after accumulate and, with its default maxDets, summarize."""
    truth = copy.deepcopy(truth)
    for record in truth["annotations"]:
        record.setdefault("iscrowd", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        if results:
            detections = coco.loadRes(copy.deepcopy(results))
        else:
            detections = COCO()
            detections.dataset = {**truth, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(coco, detections, iou_type)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.asarray(sigmas)
        if max_dets is not None:
            evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        evaluation.accumulate()
        if max_dets is None:
            evaluation.summarize()
    return evaluation


def second_oracle(truth, results, iou_type, sigmas=None):
    """Return hotcoco's COCOeval (another author, in Rust) after evaluate, accumulate and summarize."""
    coco = hotcoco.COCO(copy.deepcopy(truth))
    evaluation = hotcoco.COCOeval(coco, coco.loadRes(copy.deepcopy(results)), iou_type)
    if sigmas is not None:
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that OKS with other sigmas is not COCO's
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def to_annotations(truth):
    rules = Rules("case", lambda i: f"image {i}", lambda n: f"object {n}")
    return annotations_from_records(truth["images"], truth["annotations"], truth["categories"], rules, Findings())


def to_detections(results, image_id, iou_type):
    """Return one image's results in the order of the list."""
    rows = [r for r in results if r["image_id"] == image_id]
    detections = Detections(
        np.array([r["category_id"] for r in rows], dtype=np.int64),
        np.array([r["score"] for r in rows], dtype=np.float64),
    )
    if iou_type == "bbox":
        detections.boxes_xywh = np.array([r["bbox"] for r in rows], dtype=np.float64).reshape(-1, 4)
    elif iou_type == "segm":
        detections.masks = [r["segmentation"] for r in rows]
    else:
        points = np.array([r["keypoints"] for r in rows], dtype=np.float64)
        detections.keypoints = points.reshape(len(rows), -1, 3) if rows else np.zeros((0, 1, 3))
    return detections


def compare(evaluator_result, evaluation, iou_type):
    """Return the number of differing cells in COCOeval's three arrays."""
    curves = evaluator_result.curves[iou_type]
    return sum(
        int((getattr(curves, name) != evaluation.eval[name]).sum()) for name in ("precision", "recall", "scores")
    )
