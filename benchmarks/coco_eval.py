"""Scoring: this suite's evaluator against pycocotools in one shot and image by image, in one run.

    python benchmarks/coco_eval.py [--quick]

The baselines are written from pycocotools' public parts: `one shot` is loadRes, evaluate, accumulate on all results;
`per image` is what torchvision's scripts do, a loadRes and evaluate for each image, then all_gather_object of the evalImgs.
faster-coco-eval and hotcoco are in the table where they are installed. Every implementation runs in a fresh process
on the same seeded data; CPU seconds and memory count from inputs in memory to figures.
"""

import argparse
import contextlib
import copy
import io
import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import Measured, in_fresh_process, machine, table

CASES = {
    "bbox": {"images": 5000, "categories": 80, "objects": 7.2, "detections": 100},
    "segm": {"images": 1000, "categories": 80, "objects": 7.2, "detections": 100},
    "keypoints": {"images": 2300, "categories": 1, "objects": 4.1, "detections": 30},
}
WAYS = ("this suite", "pycocotools", "per image", "faster-coco-eval", "hotcoco")


def make_case(iou_type, images, categories, objects, detections, seed=0):
    """Return (ground truth, results) with COCO val2017's counts; detections scatter around objects and elsewhere."""
    rng = np.random.default_rng(seed)
    height, width, k = 480, 640, 17
    truths, results = [], []
    for image_id in range(1, images + 1):
        boxes, classes = [], []
        for _ in range(rng.poisson(objects)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(300), 2))
            x, y = rng.uniform(0, (width - w, height - h))
            boxes.append([x, y, w, h])
            classes.append(int(rng.integers(1, categories + 1)))
            record = {"id": len(truths) + 1, "image_id": image_id, "category_id": classes[-1], "iscrowd": 0}
            record |= {"bbox": [float(v) for v in boxes[-1]], "area": float(w * h * 0.6)}
            if iou_type == "segm":
                record["iscrowd"] = 0
                t = np.sort(rng.uniform(0, 2 * np.pi, 25))
                points = [x + w / 2, y + h / 2] + np.stack([np.cos(t) * w, np.sin(t) * h], 1) / 2 * rng.uniform(
                    0.7, 1, (25, 1)
                )
                record["segmentation"] = [points.round(2).reshape(-1).tolist()]
            elif iou_type == "keypoints":
                points = np.zeros((k, 3))
                if rng.random() < 0.58:
                    points[:, :2] = [x, y] + rng.random((k, 2)) * [w, h]
                    points[:, 2] = rng.choice([0, 1, 2], k, p=[0.3, 0.1, 0.6])
                    points[points[:, 2] == 0] = 0
                record |= {
                    "keypoints": points.round(0).reshape(-1).tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
                boxes[-1] = (boxes[-1], points)
            else:
                record["iscrowd"] = int(rng.random() < 0.012)
            truths.append(record)
        for _ in range(detections):
            near = boxes and rng.random() < 0.5
            n = int(rng.integers(len(boxes))) if near else 0
            label = classes[n] if near and rng.random() < 0.7 else int(rng.integers(1, categories + 1))
            result = {"image_id": image_id, "category_id": label, "score": float(np.float32(rng.beta(1, 4)))}
            results.append(result | _detect(rng, iou_type, boxes[n] if near else None, height, width, k))
    image_list = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in range(1, images + 1)]
    names = [{"id": c, "name": f"c{c}"} for c in range(1, categories + 1)]
    return {"info": {}, "images": image_list, "annotations": truths, "categories": names}, results


