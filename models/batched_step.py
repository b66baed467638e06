"""The one door to the training step that works on whole batches."""

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.batched_pictures import BatchedTransform
from models.one_stage_step import BatchedFCOS, BatchedRetinaNet, BatchedSSD
from models.rcnn_step import BATCHED_RCNN

# torchvision's class, and ours that trains in its place.
BATCHED: dict[type[nn.Module], type[nn.Module]] = {
    GeneralizedRCNNTransform: BatchedTransform,
    RetinaNet: BatchedRetinaNet,
    FCOS: BatchedFCOS,
    SSD: BatchedSSD,
    **BATCHED_RCNN,
}


def use_batched_step(model: nn.Module) -> None:
    """Let a detector do in training for the whole batch what torchvision does picture by picture.

    Losses and gradients are torchvision's to rounding, those of R-CNNs where the same samples are drawn. Weights, state
    dict and evaluation stay as they are.

    Args:
        model: One of torchvision's detectors. Its classes are replaced in place, which copies and pickles keep.
    """
    for module in model.modules():
        if type(module) in BATCHED:
            module.__class__ = BATCHED[type(module)]
