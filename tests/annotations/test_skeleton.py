"""Mirror maps are proved, sigmas are chosen by a stated rule, errors per keypoint are measured."""

import numpy as np
import pytest

from annotations.skeleton import (
    COCO_PERSON_KEYPOINTS,
    COCO_PERSON_SIGMAS,
    Skeleton,
    check_flip_order,
    choose_sigmas,
    flip_order,
    ignored_pairs,
    infer_flip_pairs,
)
from coco_eval import CocoEvaluator
from evaluation.detections import Detections
from evaluation.keypoint_errors import format_errors
from helpers.coco_cases import to_annotations


def test_coco_names_give_the_coco_table():
    pairs = infer_flip_pairs(COCO_PERSON_KEYPOINTS)
    assert flip_order(pairs, 17).tolist() == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


@pytest.mark.parametrize(
    "names",
    [
        ["nose", "left_eye", "right_eye"],
        ["nose", "eye_left", "eye_right"],
        ["nose", "LeftEye", "RightEye"],
        ["nose", "L-eye", "R-eye"],
        ["nose", "eye_l", "eye_r"],
        ["nose", "lefteye", "righteye"],
        ["nose", "eyeL", "eyeR"],
    ],
)
def test_left_and_right_are_found_in_many_spellings(names):
    assert infer_flip_pairs(names) == ((1, 2),)


def test_names_without_sides_say_nothing_and_half_a_pair_is_refused():
    assert infer_flip_pairs(["head", "tail"]) is None
    assert infer_flip_pairs([]) is None
    where = (
        r"'left_eye' has no partner .* correct the names, or .*YOLO: flip_idx in data\.yaml; COCO: names .* categories"
    )
    with pytest.raises(ValueError, match=where):
        infer_flip_pairs(["left_eye", "nose"])


def test_pairs_that_names_imply_and_a_map_leaves_out_are_found():
    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_wing"]
    assert ignored_pairs(names, []) == [(1, 2), (3, 4)]
    assert ignored_pairs(names, [(2, 1)]) == [(3, 4)]
    assert ignored_pairs(names, [(1, 3), (2, 4)]) == [(1, 2), (3, 4)]
    assert ignored_pairs(names, [(2, 1), (3, 4), (0, 5)]) == []
    assert ignored_pairs(["head", "tail"], []) == ignored_pairs([], []) == []


