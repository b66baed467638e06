"""The fast ways after the network give the same numbers as torchvision's."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from annotations.labels import LabelMap
from benchmarks.waits import count_waits
from coco_eval import CocoEvaluator
from evaluation.detections import detections_from_output
from evaluation.postprocess import (
    blocks_of_masks,
    fast_scoring,
    locate_keypoints,
    outputs_on_host,
    select_ssd_detections,
)
from evaluation.results_files import rle_of_block
from helpers.coco_cases import oracle, to_annotations
from models.architectures import ModelSpec, build_model
from pixels.masks import paste_blocks


def random_boxes(rng, count, height, width):
    corners = rng.uniform(0, 1, (count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    boxes[: count // 10] = [0, 0, width, height]
    boxes[count // 10 : count // 5, 2:] = boxes[count // 10 : count // 5, :2] + rng.uniform(
        0, 2, (count // 5 - count // 10, 2)
    )
    return torch.from_numpy(boxes)


def test_mask_blocks_and_their_run_lengths_equal_pasted_masks():
    rng = np.random.default_rng(0)
    different = checked = 0
    for _ in range(6):
        height, width = (int(v) for v in rng.integers(40, 300, 2))
        boxes = random_boxes(rng, 100, height, width)
        smooth = torch.nn.functional.interpolate(
            torch.from_numpy(rng.random((100, 1, 7, 7), dtype=np.float32)), size=28
        )
        pasted = paste_masks_in_image(smooth, boxes, (height, width))[:, 0] > 0.5
        blocks = blocks_of_masks(smooth, boxes, height, width)
        assert (paste_blocks(blocks, height, width).astype(bool) == pasted.numpy()).all()
        for mask, block in zip(pasted.numpy(), blocks):
            expected = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
            different += rle_of_block(block, height, width)["counts"] != expected
            checked += 1
    assert checked == 600 and different == 0


def spec_of(name, **options):
    return ModelSpec(name, 4, 5 if "keypoint" in name else 0, min_size=(96,), max_size=160, **options)


def images(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 90 + 10 * i, 120, generator=generator) for i in range(count)]


def shake(model):
    """Random weights give next to no detections: push the class scores apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.normal_(0, 0.3)
        model.roi_heads.score_thresh = 0.01
    return model.eval()


@pytest.mark.slow
@torch.inference_mode()
def test_mask_rcnn_scores_the_same_on_blocks(few_proposals):
    torch.manual_seed(0)
    model = shake(build_model(spec_of("maskrcnn_resnet50_fpn")))
    plain = model(images())
    with fast_scoring(model):
        fast = model(images())
    again = model(images())
    for a, b, c, image in zip(plain, fast, again, images()):
        assert len(a["boxes"]) > 5
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])
        assert b["masks"].shape[-1] < 40 and b["canvas"] == image.shape[-2:]
        masks = paste_blocks(detections_from_output(b, LabelMap((1, 2, 3), ("1", "2", "3"))).masks, *image.shape[-2:])
        assert (masks.astype(bool) == (a["masks"][:, 0] > 0.5).numpy()).all()
        assert torch.equal(a["masks"], c["masks"])  # the model is as before


def keypoint_truth(outputs, num_keypoints=5):
    """Ground truth near some detections, so that the score is not 0."""
    rng = np.random.default_rng(0)
    objects, image_list = [], []
    for i, (output, image) in enumerate(zip(outputs, images())):
        image_list.append({"id": i + 1, "file_name": f"{i}", "height": image.shape[1], "width": image.shape[2]})
        for n in range(0, min(40, len(output["boxes"])), 4):
            x1, y1, x2, y2 = output["boxes"][n].tolist()
            points = output["keypoints"][n].numpy() + rng.normal(0, 1.0, (num_keypoints, 3)) * [1, 1, 0]
            points[:, 2] = 2
            record = {"id": len(objects) + 1, "image_id": i + 1, "category_id": int(output["labels"][n]), "iscrowd": 0}
            record |= {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "num_keypoints": num_keypoints,
            }
            objects.append({**record, "keypoints": points.clip(0, 80).reshape(-1).tolist()})
    categories = [{"id": c, "name": str(c)} for c in (1, 2, 3)]
    return {"images": image_list, "annotations": objects, "categories": categories}


