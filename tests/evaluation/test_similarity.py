"""IoU and OKS by themselves, against pycocotools and by hand."""

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.coco_matching import CROWD_PARTNER, NO_PARTNER, Grid, match_across_classes
from evaluation.coco_metrics import build_params
from evaluation.similarity import BlockMasks, RleMasks, keypoint_extent, mask_iou, object_keypoint_similarity
from pixels.masks import block_from_mask


def oracle_oks(points, truth, box, area, sigmas):
    """Return OKS by ``COCOeval.computeOks``, one value per detection."""
    coco, found = COCO(), COCO()
    truth_record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0}
    truth_record |= {"keypoints": truth.reshape(-1).tolist(), "num_keypoints": int((truth[:, 2] > 0).sum())}
    common = {"images": [{"id": 1}], "categories": [{"id": 1}]}
    coco.dataset = {**common, "annotations": [truth_record]}
    records = [
        {"id": n + 1, "image_id": 1, "category_id": 1, "keypoints": p.reshape(-1).tolist(), "score": 1 - n / 100}
        for n, p in enumerate(points)
    ]
    found.dataset = {**common, "annotations": [{**r, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0} for r in records]}
    for part in (coco, found):
        part.createIndex()
    evaluation = COCOeval(coco, found, "keypoints")
    evaluation.params.kpt_oks_sigmas, evaluation.params.maxDets = sigmas, [100]
    evaluation._prepare()
    return evaluation.computeOks(1, 1)[:, 0]


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled points", "no labelled point"])
def test_oks_equals_pycocotools_wherever_the_points_lie(labelled):
    rng = np.random.default_rng(3)
    box, area, sigmas = [40.0, 60.0, 20.0, 10.0], 150.0, rng.uniform(0.05, 0.2, 4)
    truth = np.column_stack([rng.uniform(40, 60, 4), rng.uniform(60, 70, 4), [0, 2, 1, 0] if labelled else [0] * 4])
    # On every side of the doubled box, at its edges and in it: the fallback without a labelled point looks at that.
    places = [(x, y) for x in (5, 19, 20, 30, 80, 81, 95) for y in (30, 49, 50, 65, 80, 81, 99)]
    points = np.array([[(x + n, y - n, 1) for n in range(4)] for x, y in places], dtype=float)
    ours = object_keypoint_similarity(points, truth, np.array(box), area, sigmas)
    np.testing.assert_array_equal(ours, oracle_oks(points, truth, box, area, sigmas))
    assert len(set(ours.tolist())) > 5


def test_the_extent_of_keypoints_is_the_area_of_their_box():
    points = np.array([[(2, 3, 9), (7, 5, 0), (4, 11, 5)], [(1, 1, 1), (1, 1, 1), (1, 1, 1)]], dtype=float)
    assert keypoint_extent(points).tolist() == [5 * 8, 0]
    assert keypoint_extent(np.zeros((0, 3, 3))).shape == (0,)


def drawn_masks():
    masks = np.zeros((4, 20, 30), dtype=np.uint8)
    masks[0, 2:10, 3:12] = 1
    masks[1, 5:15, 8:20] = 1
    masks[2, 16:19, 25:29] = 1
    masks[3, :12, :30] = 1
    return masks


@pytest.mark.parametrize("form", ["blocks", "run lengths"])
def test_iou_of_masks_is_that_of_pycocotools_and_minus_one_where_it_does_not_matter(form):
    masks = drawn_masks()
    rles = [mask_util.encode(np.asfortranarray(m)) for m in masks]
    found = BlockMasks([block_from_mask(m) for m in masks]) if form == "blocks" else RleMasks(rles, masks.shape[1:])
    crowd = np.array([False, False, False, True])
    same = np.ones((4, 4), dtype=bool)
    same[1, 0] = False
    expected = np.array(mask_util.iou(rles, rles, crowd.astype(np.uint8)))
    iou = mask_iou(found, found, same, crowd, 0.0)
    ours, reachable = iou[same], expected[same] > 0
    np.testing.assert_allclose(ours[reachable], expected[same][reachable], rtol=1e-15)
    assert set(ours[~reachable].tolist()) == {-1.0} and iou[1, 0] == -1
    of_interest = mask_iou(found, found, same, crowd, 0.5)
    assert (of_interest[same & (expected >= 0.5)] == iou[same & (expected >= 0.5)]).all()
    assert (of_interest[same & (expected < 0.5)] == -1).all()  # the bound of two rectangles is their IoU


@pytest.mark.parametrize("build", [BlockMasks, lambda none: RleMasks(none, (5, 5))], ids=["blocks", "run lengths"])
def test_no_masks_have_no_areas_and_no_iou(build):
    none = build([])
    assert none.areas.shape == (0,) and none.windows.shape == (0, 4)
    empty = np.zeros((0, 0), dtype=bool)
    assert mask_iou(none, none, empty, np.zeros(0, dtype=bool), 0.5).shape == (0, 0)


def partners(iou, scores, crowd):
    return match_across_classes(np.array(iou, dtype=float), np.array(scores), np.array(crowd)).tolist()


def test_across_classes_the_best_detection_chooses_first_and_nobody_gets_two():
    assert partners([[0.9, 0.8], [0.95, 0.1]], [0.9, 0.5], [False, False]) == [0, NO_PARTNER]
    assert partners([[0.9, 0.8], [0.95, 0.6]], [0.9, 0.5], [False, False]) == [0, 1]
    assert partners([[0.5], [0.49]], [0.5, 0.9], [False]) == [0, NO_PARTNER]


def test_across_classes_an_object_is_a_better_partner_than_a_crowd():
    assert partners([[0.9, 0.6]], [0.9], [True, False]) == [1]
    assert partners([[0.6, 0.9]], [0.9], [True, False]) == [1]
    assert partners([[0.9], [0.7]], [0.9, 0.8], [True]) == [CROWD_PARTNER, CROWD_PARTNER]
    assert partners([[0.2, 0.1]], [0.9], [True, False]) == [NO_PARTNER]


def test_64_pairs_of_threshold_and_area_fill_the_bits_and_more_are_refused():
    params = build_params("bbox")
    params.iouThrs = np.linspace(0.5, 0.95, 16)
    areas = np.array([0.0, 100, 1024, 1025, 9216, 9217, 1e11])
    outside = [[not low <= area <= high for low, high in params.areaRng] for area in areas]
    expected = [sum((2**16 - 1) << (16 * a) for a in range(4) if of_area[a]) for of_area in outside]
    assert Grid.of(params).area_bits(areas).tolist() == expected and max(expected) >= 2**63
    params.iouThrs = np.linspace(0.5, 0.95, 17)
    with pytest.raises(ValueError, match="17 thresholds times 4 area ranges are more than 64"):
        Grid.of(params)


def test_thresholds_that_do_not_ascend_are_refused():
    params = build_params("bbox")
    params.iouThrs = np.array([0.5, 0.7, 0.6, 0.9])
    with pytest.raises(ValueError, match="must ascend"):
        Grid.of(params)