def test_a_pair_may_name_its_points_in_any_order():
    assert flip_order([(1, 0)], 3).tolist() == flip_order([(0, 1)], 3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("pairs", [[(0, 3)], [(3, 0)], [(0, -1)], [(0, 0)], [(-1, 1)], [(0, 1), (1, 2)]])
def test_maps_that_are_not_their_own_inverse_are_refused(pairs):
    with pytest.raises(ValueError, match="flip pair"):
        flip_order(pairs, 3)


def drawn_skeletons(num_objects=60, seed=0):
    """Objects with nose, left, right, foot; left is on the picture's right, as of a person who faces us."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 100, (num_objects, 2)), rng.uniform(30, 80, (num_objects, 2))], axis=1)
    layout = np.array([[0.5, 0.1], [0.8, 0.5], [0.2, 0.5], [0.5, 0.9]])
    points = boxes[:, None, :2] + (layout + rng.normal(0, 0.05, (num_objects, 4, 2))) * boxes[:, None, 2:]
    visible = rng.choice([0, 2], (num_objects, 4, 1), p=[0.1, 0.9])
    return np.concatenate([points, visible], axis=2), boxes


def test_a_right_map_is_accepted_and_wrong_ones_are_refused():
    keypoints, boxes = drawn_skeletons()
    check_flip_order(flip_order([(1, 2)], 4), keypoints, boxes)
    for wrong in ([(0, 3)], [(0, 1), (2, 3)], [(0, 2)]):
        with pytest.raises(ValueError, match="flip_pairs look wrong"):
            check_flip_order(flip_order(wrong, 4), keypoints, boxes)


def test_distances_of_a_wrong_map_are_in_units_of_the_box_and_ten_objects_prove_it():
    """Nose and left exchanged: each is 0.3 and 0.4 boxes off; left alone, the nose fits and left is 0.6 boxes off."""
    boxes = np.tile([7.0, 5, 20, 100], (10, 1))
    layout = np.array([[0.5, 0.1], [0.8, 0.5], [0.2, 0.5], [0.5, 0.9]])
    points = boxes[:, None, :2] + layout * boxes[:, None, 2:]
    keypoints = np.concatenate([points, np.full((10, 4, 1), 2.0)], axis=2)
    wrong = flip_order([(0, 1)], 4)
    check_flip_order(wrong, keypoints[:9], boxes[:9])
    with pytest.raises(ValueError, match=r"on 10 labelled objects .* \(squared distance 0\.2500 against 0\.1800, in"):
        check_flip_order(wrong, keypoints, boxes)


def test_a_map_that_leaves_sided_points_in_place_is_refused_like_any_other():
    keypoints, boxes = drawn_skeletons()
    with pytest.raises(ValueError, match=r"flip_pairs look wrong: expected \[1, 2\] .* on \d+ labelled objects"):
        check_flip_order(np.arange(4), keypoints, boxes)
    # The same again two heights below: two pairs, of which one is given.
    below = keypoints + np.stack([0 * boxes[:, 3], 2 * boxes[:, 3], 0 * boxes[:, 3]], axis=1)[:, None]
    both = np.concatenate([keypoints, below], axis=1)
    check_flip_order(flip_order([(1, 2), (5, 6)], 8), both, boxes)
    with pytest.raises(ValueError, match=r"expected \[5, 6\] "):
        check_flip_order(flip_order([(1, 2)], 8), both, boxes)


def test_the_identity_is_accepted_where_no_point_has_a_partner():
    rng = np.random.default_rng(0)
    boxes = np.tile([0.0, 0, 50, 50], (100, 1))
    for layout in ([[0.5, 0.1], [0.5, 0.5], [0.5, 0.9]], [[0.2, 0.1], [0.25, 0.5], [0.15, 0.9]]):
        points = (np.array(layout) + rng.normal(0, 0.05, (100, 3, 2))) * 50
        keypoints = np.concatenate([points, np.full((100, 3, 1), 2)], axis=2)
        check_flip_order(np.arange(3), keypoints, boxes)


@pytest.mark.parametrize("seed", range(20))
def test_points_anywhere_give_no_false_alarm(seed):
    rng = np.random.default_rng(seed)
    num_objects, num_keypoints = int(rng.integers(20, 300)), int(rng.integers(2, 22))
    points = rng.random((num_objects, num_keypoints, 2)) * 50
    keypoints = np.concatenate([points, np.full((num_objects, num_keypoints, 1), 2)], axis=2)
    check_flip_order(np.arange(num_keypoints), keypoints, np.tile([0.0, 0, 50, 50], (num_objects, 1)))


def test_a_skeleton_without_sides_and_few_objects_prove_nothing():
    keypoints, boxes = drawn_skeletons(5)
    check_flip_order(flip_order([(0, 3)], 4), keypoints, boxes)
    rng = np.random.default_rng(0)
    keypoints, boxes = drawn_skeletons(200)
    keypoints[:, :, :2] = boxes[:, None, :2] + rng.random((200, 4, 2)) * boxes[:, None, 2:]  # any point anywhere
    check_flip_order(flip_order([(1, 2)], 4), keypoints, boxes)


def test_sigmas_come_from_the_flag_the_dataset_coco_or_the_default():
    person, own = Skeleton(COCO_PERSON_KEYPOINTS), Skeleton(("a", "b"), sigmas=(0.03, 0.04))
    values, source = choose_sigmas([0.05], own, 2)
    assert values.tolist() == [0.05, 0.05] and source == "--kpt-oks-sigmas"
    assert choose_sigmas(None, own, 2)[0].tolist() == [0.03, 0.04]
    values, source = choose_sigmas(None, person, 17)
    assert (values == COCO_PERSON_SIGMAS).all() and source == "COCO's persons"
    values, source = choose_sigmas(None, Skeleton(("a", "b")), 2)
    assert values.tolist() == [0.1, 0.1] and "default" in source


def test_wrong_counts_and_values_of_sigmas_are_refused():
    with pytest.raises(ValueError, match=r"3 OKS sigmas \(from --kpt-oks-sigmas\) for objects with 2 keypoints"):
        choose_sigmas([0.1, 0.1, 0.1], Skeleton(), 2)
    with pytest.raises(ValueError, match=r"1 OKS sigmas \(from the dataset\) for objects with 2 keypoints"):
        choose_sigmas(None, Skeleton(sigmas=(0.1,)), 2)
    with pytest.raises(ValueError, match="must be positive and finite"):
        choose_sigmas([0.1, -0.1], Skeleton(), 2)


def test_errors_per_keypoint_in_pixels_and_object_sizes():
    """Two objects of 20 x 20: one found, its first point 2 px off and its second exact; the other one missed."""
    objects = [
        {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": [x, 10, 20, 20], "area": 400, "iscrowd": 0,
         "keypoints": [x + 5, 15, 2, x + 10, 20, v], "num_keypoints": 2}
        for n, (x, v) in enumerate([(10, 2), (60, 1), (100, 0)])
    ]  # fmt: skip
    truth = {
        "images": [{"id": 1, "file_name": "a", "height": 100, "width": 200}],
        "annotations": objects,
        "categories": [{"id": 1, "name": "a", "keypoints": ["head", "tail"], "skeleton": [[1, 2]]}],
    }
    detections = Detections(
        np.array([1, 1]),
        np.array([0.9, 0.3]),
        np.array([[10.0, 10, 20, 20], [11, 10, 20, 20]]),
        keypoints=np.array([[[17.0, 15, 1], [20, 20, 1]], [[15.0, 15, 1], [20, 20, 1]]]),
    )
    evaluator = CocoEvaluator(to_annotations(truth), ["keypoints"], sigmas=np.array([0.1, 0.1]))
    evaluator.add(1, detections)
    rows = evaluator.compute().keypoint_errors
    head, tail = rows["head"], rows["tail"]
    assert (head["labelled"], tail["labelled"], rows["all"]["labelled"]) == (3, 2, 5)
    assert head["missed"] == pytest.approx(2 / 3) and tail["missed"] == pytest.approx(1 / 2)
    assert head["mean_px"] == pytest.approx(2) and tail["mean_px"] == pytest.approx(0)
    assert head["mean_relative"] == pytest.approx(0.1)
    assert (head["PCK@0.05"], head["PCK@0.1"], tail["PCK@0.05"]) == pytest.approx((0, 1 / 3, 1 / 2))
    assert "head" in format_errors(rows) and "PCK@0.2" in format_errors(rows)