def _detect(rng, iou_type, near, height, width, k):
    from pycocotools import mask as mask_util

    if iou_type == "keypoints":
        if near is not None:
            box, points = near
            moved = points[:, :2] + rng.normal(0, 0.04 * np.sqrt(box[2] * box[3]), (k, 2))
        else:
            moved = rng.uniform(0, (width, height), (k, 2))
        flat = np.concatenate([moved, np.ones((k, 1))], axis=1)
        return {"keypoints": flat.astype(np.float32).astype(float).reshape(-1).tolist()}
    if near is not None:
        box = np.array(near) + rng.normal(0, 0.08, 4) * [near[2], near[3], near[2], near[3]]
    else:
        w, h = np.exp(rng.uniform(np.log(8), np.log(200), 2))
        box = np.array([*rng.uniform(0, (width - w, height - h)), w, h])
    box[2:] = box[2:].clip(2)
    box[:2] = box[:2].clip(0, (width - 3, height - 3))
    box[2:] = np.minimum(box[2:], [width, height] - box[:2])
    if iou_type == "bbox":
        return {"bbox": box.astype(np.float32).astype(float).tolist()}
    mask = np.zeros((height, width), np.uint8, order="F")
    x, y, w, h = box
    yy, xx = np.mgrid[int(y) : int(y + h), int(x) : int(x + w)]
    inside = ((xx - x - w / 2) / w) ** 2 + ((yy - y - h / 2) / h) ** 2 <= 0.25
    mask[int(y) : int(y + h), int(x) : int(x + w)] = inside
    rle = mask_util.encode(mask)
    return {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def run_suite(iou_type, truth, results):
    from annotations.findings import Findings
    from annotations.record_checks import Rules
    from coco_eval import CocoEvaluator, _write_matches
    from coco_utils import annotations_from_records
    from evaluation.results_files import detections_of_results

    per_image = {image["id"]: [] for image in truth["images"]}
    for record in results:
        per_image[record["image_id"]].append(record)
    inputs = {i: detections_of_results(records, iou_type) for i, records in per_image.items()}
    rules = Rules("", str, str)
    with Measured() as measured:
        annotations = annotations_from_records(
            truth["images"], truth["annotations"], truth["categories"], rules, Findings()
        )
        evaluator = CocoEvaluator(annotations, [iou_type])
        for image_id, detections in inputs.items():
            evaluator.add(image_id, detections)
        result = evaluator.compute()
    buffer = io.BytesIO()
    _write_matches(buffer, result.saved[iou_type].matches, evaluator.grids[iou_type].num_bits)
    stats = [-1 if v is None else v for v in result.metrics[iou_type].values()]
    curves = result.curves[iou_type]
    return measured, stats, buffer.tell(), (curves.precision, curves.recall, curves.scores)


def run_pycocotools(iou_type, truth, results, coco_class=None, eval_class=None):
    if coco_class is None:
        from pycocotools.coco import COCO as coco_class
        from pycocotools.cocoeval import COCOeval as eval_class
    with contextlib.redirect_stdout(io.StringIO()), Measured() as measured:
        coco = coco_class()
        coco.dataset = truth
        coco.createIndex()
        evaluation = eval_class(coco, coco.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    arrays = tuple(np.asarray(evaluation.eval[name]) for name in ("precision", "recall", "scores"))
    return measured, list(evaluation.stats[: 10 if iou_type == "keypoints" else 12]), None, arrays


def run_per_image(iou_type, truth, results):
    import torch.distributed as dist
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    per_image = {image["id"]: [] for image in truth["images"]}
    for record in results:
        per_image[record["image_id"]].append(record)
    with contextlib.redirect_stdout(io.StringIO()), Measured() as measured:
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(copy.deepcopy(coco), iouType=iou_type)
        ids, parts = [], []
        for image_id, records in per_image.items():
            evaluation.cocoDt = coco.loadRes(records) if records else COCO()
            evaluation.params.imgIds = [image_id]
            evaluation.evaluate()
            shape = (-1, len(evaluation.params.areaRng), 1)
            parts.append(np.asarray(evaluation.evalImgs, dtype=object).reshape(shape))
            ids.append(image_id)
        everyone = [None]
        dist.all_gather_object(everyone, [ids, parts])
        ids, parts = everyone[0]
        evaluation.evalImgs = list(np.concatenate(parts, axis=2).flatten())
        evaluation.params.imgIds = ids
        evaluation._paramsEval = copy.deepcopy(evaluation.params)
        evaluation.accumulate()
        evaluation.summarize()
    sent = len(pickle.dumps([ids, parts]))
    arrays = tuple(evaluation.eval[name] for name in ("precision", "recall", "scores"))
    return measured, list(evaluation.stats[: 10 if iou_type == "keypoints" else 12]), sent, arrays


def run_way(way, iou_type, path):
    """Run one implementation in this process and print its figures as json."""
    truth, results = json.loads(Path(path).read_text())
    if way == "this suite":
        measured, stats, sent, arrays = run_suite(iou_type, truth, results)
    elif way == "per image":
        measured, stats, sent, arrays = run_per_image(iou_type, truth, results)
    elif way == "pycocotools":
        measured, stats, sent, arrays = run_pycocotools(iou_type, truth, results)
    elif way == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        measured, stats, sent, arrays = run_pycocotools(iou_type, truth, results, COCO, COCOeval_faster)
    else:
        from hotcoco import COCO, COCOeval

        measured, stats, sent, arrays = run_pycocotools(iou_type, truth, results, COCO, COCOeval)
    np.savez(f"{path}.{way.replace(' ', '_')}.npz", *arrays)
    print(json.dumps({"cpu": measured.cpu, "wall": measured.wall, "mb": measured.mb, "stats": stats, "sent": sent}))


def available(way):
    module = {"faster-coco-eval": "faster_coco_eval", "hotcoco": "hotcoco"}.get(way)
    return module is None or find_spec(module) is not None


def compare_case(iou_type, options, folder):
    """Run all implementations on one case; returns rows of the table."""
    path = folder / f"{iou_type}.json"
    path.write_text(json.dumps(make_case(iou_type, **options)))
    found = {way: in_fresh_process(__file__, "--way", way, iou_type, path) for way in WAYS if available(way)}
    reference = np.load(f"{path}.pycocotools.npz")
    rows = []
    for way, figures in found.items():
        arrays = np.load(f"{path}.{way.replace(' ', '_')}.npz")
        different = sum(int((arrays[name] != reference[name]).sum()) for name in reference.files)
        sent = "" if figures["sent"] is None else f"{figures['sent'] / 1e6:.1f}"
        rows.append(
            {
                "case": f"{iou_type}, {options['images']} images",
                "implementation": way,
                "CPU s": f"{figures['cpu']:.1f}",
                "times less CPU than pycocotools": f"{found['pycocotools']['cpu'] / figures['cpu']:.1f}",
                "peak MB over the inputs": f"{figures['mb']:.0f}",
                "MB gathered": sent,
                "cells that differ": different,
                "AP": f"{figures['stats'][0]:.5f}",
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_way(*args.way)
        return
    import tempfile

    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for iou_type, options in CASES.items():
            options = {**options, "images": options["images"] // (10 if args.quick else 1)}
            rows += compare_case(iou_type, options, Path(folder))
        columns = list(rows[0])
        print(table(rows, columns))
        growth = []
        for images in (5000, 20000, 80000):
            images //= 10 if args.quick else 1
            options = {**CASES["bbox"], "images": images, "detections": 20}
            path = Path(folder) / "growth.json"
            path.write_text(json.dumps(make_case("bbox", **options)))
            figures = in_fresh_process(__file__, "--way", "this suite", "bbox", path)
            per_image = f"{1000 * figures['cpu'] / images:.2f}"
            growth.append({"images": images, "CPU s": f"{figures['cpu']:.1f}", "CPU ms per image": per_image})
        print("\nGrowth of this suite's evaluator, boxes, 20 detections per image:\n")
        print(table(growth, list(growth[0])))


if __name__ == "__main__":
    sys.exit(main())
