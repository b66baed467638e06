"""Large pictures in tiles: known objects, seen by a detector that makes no mistakes, come out once and whole."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from inference.seams import Pieces, _unite, join_pieces
from inference.tiles import Tiling, outputs_in_tiles
from pixels.masks import MaskBlock, block_from_mask, paste_blocks


class PerfectDetector(nn.Module):
    """Finds what is in sight of known objects, cut at the borders of the picture it is given.

    Pictures tell where they come from: their first two channels are the columns and rows of the whole picture.
    """

    def __init__(self, boxes, labels, scores, *, masks=None, keypoints=None, least=2.0):
        super().__init__()
        self.boxes, self.labels, self.scores = boxes, labels, scores
        self.masks, self.keypoints, self.least = masks, keypoints, least
        self.batches = []

    def forward(self, images):
        self.batches.append([tuple(image.shape[1:]) for image in images])
        return [self.look(image) for image in images]

    @staticmethod
    def size_of(image):
        odd = int(image[0, 0, 0]) % 2
        return int(image[2, 0, odd]), int(image[2, 0, 1 - odd])

    def look(self, image):
        left, top = int(image[0, 0, 0]), int(image[1, 0, 0])
        height, width = image.shape[1:]
        low, high = np.array([left, top]), np.array([left + width, top + height])
        corners = np.concatenate([np.maximum(self.boxes[:, :2], low), np.minimum(self.boxes[:, 2:], high)], axis=1)
        seen = np.flatnonzero((corners[:, 2:] - corners[:, :2] >= self.least).all(axis=1))
        share = (corners[:, 2:] - corners[:, :2]).prod(axis=1) / (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        scores = self.scores * (0.6 + 0.4 * share.clip(0, 1))  # less sure of less
        order = seen[np.argsort(-scores[seen])]
        output = {
            "boxes": torch.from_numpy((corners[order] - np.tile(low, 2)).astype(np.float32)),
            "labels": torch.tensor(self.labels[order].tolist(), dtype=torch.int64),
            "scores": torch.tensor(scores[order].tolist()),
        }
        if self.masks is not None:
            full = paste_blocks([self.masks[n] for n in order], *self.size_of(image))
            seen = full[:, top : top + height, left : left + width]
            blocks = [block_from_mask(mask) for mask in seen]
            visible = np.flatnonzero([block.pixels.size for block in blocks])
            corners = [
                (block.left, block.top, block.left + block.pixels.shape[1], block.top + block.pixels.shape[0])
                for block in blocks
            ]
            output = {name: value[visible] for name, value in output.items()}
            output["boxes"] = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)[visible]
            output["masks"] = torch.from_numpy(seen[visible][:, None]).float()
        if self.keypoints is not None:
            points = self.keypoints[order].astype(np.float32)
            inside = ((points >= low) & (points <= high)).all(axis=-1)
            points = points.clip(low, high) - low
            output["keypoints"] = torch.from_numpy(
                np.concatenate([points, np.ones_like(points[..., :1])], axis=-1).astype(np.float32)
            )
            output["keypoints_scores"] = torch.from_numpy(np.where(inside, 5.0, -5.0).astype(np.float32))
        return output


def picture(height, width):
    """Return a picture whose pixels say where they are, and its size, float [3, H, W]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sizes = torch.where(columns % 2 == 0, height, width)
    return torch.stack([columns, rows, sizes]).float()


def random_objects(rng, count, height, width, tiling, num_labels=6):
    """Return boxes, float64 [N, 4] xyxy, of all sizes up to two tiles, anywhere in the picture, and their labels.

    An object that can fill all that two tiles have in common has a class to itself: two such ones of a class look
    alike there, and nothing says which pieces belong together.
    """
    sides = np.minimum(
        np.exp(rng.uniform(np.log(5), np.log(2 * tiling.size), (count, 2))), [0.98 * width, 0.98 * height]
    )
    corner = rng.random((count, 2)) * (np.array([width, height]) - sides)
    labels = rng.integers(1, num_labels + 1, count)
    fills = (sides >= np.minimum(tiling.size * tiling.overlap, [width, height])).all(axis=1)
    labels[fills] = 100 + np.flatnonzero(fills)
    return np.concatenate([corner, corner + sides], axis=1), labels


