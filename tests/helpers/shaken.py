"""Checkpoints with random weights that find things, for tests of what comes after the network."""

import torch
from torchvision.models.detection.rpn import RegionProposalNetwork

from loading.shapes_dataset import CATEGORIES, KEYPOINT_NAMES, SKELETON, ShapeDrawer, shapes_annotations
from models import weights
from models.architectures import ARCHITECTURES, ModelSpec
from runtime.checkpoint import save_checkpoint


def drawn_images(num_images):
    """Return drawn pictures as float [3, H, W] in 0..1."""
    drawer, annotations = ShapeDrawer("val"), shapes_annotations("val", num_images)
    return [torch.from_numpy(drawer.read(annotations, n)).permute(2, 0, 1) / 255 for n in range(num_images)]


def shake(model):
    """Let norms fit drawn pictures and the classifier have wide weights: many distinct scores."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()
        model.backbone(model.transform(drawn_images(4))[0].tensors)
        model.eval()
        for key, parameter in model.named_parameters():
            if "cls_score" in key or "cls_logits" in key or "classification_head" in key:
                spread = 0.02 if parameter.dim() > 1 else 0.5
                parameter.add_(torch.randn_like(parameter) * spread)
            elif "conv5_mask.weight" in key:  # without the chequered pattern of random weights, which no mask has
                parameter.copy_(parameter.mean(dim=(2, 3), keepdim=True).expand_as(parameter))
            elif "kps_score" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def limit_proposals(patch, limit=50):
    """Let R-CNNs that are built from now on look at fewer places than 1000: their heads take most of the time."""
    init = RegionProposalNetwork.__init__

    def limited(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._post_nms_top_n = dict.fromkeys(self._post_nms_top_n, limit)

    patch.setattr(RegionProposalNetwork, "__init__", limited)


def shaken_checkpoint(path, name, score_threshold=None, detections_per_img=30, **options):
    """Write the checkpoint of a shaken model; ``options`` are further fields of its record."""
    torch.manual_seed(0)
    sizes = {} if ARCHITECTURES[name].fixed_size else {"min_size": (96,), "max_size": 160}
    is_keypoint = ARCHITECTURES[name].task == "keypoint"
    sizes["detections_per_img"] = detections_per_img
    spec = ModelSpec(name, 4, num_keypoints=3 if is_keypoint else 0, **sizes, **options)
    model = weights.build_model(spec)  # or a thin one, see thin.py
    shake(model)
    content = {
        "model": model.state_dict(),
        "model_spec": spec.to_plain(),
        "dataset": {
            "label_categories": [7, 8, 9],
            "label_names": list(CATEGORIES),
            "keypoint_names": list(KEYPOINT_NAMES) if is_keypoint else [],
            "skeleton": [list(link) for link in SKELETON] if is_keypoint else [],
            "sigmas": None,
        },
        "metrics": {} if score_threshold is None else {"score_threshold": score_threshold},
    }
    save_checkpoint(content, path)
    return path
