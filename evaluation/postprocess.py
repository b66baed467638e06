"""What torchvision's models do after the network, done faster for scoring, with the same numbers.

Nothing installed is touched: methods are replaced on the model object for the duration of a ``with`` block. Each
replacement has a test that shows a difference of 0.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, keypointrcnn_inference
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import resize_boxes, resize_keypoints
from torchvision.ops import batched_nms, clip_boxes_to_image

from evaluation.coco_matching import rank_detections
from pixels.masks import MaskBlock


@contextlib.contextmanager
def fast_scoring(model: nn.Module, max_keypoint_dets: int = 20) -> Iterator[None]:
    """Let ``model`` produce, inside the block, just what COCO scoring reads.

    Mask R-CNN gives mask blocks instead of full images; Keypoint R-CNN gives keypoints for the ``max_keypoint_dets``
    best detections of each class (COCO reads no others) and NaN for the rest; SSDs select candidates of all classes
    at once where that saves waits for the device.

    Args:
        model: Bare, in evaluation mode.
        max_keypoint_dets: ``maxDets`` of the keypoint score.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, MaskRCNN):
            stack.enter_context(_replaced(model.transform, "postprocess", _blocks_instead_of_masks))
        if isinstance(model, KeypointRCNN):
            stack.enter_context(_keypoints_of_the_best(model.roi_heads, max_keypoint_dets))
        # On a CPU the loop over classes is as fast: nothing waits there.
        if isinstance(model, SSD) and next(model.parameters()).device.type != "cpu":
            ssd = model
            stack.enter_context(
                _replaced(ssd, "postprocess_detections", lambda *args: select_ssd_detections(ssd, *args))
            )
        yield


@contextlib.contextmanager
def _replaced(owner: nn.Module, name: str, function: Any) -> Iterator[None]:
    """Shadow a method on one object."""
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


def _blocks_instead_of_masks(
    result: list[dict[str, Any]], image_shapes: list[tuple[int, int]], original_sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Stand in for ``GeneralizedRCNNTransform.postprocess``: masks become `MaskBlock` lists."""
    for prediction, shape, original in zip(result, image_shapes, original_sizes):
        prediction["boxes"] = resize_boxes(prediction["boxes"], list(shape), list(original))
        if "keypoints" in prediction:
            prediction["keypoints"] = resize_keypoints(prediction["keypoints"], list(shape), list(original))
        prediction["masks"] = blocks_of_masks(prediction["masks"], prediction["boxes"], *original)
    return result


def blocks_of_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[MaskBlock]:
    """Return what ``paste_masks_in_image(...) > 0.5`` would show, without the canvases.

    Args:
        masks: float [N, 1, M, M] in 0..1, each inside its box.
        boxes: float [N, 4] xyxy in image pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    padded, scale = expand_masks(masks.to("cpu", torch.float32), padding=1)
    corners = expand_boxes(boxes.to("cpu", torch.float32), scale).to(torch.int64).tolist()
    blocks = []
    for mask, (x1, y1, x2, y2) in zip(padded, corners):
        size = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        if left >= right or top >= bottom:
            blocks.append(MaskBlock(0, 0, np.zeros((0, 0), dtype=np.uint8)))
            continue
        resized = nnf.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
        inside = resized[top - y1 : bottom - y1, left - x1 : right - x1] > 0.5
        blocks.append(MaskBlock(left, top, inside.to(torch.uint8).numpy()))
    return blocks


@contextlib.contextmanager
def _keypoints_of_the_best(roi_heads: nn.Module, limit: int) -> Iterator[None]:
    """Run the keypoint head after the box head, on the best detections of each image only.

    The head is four fifths of the model's time for an image of 100 detections: eight convolutions of 512
    channels per detection.
    """
    parts = {name: getattr(roi_heads, name) for name in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor")}
    pool, head, predictor = parts.values()

    def add_keypoints(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        """Run the keypoint head on the best detections; the others have NaN."""
        features, _, image_shapes = args[:3]
        result, losses = output
        best = []
        for prediction in result:
            labels, scores = prediction["labels"].cpu().numpy(), prediction["scores"].cpu().numpy()
            kept = rank_detections(labels, scores, limit)[0] if len(labels) else np.zeros(0, dtype=np.int64)
            best.append(torch.from_numpy(np.sort(kept)).to(prediction["boxes"].device))
        boxes = [prediction["boxes"][index] for prediction, index in zip(result, best)]
        logits = predictor(head(pool(features, boxes, image_shapes)))
        for prediction, index, points, scores in zip(result, best, *keypointrcnn_inference(logits, boxes)):
            count = len(prediction["boxes"])
            prediction["keypoints"] = points.new_full((count, *points.shape[1:]), float("nan"))
            prediction["keypoints"][index] = points
            prediction["keypoints_scores"] = scores.new_full((count, *scores.shape[1:]), float("nan"))
            prediction["keypoints_scores"][index] = scores
        return result, losses

    for name in parts:
        setattr(roi_heads, name, None)
    hook = roi_heads.register_forward_hook(add_keypoints)
    try:
        yield
    finally:
        hook.remove()
        for name, part in parts.items():
            setattr(roi_heads, name, part)


def select_ssd_detections(
    model: SSD, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Stand in for ``SSD.postprocess_detections``: one threshold and one top-k for all classes of an image.

    The loop over classes makes a GPU wait some 180 times per image.
    """
    all_scores = nnf.softmax(head_outputs["cls_logits"], dim=-1)
    detections = []
    for regression, scores, anchors, shape in zip(
        head_outputs["bbox_regression"], all_scores, image_anchors, image_shapes
    ):
        boxes = clip_boxes_to_image(model.box_coder.decode_single(regression, anchors), shape)
        by_class = scores[:, 1:].T
        candidates = torch.where(by_class > model.score_thresh, by_class, -1.0)
        best, places = candidates.topk(min(model.topk_candidates, candidates.shape[1]), dim=1)
        chosen = best > model.score_thresh
        labels = torch.arange(1, len(by_class) + 1, device=boxes.device)[:, None].expand_as(best)[chosen]
        boxes, best = boxes[places[chosen]], best[chosen]
        keep = batched_nms(boxes, best, labels, model.nms_thresh)[: model.detections_per_img]
        detections.append({"boxes": boxes[keep], "scores": best[keep], "labels": labels[keep]})
    return detections
