"""What is drawn is what the annotations and the detections say."""

import dataclasses

import numpy as np

from coco_utils import read_coco
from drawing.drawn_objects import caption_names, drawn_detections, drawn_truth
from evaluation.detections import Detections
from pixels.masks import MaskBlock


def test_ground_truth_is_drawn_whole_and_crowds_say_so(drawn_coco):
    annotations = read_coco(drawn_coco / "annotations" / "instances_val2017.json")
    span = annotations.objects(0)
    crowd = annotations.is_crowd.copy()
    crowd[span.start] = True
    annotations = dataclasses.replace(annotations, is_crowd=crowd)
    names = dict(annotations.categories)
    drawn = drawn_truth(annotations, 0, names, with_masks=True, with_keypoints=False)
    classes = [names[id_] for id_ in annotations.category_ids[span].tolist()]
    assert list(drawn.captions) == [f"{classes[0]} (crowd)", *classes[1:]]
    assert drawn.colours.tolist() == annotations.category_ids[span].tolist()
    x, y, w, h = annotations.boxes_xywh[span.start].tolist()
    assert drawn.boxes[0].tolist() == [x, y, x + w, y + h]
    assert len(drawn.masks) == len(drawn) and drawn.keypoints is None
    unnamed = drawn_truth(annotations, 0, dict.fromkeys(names, ""), with_masks=False, with_keypoints=False)
    assert list(unnamed.captions) == ["(crowd)", *[""] * (len(classes) - 1)] and unnamed.masks is None


def test_an_only_class_is_not_named(drawn_coco):
    annotations = read_coco(drawn_coco / "annotations" / "instances_val2017.json")
    assert caption_names(annotations) == dict(annotations.categories)
    assert caption_names(dataclasses.replace(annotations, categories=((7, "thing"),))) == {7: ""}


def test_detections_are_drawn_with_their_scores():
    points = np.array([[[4.0, 5, 1], [0, 0, 0]], [[6, 7, 1], [8, 9, 1]]])
    masks = [MaskBlock(1, 2, np.ones((3, 4), dtype=np.uint8))] * 2
    boxes = np.array([[1.0, 2, 10, 20], [3, 4, 5, 6]])
    detections = Detections(np.array([3, 9]), np.array([0.987, 0.5]), boxes, masks, points)
    drawn = drawn_detections(detections, {3: "cat", 5: "dog"})
    assert list(drawn.captions) == ["cat 0.99", "? 0.50"]
    assert drawn.boxes.tolist() == [[1, 2, 11, 22], [3, 4, 8, 10]]
    assert drawn.colours.tolist() == [3, 9] and list(drawn.masks) == masks
    assert drawn.keypoints[:, :, 2].tolist() == [[2, 0], [2, 2]]
    assert detections.keypoints[0, 0, 2] == 1  # what was found is not changed
    assert list(drawn_detections(detections, {3: "", 9: ""}).captions) == ["0.99", "0.50"]
