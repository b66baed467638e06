"""torchvision's detectors with a few channels: its own code for boxes, masks and keypoints, at a hundredth of the weights."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD

from models import weights
from models.anchors import set_anchors
from models.architectures import _settle_pooling_scales
from runtime import saved_model

WIDTH = 16

# Pyramids of any size are followed by torch.export of torch 2.14; 2.10 stops at their last pooling.
EXPORTS_PYRAMIDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def _stage(width_in, stride, width=WIDTH):
    return nn.Sequential(nn.Conv2d(width_in, width, 5, stride, padding=2), nn.BatchNorm2d(width), nn.ReLU())


def _pyramid(width):
    """Return a backbone whose feature maps have strides of 4 to 64 and ``width`` channels each."""
    stages = [_stage(3, 4, width), *(_stage(width, 2, width) for _ in range(3))]
    layers = OrderedDict((f"layer{n}", stage) for n, stage in enumerate(stages, 1))
    names = {name: str(n) for n, name in enumerate(layers)}
    return BackboneWithFPN(nn.Sequential(layers), names, [width] * 4, width)


def build_thin_model(spec):
    """Build an R-CNN or SSD from its record as `build_model` does, strides of 4 to 32 and 16 channels everywhere."""
    if spec.architecture.fixed_size is not None:
        options = {} if spec.detections_per_img is None else {"detections_per_img": spec.detections_per_img}
        return build_thin_one_stage("ssd", spec.num_classes, topk_candidates=40, **options)
    backbone = _pyramid(WIDTH)
    options = {
        "min_size": spec.min_size or spec.architecture.min_size,
        "max_size": spec.max_size or spec.architecture.max_size,
        "_skip_resize": spec.skip_resize,
        "box_head": TwoMLPHead(WIDTH * 7**2, WIDTH),
        "box_predictor": FastRCNNPredictor(WIDTH, spec.num_classes),
    }
    if spec.detections_per_img is not None:
        options["box_detections_per_img"] = spec.detections_per_img
    task = spec.architecture.task
    if task == "mask":
        options["mask_head"] = MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), dilation=1)
        options["mask_predictor"] = MaskRCNNPredictor(WIDTH, WIDTH, spec.num_classes)
    if task == "keypoint":
        options["keypoint_head"] = KeypointRCNNHeads(WIDTH, (WIDTH, WIDTH))
        options["keypoint_predictor"] = KeypointRCNNPredictor(WIDTH, spec.num_keypoints)
    model = {"box": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[task](backbone, **options)
    if spec.anchor_sizes or spec.anchor_ratios:
        set_anchors(model, spec.name, spec.num_classes, spec.anchor_sizes, spec.anchor_ratios)
    _settle_pooling_scales(model)
    return model


def build_thin_one_stage(name, num_classes=4, **options):
    """Build a RetinaNet ("retinanet"; "retinanet_giou" with the box loss of its v2), an FCOS or an SSD."""
    if name == "ssd":
        backbone = _pyramid(WIDTH)
        backbone.out_channels = [WIDTH] * 5
        return SSD(backbone, DefaultBoxGenerator([[2], [2, 3], [2, 3], [2], [2]]), (96, 112), num_classes, **options)
    options = {"min_size": (96, 128), "max_size": 160, **options}
    if name == "fcos":
        # Anchors so small that objects of small pictures exceed eight of the last level's; its norms are of 32 groups.
        anchors = AnchorGenerator(((4,), (6,), (8,), (10,), (6,)), ((1.0,),) * 5)
        return FCOS(_pyramid(32), num_classes, anchor_generator=anchors, **options)
    model = RetinaNet(_pyramid(WIDTH), num_classes, **options)
    if name == "retinanet_giou":
        model.head.regression_head._loss_type = "giou"
    return model


def use_thin_models(patch):
    """Let train.py build thin models in this process."""
    for module in (weights, saved_model):
        patch.setattr(module, "build_model", build_thin_model)
