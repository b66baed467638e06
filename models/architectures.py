"""torchvision's detectors, built from a plain record so that a checkpoint can rebuild its own model.

torchvision's builders decide structure by which weights they are given: frozen batch norms with pretrained weights,
another SSDlite tail without. Here the structure is stated in a `ModelSpec` and built without weights; `weights`
then loads them. A test compares the result with torchvision's builders for all models.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, VGG16_Weights, WeightsEnum
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from models.anchors import Sizes, set_anchors


@dataclass(frozen=True)
class Backbone:
    """A classification network that detectors are built on.

    Attributes:
        name: Name of its builder in torchvision.models.
        weights: Its weights enum.
        stages: Prefixes of its parameter names, from the input on; the last n stay trainable with
            ``--trainable-backbone-layers n``.
    """

    name: str
    weights: type[WeightsEnum]
    stages: tuple[tuple[str, ...], ...]


def _feature_stages(starts: tuple[int, ...], end: int) -> tuple[tuple[str, ...], ...]:
    """Return stages of a network whose layers are called features.0, features.1, ..."""
    bounds = (*starts, end)
    return tuple(tuple(f"features.{i}." for i in range(a, b)) for a, b in zip(bounds[:-1], bounds[1:]))


RESNET50 = Backbone(
    "resnet50", ResNet50_Weights, (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",))
)
# A stage starts at every layer of stride 2 (https://arxiv.org/abs/1905.02244, table 1), and at the last layer.
MOBILENET_V3_LARGE = Backbone(
    "mobilenet_v3_large", MobileNet_V3_Large_Weights, _feature_stages((0, 2, 4, 7, 13, 16), 17)
)
# A stage starts at every max pooling but the last.
VGG16 = Backbone("vgg16", VGG16_Weights, _feature_stages((0, 4, 9, 16, 23), 31))


@dataclass(frozen=True)
class Architecture:
    """What is fixed about a detector.

    Attributes:
        backbone: What it is built on.
        trainable_layers: How many backbone stages are trained when it starts from pretrained weights.
        freezes_norm: Whether its batch norms are frozen when it starts from pretrained weights.
        task: ``box``, ``mask`` or ``keypoint``: what it predicts beside labels and scores.
        fixed_size: (height, width) that it resizes every image to, or None for a short and a long side.
        min_size: Short side it is used at.
        max_size: Limit of the long side.
        zero_eps: Whether its published COCO weights need the epsilon 0 in frozen batch norms.
        has_proposals: Whether it is of the R-CNN family: region proposals first, then RoI heads.
        has_reduced_tail: Whether its backbone's last stage has half the width unless ImageNet weights fill it, see
            `ModelSpec.full_tail`.
        min_batch_size: Images per process and step that training needs: batch norms over maps of one pixel cannot
            normalise a single image.
    """

    backbone: Backbone = RESNET50
    trainable_layers: int = 3
    freezes_norm: bool = True
    task: str = "box"
    fixed_size: tuple[int, int] | None = None
    min_size: int = 800
    max_size: int = 1333
    zero_eps: bool = False
    has_proposals: bool = False
    has_reduced_tail: bool = False
    min_batch_size: int = 1


ARCHITECTURES = {
    "fasterrcnn_resnet50_fpn": Architecture(zero_eps=True, has_proposals=True),
    "fasterrcnn_resnet50_fpn_v2": Architecture(freezes_norm=False, has_proposals=True),
    "fasterrcnn_mobilenet_v3_large_fpn": Architecture(MOBILENET_V3_LARGE, has_proposals=True),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Architecture(
        MOBILENET_V3_LARGE, min_size=320, max_size=640, has_proposals=True
    ),
    "fcos_resnet50_fpn": Architecture(),
    "retinanet_resnet50_fpn": Architecture(zero_eps=True),
    "retinanet_resnet50_fpn_v2": Architecture(freezes_norm=False),
    "ssd300_vgg16": Architecture(VGG16, trainable_layers=4, freezes_norm=False, fixed_size=(300, 300)),
    "ssdlite320_mobilenet_v3_large": Architecture(
        MOBILENET_V3_LARGE,
        trainable_layers=6,
        freezes_norm=False,
        fixed_size=(320, 320),
        has_reduced_tail=True,
        min_batch_size=2,
    ),
    "maskrcnn_resnet50_fpn": Architecture(task="mask", zero_eps=True, has_proposals=True),
    "maskrcnn_resnet50_fpn_v2": Architecture(task="mask", freezes_norm=False, has_proposals=True),
    "keypointrcnn_resnet50_fpn": Architecture(task="keypoint", zero_eps=True, has_proposals=True),
}

IOU_TYPES = {"box": ("bbox",), "mask": ("bbox", "segm"), "keypoint": ("bbox", "keypoints")}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that `build_model` needs; plain values, stored in checkpoints.

    Attributes:
        name: A key of `ARCHITECTURES`.
        num_classes: Background included.
        num_keypoints: Per object, for keypoint models.
        frozen_norm: Whether the backbone's batch norms are constants.
        frozen_norm_eps: Their epsilon.
        full_tail: SSDlite only: the backbone's last stage at full width, as ImageNet weights need it.
        trainable_layers: How many backbone stages are trained.
        min_size: Short sides to resize to, one drawn per image in training, the last one in evaluation; None
            for the model's own.
        max_size: Limit of the long side; None for the model's own.
        skip_resize: Leave images as they are in training, because the augmentation has resized them.
        detections_per_img: None for the model's own.
        rpn_score_thresh: None for the model's own; R-CNN models only.
        anchor_sizes: See `models.anchors.set_anchors`; None for the model's own.
        anchor_ratios: Height over width; None for the model's own.
    """

    name: str
    num_classes: int
    num_keypoints: int = 0
    frozen_norm: bool = False
    frozen_norm_eps: float = 1e-5
    full_tail: bool = False
    trainable_layers: int = 5
    min_size: tuple[int, ...] | None = None
    max_size: int | None = None
    skip_resize: bool = False
    detections_per_img: int | None = None
    rpn_score_thresh: float | None = None
    anchor_sizes: Sizes | None = None
    anchor_ratios: tuple[float, ...] | None = None

    @property
    def architecture(self) -> Architecture:
        """What is fixed about this model."""
        return ARCHITECTURES[self.name]

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What the model's detections are scored on: "bbox" and perhaps "segm" or "keypoints"."""
        return IOU_TYPES[self.architecture.task]

    def to_plain(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "ModelSpec":
        """Rebuild a record from `to_plain`; fields of later versions are ignored."""
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name in ("min_size", "anchor_ratios"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        if known.get("anchor_sizes") is not None:
            known["anchor_sizes"] = tuple(map(tuple, known["anchor_sizes"]))
        return cls(**known)


def build_model(spec: ModelSpec) -> nn.Module:
    """Build a detector with random weights.

    Raises:
        ValueError: It cannot have these anchors, or as many trainable layers; the text names the flag.
    """
    architecture = spec.architecture
    options: dict[str, Any] = {}
    if architecture.fixed_size is None:
        if spec.min_size is not None:
            options["min_size"] = spec.min_size
        if spec.max_size is not None:
            options["max_size"] = spec.max_size
        options["_skip_resize"] = spec.skip_resize
    if architecture.task == "keypoint":
        options["num_keypoints"] = spec.num_keypoints
    if architecture.has_proposals and spec.rpn_score_thresh is not None:
        options["rpn_score_thresh"] = spec.rpn_score_thresh
    if spec.detections_per_img is not None:
        options["box_detections_per_img" if architecture.has_proposals else "detections_per_img"] = (
            spec.detections_per_img
        )

    if spec.full_tail:
        model = _build_ssdlite_with_full_tail(spec.num_classes, options)
    else:
        model = torchvision.models.get_model(
            spec.name, weights=None, weights_backbone=None, num_classes=spec.num_classes, **options
        )
    if spec.anchor_sizes or spec.anchor_ratios:
        set_anchors(model, spec.name, spec.num_classes, spec.anchor_sizes, spec.anchor_ratios)
    if spec.frozen_norm:
        _freeze_batch_norms(model.get_submodule("backbone"), spec.frozen_norm_eps)
    _freeze_stages(model, architecture.backbone, spec.trainable_layers)
    if architecture.has_proposals and not next(model.parameters()).is_meta:
        _settle_pooling_scales(model)
    return model


def _build_ssdlite_with_full_tail(num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Build SSDlite320 as torchvision does for ImageNet weights; its builder offers this only with a download."""
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    features = torchvision.models.mobilenet_v3_large(norm_layer=norm_layer).features
    size = ARCHITECTURES["ssdlite320_mobilenet_v3_large"].fixed_size
    backbone = SSDLiteFeatureExtractorMobileNet(features, 13, norm_layer)  # C4 is layer 13
    anchors = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    channels = detection_utils.retrieve_out_channels(backbone, size)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), num_classes, norm_layer)
    defaults = {
        "score_thresh": 0.001,
        "nms_thresh": 0.55,
        "detections_per_img": 300,
        "topk_candidates": 300,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return SSD(backbone, anchors, size, num_classes, head=head, **{**defaults, **options})


@torch.no_grad()
def _settle_pooling_scales(model: nn.Module) -> None:
    """Let RoI pooling work out the strides of its feature maps from an image whose size is a power of two.

    It does so from the first batch it sees, and errs where that is of small images with sides between multiples of 32:
    what a model computes would depend on where a run began.
    """
    side = 64
    was_training = model.training
    features = model.eval().get_submodule("backbone")(torch.zeros(1, 3, side, side))
    for module in model.modules():
        if isinstance(module, MultiScaleRoIAlign):
            module(features, [torch.zeros(1, 4)], [(side, side)])
    model.train(was_training)


def _freeze_batch_norms(module: nn.Module, eps: float) -> None:
    """Replace every BatchNorm2d below ``module`` by a FrozenBatchNorm2d, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=eps))
        else:
            _freeze_batch_norms(child, eps)


def backbone_keys(model: nn.Module, backbone: Backbone) -> dict[str, str]:
    """Return which entry of ``model.state_dict()`` stands for which of the classification network's.

    Detectors regroup the network's layers under other names but keep their order, so entries pair up by
    position. Classifier layers and counters of seen batches, which frozen norms lack, have no counterpart.
    """
    with torch.device("meta"):
        classifier = torchvision.models.get_model(backbone.name, weights=None)
    prefixes = tuple(prefix for stage in backbone.stages for prefix in stage)
    theirs = [key for key in _without_counters(classifier.state_dict()) if key.startswith(prefixes)]
    ours = [key for key in _without_counters(model.state_dict()) if key.startswith("backbone.")]
    ours = [key for key in ours if not key.endswith("scale_weight")]  # SSD300's own, before VGG's layers
    return dict(zip(theirs, ours))


def _without_counters(keys: Any) -> Iterator[str]:
    return (key for key in keys if not key.endswith("num_batches_tracked"))


def _freeze_stages(model: nn.Module, backbone: Backbone, trainable_layers: int) -> None:
    """Let gradients pass only into the last ``trainable_layers`` stages of the backbone.

    Raises:
        ValueError: The backbone has fewer stages.
    """
    num_stages = len(backbone.stages)
    if not 0 <= trainable_layers <= num_stages:
        raise ValueError(
            f"--trainable-backbone-layers {trainable_layers}: {backbone.name} has 0 to {num_stages} such layers"
        )
    frozen = tuple(prefix for stage in backbone.stages[: num_stages - trainable_layers] for prefix in stage)
    if not frozen:
        return
    parameters = dict(model.named_parameters())
    for theirs, ours in backbone_keys(model, backbone).items():
        if theirs.startswith(frozen) and ours in parameters:
            parameters[ours].requires_grad_(False)
