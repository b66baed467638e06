"""Which images of a split are trained on."""

import numpy as np

from annotations.skeleton import COCO_PERSON_KEYPOINTS
from loading.split import Split

# Torchvision trains on an image of persons only if it shows at least so many labelled keypoints.
MIN_PERSON_KEYPOINTS = 10


def training_indices(split: Split, *, keep_negatives: bool, needs_keypoints: bool) -> np.ndarray:
    """Return the images to train on, int64.

    Without ``keep_negatives`` an image needs an annotation (a crowd counts) and a box wider and higher than one pixel;
    for COCO's persons also `MIN_PERSON_KEYPOINTS` labelled keypoints, as in torchvision's scripts.
    """
    if keep_negatives:
        return split.indices
    annotations = split.annotations
    image_of = annotations.object_images()
    num_images = len(annotations)
    has_box = np.zeros(num_images, dtype=bool)
    has_box[image_of[(annotations.boxes_xywh[:, 2:] > 1).all(axis=1)]] = True
    keep = has_box
    if needs_keypoints and split.skeleton.names == COCO_PERSON_KEYPOINTS:
        labelled = np.bincount(image_of, weights=annotations.num_labelled_keypoints(), minlength=num_images)
        keep &= labelled >= MIN_PERSON_KEYPOINTS
    return split.indices[keep[split.indices]]
