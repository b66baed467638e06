"""What the suite leans on in torchvision beyond its documented interface: a new torchvision fails here first.

Each entry of `PRIVATE` says who needs the name and for what. Where one fails, torchvision has changed: read what it does
now, and mend the file that is named.
"""

import ast
import importlib
import inspect

import pytest
import torchvision
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from helpers.drawn import ROOT
from models.batched_step import BATCHED
from models.rcnn_step import BATCHED_RCNN

DETECTION = "torchvision.models.detection"
# The name, below torchvision.models.detection unless given whole; who leans on it; parameters where it is called.
PRIVATE = [
    ("_utils.BalancedPositiveNegativeSampler", "models/batched_sampling.py takes its two numbers", None),
    ("_utils.Matcher", "models/batched_matching.py stands in for it", "self, match_quality_matrix"),
    ("_utils.SSDMatcher", "models/batched_matching.py stands in for it", "self, match_quality_matrix"),
    ("_utils.retrieve_out_channels", "models/architectures.py and anchors.py call it", "model, size"),
    ("roi_heads.expand_boxes", "evaluation/postprocess.py pastes masks as torchvision does", "boxes, scale"),
    ("roi_heads.expand_masks", "evaluation/postprocess.py pastes masks as torchvision does", "mask, padding"),
    ("roi_heads.roi_align", "models/acceleration.py cuts target masks by the kernel in its place", None),
    ("roi_heads.RoIHeads.forward", "models/rcnn_step.py trains in its place", "self, features, proposals, image_shapes, targets"),
    ("rpn.RegionProposalNetwork.forward", "models/rcnn_step.py trains in its place", "self, images, features, targets"),
    ("ssd.SSD.postprocess_detections", "evaluation/postprocess.py scores in its place", "self, head_outputs, image_anchors, image_shapes"),
    ("transform.GeneralizedRCNNTransform.postprocess", "evaluation/postprocess.py scores in its place", "self, result, image_shapes, original_image_sizes"),
    ("transform.GeneralizedRCNNTransform.forward", "models/batched_pictures.py calls it in training", "self, images, targets"),
    ("ssdlite.SSDLiteFeatureExtractorMobileNet", "models/architectures.py builds SSDlite of it", None),
    ("ssdlite.SSDLiteHead", "models/architectures.py and anchors.py build it", "self, in_channels, num_anchors, num_classes, norm_layer"),
    ("ssd.SSDHead", "models/anchors.py builds it for other anchors", "self, in_channels, num_anchors, num_classes"),
    ("retinanet.RetinaNetHead", "models/anchors.py builds it for other anchors", "self, in_channels, num_anchors, num_classes, norm_layer"),
    ("rpn.RPNHead", "models/anchors.py builds it for other anchors", "self, in_channels, num_anchors, conv_depth"),
    ("torchvision.transforms.v2.functional.register_kernel", "pixels/lazy_image.py names its own kernels", "functional, tv_tensor_cls"),
]  # fmt: skip
# Attributes with an underscore that objects of torchvision's have, and where they are read.
ATTRIBUTES = {
    "_loss_type": ("retinanet.RetinaNetRegressionHead", "models/one_stage_step.py and anchors.py: l1 or giou"),
    "_post_nms_top_n": ("rpn.RegionProposalNetwork", "inference/compare_outputs.py looks at all proposals"),
    "_skip_resize": ("transform.GeneralizedRCNNTransform", "models/architectures.py: pictures come in their size"),
}


def find(name):
    """Return the object of a dotted name."""
    parts = (name if name.startswith("torchvision") else f"{DETECTION}.{name}").split(".")
    found, module = torchvision, ["torchvision"]
    for part in parts[1:]:
        if inspect.ismodule(found):
            module.append(part)
            try:
                found = importlib.import_module(".".join(module))
                continue
            except ModuleNotFoundError:
                pass
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "use", "parameters"), PRIVATE, ids=[name for name, _, _ in PRIVATE])
def test_torchvision_has_the_private_names_that_we_lean_on(name, use, parameters):
    try:
        found = find(name)
    except AttributeError:
        pytest.fail(f"torchvision {torchvision.__version__} has no {name}; {use}")
    if parameters is not None:
        if inspect.isclass(found):
            found = found.__call__ if name in ("_utils.Matcher", "_utils.SSDMatcher") else found.__init__
        now = ", ".join(inspect.signature(found).parameters)
        assert now == parameters, f"torchvision {torchvision.__version__} changed the parameters of {name}; {use}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_torchvision_has_the_private_attributes_that_we_read(name):
    owner, use = ATTRIBUTES[name]
    source = inspect.getsource(find(owner))
    assert f"self.{name}" in source or f"{name} =" in source, f"{owner} has no {name} any more; {use}"


def test_every_private_name_in_the_code_is_listed():
    listed = {name.rpartition(".")[2] for name, _, _ in PRIVATE}
    found, attributes = set(), set()
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in [*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{DETECTION}._"):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
                attributes.add(node.attr)
        text = path.read_text()
        attributes |= {name for name in ATTRIBUTES if f'"{name}"' in text}
    assert found <= listed and found
    assert attributes == set(ATTRIBUTES)


@pytest.mark.parametrize("theirs", BATCHED, ids=lambda cls: cls.__name__)
def test_a_class_that_stands_in_for_torchvisions_takes_what_it_takes(theirs):
    ours = BATCHED[theirs]
    assert issubclass(ours, theirs)
    overridden = {name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(theirs, name)}
    for name in overridden:
        now = inspect.signature(getattr(theirs, name)).parameters
        assert list(now) == list(inspect.signature(getattr(ours, name)).parameters), f"{theirs.__name__}.{name}"
    assert {FCOS, RetinaNet, SSD, *BATCHED_RCNN} <= set(BATCHED)