@pytest.mark.slow
@torch.inference_mode()
def test_keypoint_rcnn_scores_the_same_with_the_head_on_the_best_twenty(few_proposals):
    torch.manual_seed(0)
    model = shake(build_model(spec_of("keypointrcnn_resnet50_fpn", detections_per_img=40)))
    plain = model(images())
    fast = []
    with fast_scoring(model, 20):
        waits = count_waits(lambda: fast.extend(model(images())))
    assert waits["cpu"] == waits["tolist"] == 1  # the ranking and the sizes of boxes, for all detections
    assert max(len(output["boxes"]) for output in plain) > 30
    truth = keypoint_truth(plain)
    label_map, sigmas = LabelMap((1, 2, 3), ("1", "2", "3")), np.full(5, 0.1)
    results = {}
    for name, outputs in (("plain", plain), ("fast", fast)):
        evaluator = CocoEvaluator(to_annotations(truth), ["bbox", "keypoints"], sigmas=sigmas)
        evaluator.update([1, 2], outputs, label_map)
        results[name] = evaluator.compute()
    for a, b in zip(plain, fast):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])
        assert torch.isnan(b["keypoints"]).any(dim=(1, 2)).sum() > 0  # some were left out
        kept = ~torch.isnan(b["keypoints"]).any(dim=(1, 2))
        assert torch.allclose(a["keypoints"][kept], b["keypoints"][kept], atol=1e-4)
    assert results["plain"].metrics == results["fast"].metrics
    assert results["plain"].metrics["keypoints"]["AP"] > 0.01
    records = [
        {"image_id": i + 1, "category_id": int(label), "score": float(score), "keypoints": points.reshape(-1).tolist()}
        for i, output in enumerate(plain)
        for label, score, points in zip(output["labels"], output["scores"], output["keypoints"])
    ]
    evaluation = oracle(truth, records, "keypoints", sigmas)
    assert list(evaluation.stats)[0] == results["fast"].metrics["keypoints"]["AP"]
    assert model.roi_heads.has_keypoint()
    assert torch.equal(model(images())[0]["keypoints"], plain[0]["keypoints"])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"])
def test_ssd_candidates_of_all_classes_at_once_are_bit_equal(name):
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, 12)).eval()
    size = 300 if name.startswith("ssd300") else 320
    anchors = model.anchor_generator(
        type("Images", (), {"tensors": torch.zeros(2, 3, size, size), "image_sizes": [(size, size)] * 2})(),
        list(model.backbone(torch.rand(2, 3, size, size)).values()),
    )
    generator = torch.Generator().manual_seed(0)
    count = anchors[0].shape[0]
    outputs = {
        "cls_logits": torch.randn(2, count, 12, generator=generator) * 3,
        "bbox_regression": torch.randn(2, count, 4, generator=generator),
    }
    outputs["cls_logits"][1] = 0
    outputs["cls_logits"][1, :, 0] = 50  # an image with nothing above the threshold
    plain = model.postprocess_detections(outputs, anchors, [(size, size)] * 2)
    fast = select_ssd_detections(model, outputs, anchors, [(size, size)] * 2)
    assert len(plain[0]["boxes"]) == model.detections_per_img and len(plain[1]["boxes"]) == 0
    for a, b in zip(plain, fast):
        for field in ("boxes", "scores", "labels"):
            assert torch.equal(a[field], b[field])