def same_boxes(output, boxes, atol=0.01):
    """Tell whether the boxes found are the known ones, each once."""
    found = output["boxes"].double().numpy()
    if len(found) != len(boxes):
        return False
    off = np.abs(found[:, None] - boxes[None]).max(axis=-1)
    return (off.min(axis=1) <= atol).all() and sorted(off.argmin(axis=1)) == list(range(len(boxes)))


@pytest.mark.parametrize("seed", range(15))
def test_each_of_hundreds_of_objects_is_found_once_and_whole(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 700, 2).tolist()
    tiling = Tiling(int(rng.integers(64, 400)), float(rng.uniform(0.1, 0.6)), batch_size=3)
    boxes, labels = random_objects(rng, 200, height, width, tiling)
    model = PerfectDetector(boxes, labels, rng.uniform(0.5, 1, len(boxes)))
    (output,) = outputs_in_tiles(model, [picture(height, width)], tiling)
    assert same_boxes(output, boxes)


def test_masks_are_whole_where_a_tile_shows_them_whole_and_else_put_together():
    """Ellipses in a crowd: their boxes overlap more than they do."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        height, width = rng.integers(60, 200, 2).tolist()
        tiling = Tiling(60, 0.3, batch_size=2)
        drawn, labels = random_objects(rng, 40, height, width, tiling)
        masks, boxes = [], []
        for x1, y1, x2, y2 in drawn:
            rows, columns = np.mgrid[0:height, 0:width] + 0.5
            away = ((2 * columns - x1 - x2) / (x2 - x1)) ** 2 + ((2 * rows - y1 - y2) / (y2 - y1)) ** 2
            masks.append(block_from_mask((away <= 1).astype(np.uint8)))
            left, top, pixels = masks[-1]
            boxes.append([left, top, left + pixels.shape[1], top + pixels.shape[0]])
        boxes = np.array(boxes, dtype=np.float64)
        model = PerfectDetector(boxes, labels, rng.uniform(0.5, 1, len(boxes)), masks=masks, least=1)
        (output,) = outputs_in_tiles(model, [picture(height, width)], tiling)
        assert same_boxes(output, boxes)
        found = paste_blocks(output["blocks"], height, width)
        nearest = np.abs(output["boxes"].numpy()[:, None] - boxes[None]).max(axis=-1).argmin(axis=1)
        assert np.array_equal(found, paste_blocks([masks[n] for n in nearest], height, width))


def test_masks_of_a_large_picture_are_never_full_size():
    boxes = np.array([[10.0, 10, 30, 30], [2000, 2000, 2020, 2030]])
    masks = [MaskBlock(int(x), int(y), np.ones((int(b - y), int(r - x)), np.uint8)) for x, y, r, b in boxes]
    model = PerfectDetector(boxes, np.array([1, 2]), np.array([0.9, 0.8]), masks=masks)
    model.size_of = lambda image: (2100, 2100)
    (output,) = outputs_in_tiles(model, [picture(2100, 2100)], Tiling(700))
    assert "masks" not in output
    assert [block.pixels.shape for block in output["blocks"]] == [(20, 20), (30, 20)]


def test_keypoints_are_those_of_the_whole_object_or_of_the_piece_that_shows_each():
    # The first fits into the overlap, the second is longer than a tile.
    boxes = np.array([[42.0, 5, 55, 25], [10, 40, 150, 60]])
    keypoints = np.array([[[43.0, 6], [54, 24]], [[12, 41], [148, 59]]])
    model = PerfectDetector(boxes, np.array([1, 1]), np.array([0.9, 0.8]), keypoints=keypoints)
    (output,) = outputs_in_tiles(model, [picture(60, 160)], Tiling(60, 0.3))
    assert same_boxes(output, boxes)
    assert np.allclose(output["keypoints"][:, :, :2].numpy(), keypoints)


def seen_by(*found, label=1):
    """Return what two tiles of 100 pixels, 80 apart, say when they find just these boxes of the picture (and scores)."""

    class Scripted(nn.Module):
        def forward(self, images):
            outputs = []
            for image in images:
                left = int(image[0, 0, 0])
                rows = [(box, score) for tile, box, score in found if tile == left // 80]
                boxes = torch.tensor([box for box, _ in rows]).reshape(-1, 4) - torch.tensor([left, 0, left, 0])
                scores = torch.tensor([score for _, score in rows])
                labels = torch.full((len(rows),), label)
                outputs.append({"boxes": boxes, "labels": labels, "scores": scores})
            return outputs

    (output,) = outputs_in_tiles(Scripted(), [picture(100, 180)], Tiling(100, 0.2))
    return [
        (tuple(round(v, 1) for v in box), round(score, 2))
        for box, score in zip(output["boxes"].tolist(), output["scores"].tolist())
    ]


def test_a_whole_object_wins_over_a_piece_of_it_that_the_model_is_surer_of():
    whole, piece = (1, [86.0, 10, 120, 40], 0.5), (0, [85.0, 8, 100, 42], 0.9)
    assert seen_by(whole, piece) == [((86, 10, 120, 40), 0.9)]


def test_a_piece_that_is_seen_badly_goes_with_the_whole_object():
    """Its IoU with the whole one is below 0.2; nine tenths of it are covered."""
    whole, piece = (1, [87.0, 10, 127, 50], 0.9), (0, [88.0, 8, 99, 38], 0.3)
    assert seen_by(whole, piece) == [((87, 10, 127, 50), 0.9)]


def test_neighbours_in_one_tile_stay_two_however_much_they_overlap():
    first, second = [10.0, 10, 50, 50], [12.0, 12, 52, 52]
    assert len(seen_by((0, first, 0.9), (0, second, 0.8))) == 2
    # A child before its mother, in the part that both tiles show.
    mother, child = [82.0, 10, 98, 90], [84.0, 50, 96, 90]
    both = [(tile, box, score) for tile in (0, 1) for box, score in ((mother, 0.9), (child, 0.8))]
    assert seen_by(*both) == [((82, 10, 98, 90), 0.9), ((84, 50, 96, 90), 0.8)]


def test_a_child_that_one_tile_misses_is_not_taken_for_its_mother():
    mother, child = [82.0, 10, 98, 90], [84.0, 60, 96, 90]
    assert len(seen_by((0, mother, 0.9), (1, mother, 0.8), (1, child, 0.7))) == 2


def test_a_mother_that_one_tile_is_not_sure_of_is_not_lost_to_her_child():
    """The child, which only the first tile shows, looks like the mother; she looks more like herself."""
    mother, child = [84.0, 10, 96, 90], [84.0, 40, 96, 90]
    found = seen_by((0, child, 0.9), (0, mother, 0.6), (1, mother, 0.8))
    assert found == [((84, 40, 96, 90), 0.9), ((84, 10, 96, 90), 0.8)]


def test_a_second_piece_of_an_object_is_dropped_too():
    whole, piece, another = (1, [87.0, 10, 127, 50], 0.9), (0, [87.0, 10, 100, 50], 0.8), (0, [88.0, 30, 100, 60], 0.3)
    assert seen_by(whole, piece, another) == [((87, 10, 127, 50), 0.9)]


def test_the_border_of_the_picture_cuts_nothing():
    """Both are whole, so that the better one is taken and not both put together."""
    assert seen_by((0, [84.0, 0, 96, 30], 0.9), (1, [85.0, 0, 97, 31], 0.8)) == [((84, 0, 96, 30), 0.9)]


def test_masks_that_overlap_are_united():
    pixels = [np.array(rows, dtype=np.uint8) for rows in ([[1, 0], [1, 1]], [[0, 1, 1]])]
    left, top, united = _unite([MaskBlock(4, 5, pixels[0]), MaskBlock(4, 5, pixels[1])])
    assert (left, top, united.tolist()) == (4, 5, [[1, 1, 1], [1, 1, 0]])


def test_another_class_on_the_same_place_stays():
    boxes, scores = np.array([[82.0, 10, 98, 40]] * 2), np.array([0.9, 0.8])
    model = PerfectDetector(boxes, np.array([1, 2]), scores)
    (output,) = outputs_in_tiles(model, [picture(100, 180)], Tiling(100, 0.2))
    assert output["labels"].tolist() == [1, 2]


def test_an_unlikely_box_does_not_stretch_a_likely_one():
    """It fits to the end of the piece at the seam, but is hardly there."""
    piece, noise = (0, [30.0, 10, 100, 40], 0.9), (1, [80.0, 10, 180, 40], 0.02)
    assert seen_by(piece, noise) == [((30, 10, 100, 40), 0.9)]


def test_two_halves_become_one_with_the_better_score():
    left, right = (0, [30.0, 10, 100, 40], 0.6), (1, [80.0, 11, 150, 41], 0.8)
    assert seen_by(left, right) == [((30, 10, 150, 41), 0.8)]


@pytest.mark.parametrize("seed", range(20))
def test_tiles_have_one_size_cover_the_picture_and_share_enough(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 3000, 2).tolist()
    tiling = Tiling(int(rng.integers(32, 900)), float(rng.uniform(0, 0.9)))
    windows = tiling.windows(height, width)
    sides = windows[:, 2:] - windows[:, :2]
    assert (sides == [min(width, tiling.size), min(height, tiling.size)]).all()
    for axis, length in ((0, width), (1, height)):
        starts, ends = np.unique(windows[:, axis]), np.unique(windows[:, axis + 2])
        assert starts[0] == 0 and ends[-1] == length
        shared = ends[:-1] - starts[1:]
        assert (shared >= tiling.overlap * tiling.size - 1).all() and (np.ptp(shared) <= 1 if len(shared) else True)
    assert len(windows) == len(np.unique(windows, axis=0))


def test_tiles_come_in_batches_and_pictures_in_their_order():
    boxes = np.array([[5.0, 5, 20, 20]])
    model = PerfectDetector(boxes, np.array([1]), np.array([0.9]))
    pictures = [picture(40, 40), picture(40, 90), picture(30, 40)]
    outputs = outputs_in_tiles(model, pictures, Tiling(40, 0.2, batch_size=2))
    assert all(same_boxes(output, boxes) for output in outputs)
    assert model.batches == [[(40, 40), (30, 40)], [(40, 40), (40, 40)], [(40, 40)]]


@pytest.mark.parametrize("seed", range(10))
def test_detections_without_any_sense_are_joined_too(seed):
    """A model at the start of its training finds boxes everywhere."""
    rng = np.random.default_rng(seed)
    tiling = Tiling(100, 0.4)
    windows = tiling.windows(220, 260)
    parts = []
    for x1, y1, x2, y2 in windows.tolist():
        centers, sides = rng.uniform([x1, y1], [x2, y2], (40, 2)), rng.uniform(20, 130, (40, 2))
        corners = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
        corners = corners.clip([x1, y1, x1, y1], [x2, y2, x2, y2]).astype(np.float32)
        parts.append(Pieces(corners, np.ones(40, dtype=np.int64), rng.uniform(0.01, 0.02, 40).astype(np.float32)))
    found = join_pieces(parts, windows)
    scores = np.concatenate([part.scores for part in parts])
    assert 0 < len(found.scores) <= len(scores) and found.scores[0] == scores.max()
    assert (np.diff(found.scores) <= 0).all() and (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_pieces_that_cover_each_other_in_a_circle_become_one():
    """Four boxes around the crossing of four borders, as a hardly trained SSDlite found them in a photograph."""
    windows = Tiling(320, 0.2).windows(427, 480)
    boxes = {
        (0, 0): [167.4, 175.1, 280.6, 320.0],
        (160, 0): [160.0, 111.1, 248.6, 320.0],
        (0, 107): [167.4, 107.0, 280.6, 252.1],
        (160, 107): [160.0, 107.0, 248.6, 316.1],
    }
    scores = {(160, 107): 0.024, (0, 0): 0.023, (160, 0): 0.022, (0, 107): 0.021}
    parts = [
        Pieces(np.array([boxes[place]], np.float32), np.array([1]), np.array([scores[place]], np.float32))
        for place in map(tuple, windows[:, :2].tolist())
    ]
    found = join_pieces(parts, windows)
    assert found.scores.tolist() == [np.float32(0.024)]
    np.testing.assert_allclose(found.boxes, [boxes[160, 107]], atol=1e-4)  # the largest


def test_a_large_picture_with_nothing_in_it_gives_nothing():
    model = PerfectDetector(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), masks=[], keypoints=np.zeros((0, 2, 2)))
    (output,) = outputs_in_tiles(model, [picture(50, 90)], Tiling(40))
    assert output["boxes"].shape == (0, 4) and output["keypoints"].shape == (0, 2, 3) and output["blocks"] == []


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        (31, 0.2, "tile 31: expected at least 32 pixels"),
        (800, 0.95, "overlap 0.95: expected a share from 0 to 0.9, such as 0.2"),
        (800, float("nan"), "overlap nan: expected a share from 0 to 0.9"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(size, overlap, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Tiling(size, overlap)
