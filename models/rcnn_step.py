"""torchvision's R-CNNs with a training step for the whole batch at once, instead of one picture after the other."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from models.object_block import objects_of
from models.proposal_step import BatchedRPN
from models.roi_step import BatchedRoIHeads


class BatchedRCNN(GeneralizedRCNN):
    """The order of a training step; its parts are `BatchedTransform`, `BatchedRPN` and `BatchedRoIHeads`."""

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None) -> Any:
        """Return the losses in training, else detections by torchvision's own code.

        Args:
            images: float [3, H, W] each, in 0..1.
            targets: In training the objects of each picture, see `objects_of`.
        """
        if not self.training or targets is None:
            return super().forward(images, targets)
        pictures, objects = self.transform.batch(images, objects_of(targets))
        features = self.backbone(pictures.tensors)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        proposals, proposal_losses = self.rpn(pictures, features, objects)
        _, losses = self.roi_heads(features, proposals, pictures.image_sizes, objects)
        return {**losses, **proposal_losses}


class BatchedFasterRCNN(BatchedRCNN, FasterRCNN):
    """Faster R-CNN with the batched step."""


class BatchedMaskRCNN(BatchedRCNN, MaskRCNN):
    """Mask R-CNN with the batched step."""


class BatchedKeypointRCNN(BatchedRCNN, KeypointRCNN):
    """Keypoint R-CNN with the batched step."""


# torchvision's class, and ours that trains in its place.
BATCHED_RCNN: dict[type[nn.Module], type[nn.Module]] = {
    FasterRCNN: BatchedFasterRCNN,
    MaskRCNN: BatchedMaskRCNN,
    KeypointRCNN: BatchedKeypointRCNN,
    RegionProposalNetwork: BatchedRPN,
    RoIHeads: BatchedRoIHeads,
}