def test_labels_without_a_category_are_left_out():
    output = {"boxes": torch.rand(3, 4), "scores": torch.rand(3), "labels": torch.tensor([1, 2, 1])}
    detections = detections_from_output(output, LabelMap((5, -1), ("a", "N/A")))
    assert detections.category_ids.tolist() == [5, 5] and len(detections) == 2


@torch.inference_mode()
def test_keypoints_are_located_as_by_torchvision_after_one_wait():
    """Bit by bit, for boxes from less than a pixel to a picture, with equal heats and with none."""
    generator = torch.Generator().manual_seed(0)
    sides = (
        torch.rand(12, 2, generator=generator)
        * torch.tensor([0.5, 1, 1.5, 3, 20, 60, 90, 130, 40, 56, 7, 200])[:, None]
    )
    sides[9] = 56  # the size of the map
    corners = torch.rand(12, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + sides], dim=1)
    maps = torch.randn(12, 5, 56, 56, generator=generator)
    maps[3] = 0
    maps[4] = maps[4].round()
    points, heats = heatmaps_to_keypoints(maps, boxes)
    located = locate_keypoints(maps, boxes)
    assert torch.equal(located[0], points) and torch.equal(located[1], heats)
    assert sum(count_waits(lambda: locate_keypoints(maps, boxes)).values()) == 1
    assert [part.shape for part in locate_keypoints(maps[:0], boxes[:0])] == [(0, 5, 3), (0, 5)]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures_are_normalised_as_by_torchvision_without_a_wait(dtype):
    transform = GeneralizedRCNNTransform(100, 200, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    pictures = [image.to(dtype) for image in images()]
    expected = transform(pictures)[0].tensors
    model = torch.nn.Module()
    model.transform = transform
    found = []
    with fast_scoring(model):
        transform(pictures)  # constants are copied once
        waits = count_waits(lambda: found.append(transform(pictures)[0].tensors))
    assert torch.equal(found[0], expected)
    assert waits.total() == (0 if dtype == torch.float32 else 2 * len(pictures))
    assert count_waits(lambda: transform(pictures)).total() == 2 * len(pictures)


@torch.inference_mode()
def test_results_are_scaled_as_by_torchvision_without_a_wait():
    generator = torch.Generator().manual_seed(0)
    transform = GeneralizedRCNNTransform(100, 200, [0.5] * 3, [0.5] * 3)
    shapes, originals = [(97, 131), (100, 200), (64, 33)], [(480, 641), (33, 66), (64, 33)]

    def results():
        generator.manual_seed(1)
        return [
            {
                "boxes": torch.rand(n, 4, generator=generator) * 90,
                "keypoints": torch.rand(n, 5, 3, generator=generator) * 90,
            }
            for n in (7, 0, 3)
        ]

    expected = transform.eval().postprocess(results(), shapes, originals)
    model = torch.nn.Module()
    model.transform = transform
    with fast_scoring(model):
        found = []
        waits = count_waits(lambda: found.extend(transform.postprocess(results(), shapes, originals)))
    assert not waits
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_outputs_of_a_batch_come_to_the_host_in_one_wait():
    generator = torch.Generator().manual_seed(0)
    outputs = [
        {
            "boxes": torch.rand(n, 4, generator=generator),
            "labels": torch.arange(n) + 2**40,
            "scores": torch.rand(n, generator=generator).to(torch.bfloat16),
            "masks": torch.rand(n, 1, 5, 5, generator=generator).transpose(2, 3),
            "canvas": (3, 4),
        }
        for n in (3, 0, 7)
    ]
    found = []
    waits = count_waits(lambda: found.extend(outputs_on_host(outputs)))
    assert sum(waits.values()) == 1
    for a, b in zip(outputs, found, strict=True):
        assert a.keys() == b.keys() and b["canvas"] == (3, 4)
        for name in ("boxes", "labels", "scores", "masks"):
            assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype
    assert outputs_on_host([]) == [] and outputs_on_host([{}]) == [{}]
