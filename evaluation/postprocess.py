"""What torchvision's models do around the network, done faster for scoring, with the same numbers.

Nothing installed is touched: methods are replaced on the model object for the duration of a ``with`` block. Each
replacement has a test that shows a difference of 0.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image

from evaluation.coco_matching import rank_detections
from models.batched_boxes import constant
from pixels.masks import MaskBlock


@contextlib.contextmanager
def fast_scoring(model: nn.Module, max_keypoint_dets: int = 20) -> Iterator[None]:
    """Let ``model`` produce, inside the block, just what COCO scoring reads.

    Mask R-CNN gives its masks as they come out of the network, [N, 1, M, M], and the ``canvas`` (height, width) that
    `blocks_of_masks` takes; Keypoint R-CNN gives keypoints for the ``max_keypoint_dets`` best detections of each class
    (COCO reads no others) and NaN for the rest; SSDs select candidates of all classes at once where that saves waits
    for the device.

    Args:
        model: Bare, in evaluation mode.
        max_keypoint_dets: ``maxDets`` of the keypoint score.
    """
    with contextlib.ExitStack() as stack:
        transform = getattr(model, "transform", None)
        if isinstance(transform, GeneralizedRCNNTransform):
            stack.enter_context(_replaced(transform, "normalize", functools.partial(_normalize, transform)))
            stack.enter_context(_replaced(transform, "postprocess", _to_original_sizes))
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


def _normalize(transform: GeneralizedRCNNTransform, image: Tensor) -> Tensor:
    """Stand in for ``GeneralizedRCNNTransform.normalize``, which sends two tensors to the device and waits for both.

    Args:
        transform: Has the mean and deviation of each colour.
        image: float32 [3, H, W] in 0..1; others are left to torchvision.
    """
    if image.dtype != torch.float32:
        return type(transform).normalize(transform, image)
    mean, std = (constant(tuple(values), image.device) for values in (transform.image_mean, transform.image_std))
    return (image - mean[:, None, None]) / std[:, None, None]


def _to_original_sizes(
    result: list[dict[str, Any]], image_shapes: list[tuple[int, int]], original_sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Stand in for ``GeneralizedRCNNTransform.postprocess``, which sends every ratio to the device and waits for it.

    Masks stay small: `blocks_of_masks` shows them on their ``canvas``.
    """
    for prediction, shape, original in zip(result, image_shapes, original_sizes):
        # Divided in float32, as torchvision's tensors are.
        y_ratio, x_ratio = (float(np.float32(new) / np.float32(old)) for new, old in zip(original, shape))
        left, top, right, bottom = prediction["boxes"].unbind(1)
        prediction["boxes"] = torch.stack((left * x_ratio, top * y_ratio, right * x_ratio, bottom * y_ratio), dim=1)
        if "keypoints" in prediction:
            x, y, visible = prediction["keypoints"].unbind(-1)
            prediction["keypoints"] = torch.stack((x * x_ratio, y * y_ratio, visible), dim=-1)
        if "masks" in prediction:
            prediction["canvas"] = tuple(original)
    return result


def outputs_on_host(outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a batch's outputs with all tensors on the CPU, after one copy and one wait for all of them."""
    tensors = [(i, name, value) for i, output in enumerate(outputs) for name, value in output.items()]
    tensors = [entry for entry in tensors if isinstance(entry[2], Tensor)]
    tensors.sort(key=lambda entry: -entry[2].element_size())  # each type begins where it is aligned
    on_host: list[dict[str, Any]] = [dict(output) for output in outputs]
    if tensors:
        flat = [value.detach().reshape(-1).view(torch.uint8) for _, _, value in tensors]
        parts = torch.cat(flat).cpu().split([len(part) for part in flat])
        for (i, name, value), part in zip(tensors, parts):
            on_host[i][name] = part.view(value.dtype).view(value.shape)
    return on_host


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
        counts = [len(prediction["scores"]) for prediction in result]
        boxes, labels, scores = (torch.cat([p[name] for p in result]) for name in ("boxes", "labels", "scores"))
        ranked = torch.stack([labels.double(), scores.double()]).cpu().numpy()  # the only wait
        best, start = [], 0
        for count in counts:
            of_image = slice(start, start + count)
            kept = rank_detections(ranked[0, of_image], ranked[1, of_image], limit)[0]
            best.append(start + np.sort(kept))
            start += count
        chosen = torch.from_numpy(np.concatenate(best))
        if boxes.device.type == "cuda":
            chosen = chosen.pin_memory()
        chosen = chosen.to(boxes.device, non_blocking=boxes.device.type != "mps")
        best_boxes = boxes[chosen]
        logits = predictor(head(pool(features, list(best_boxes.split([len(part) for part in best])), image_shapes)))
        found = locate_keypoints(logits, best_boxes)
        for name, values in zip(("keypoints", "keypoints_scores"), found):
            of_all = values.new_full((len(boxes), *values.shape[1:]), float("nan"))
            of_all[chosen] = values
            for prediction, part in zip(result, of_all.split(counts)):
                prediction[name] = part
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


def locate_keypoints(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for ``heatmaps_to_keypoints``, which waits twice per detection for the size of its box.

    Args:
        maps: float [N, K, M, M], heat maps of the keypoints.
        boxes: float [N, 4] xyxy.

    Returns:
        Keypoints, float [N, K, 3] as (x, y, 1), and the heat at each, float [N, K].
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    places, heats = [maps.new_zeros((0, maps.shape[1]), dtype=torch.int64)], [maps.new_zeros((0, maps.shape[1]))]
    for heat_map, (width, height) in zip(maps, sides.ceil().long().tolist()):  # one wait for all
        size = height, width
        heat = nnf.interpolate(heat_map[:, None], size=size, mode="bicubic", align_corners=False).flatten(1)
        places.append(heat.argmax(dim=1)[None])
        heats.append(heat.gather(1, places[-1].T).T)
    place = torch.cat(places)
    width = sides[:, :1].ceil().long()
    correction = sides / sides.ceil()
    x = (place % width + 0.5) * correction[:, :1] + boxes[:, :1]
    y = (place.div(width, rounding_mode="floor") + 0.5) * correction[:, 1:] + boxes[:, 1:2]
    return torch.stack((x, y, torch.ones_like(x)), dim=-1), torch.cat(heats)


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
