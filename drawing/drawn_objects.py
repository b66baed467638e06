"""Ground truth and detections as what `drawing` draws: captions, colours, boxes as corners, masks and keypoints.

Colours go by category id, so that a class has one colour in every picture of the suite.
"""

from collections.abc import Mapping

import numpy as np

from annotations.arrays import Annotations
from annotations.object_masks import mask_block
from drawing.pictures import Drawn
from evaluation.detections import Detections
from pixels.geometry import xywh_to_xyxy
from pixels.masks import MaskBlock


def caption_names(annotations: Annotations) -> dict[int, str]:
    """Return the classes' names by category id; an only one needs no name in pictures."""
    return {id_: name if len(annotations.categories) > 1 else "" for id_, name in annotations.categories}


def drawn_truth(
    annotations: Annotations, i: int, names: Mapping[int, str], *, with_masks: bool, with_keypoints: bool
) -> Drawn:
    """Return all objects of image ``i`` as the file has them; a crowd says so.

    Args:
        annotations: The ground truth.
        i: Position of the image in it.
        names: Class names by category id; an empty one is not written.
        with_masks: Draw masks; every object needs a segmentation or a box.
        with_keypoints: Draw keypoints.
    """
    span = annotations.objects(i)
    ids = annotations.category_ids[span]
    captions = [
        f"{names[id_]} (crowd)".strip() if crowd else names[id_]
        for id_, crowd in zip(ids.tolist(), annotations.is_crowd[span].tolist())
    ]
    masks = [mask_block(annotations, i, n) for n in range(span.start, span.stop)] if with_masks else None
    keypoints = annotations.keypoints[span] if with_keypoints else None
    return Drawn(xywh_to_xyxy(annotations.boxes_xywh[span]), captions, ids, masks, keypoints)


def drawn_detections(detections: Detections, names: Mapping[int, str]) -> Drawn:
    """Return detections with their scores, in their order.

    Args:
        detections: With boxes; masks as blocks. A keypoint with v 0 is not drawn, others are drawn as visible, since
            models say nothing of hidden points.
        names: Class names by category id; an empty one is not written, a class that is not among them is "?".
    """
    assert detections.boxes_xywh is not None
    ids = detections.category_ids
    captions = [f"{names.get(id_, '?')} {score:.2f}".strip() for id_, score in zip(ids.tolist(), detections.scores)]
    masks = None if detections.masks is None else [mask for mask in detections.masks if isinstance(mask, MaskBlock)]
    keypoints = None
    if detections.keypoints is not None:
        keypoints = detections.keypoints.copy()
        keypoints[:, :, 2] = np.where(keypoints[:, :, 2] > 0, 2, 0)
    return Drawn(xywh_to_xyxy(detections.boxes_xywh), captions, ids, masks, keypoints)
