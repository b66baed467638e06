"""torchvision's R-CNNs with a few channels: its own code for proposals, masks and keypoints, at a hundredth of the weights."""

from collections import OrderedDict

from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from models import weights
from models.architectures import _settle_pooling_scales
from runtime import saved_model

WIDTH = 16


def _stage(width_in, stride):
    return nn.Sequential(nn.Conv2d(width_in, WIDTH, 5, stride, padding=2), nn.BatchNorm2d(WIDTH), nn.ReLU())


def build_thin_model(spec):
    """Build an R-CNN from its record as `build_model` does, with strides of 4 to 32 and 16 channels everywhere."""
    layers = OrderedDict(layer1=_stage(3, 4), layer2=_stage(WIDTH, 2), layer3=_stage(WIDTH, 2), layer4=_stage(WIDTH, 2))
    names = {name: str(n) for n, name in enumerate(layers)}
    backbone = BackboneWithFPN(nn.Sequential(layers), names, [WIDTH] * 4, WIDTH)
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
    _settle_pooling_scales(model)
    return model


def use_thin_models(patch):
    """Let train.py build thin models in this process."""
    for module in (weights, saved_model):
        patch.setattr(module, "build_model", build_thin_model)
