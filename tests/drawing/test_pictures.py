"""Pictures show what they are told to, where they are told to, at any size."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from annotations.skeleton import Skeleton
from conftest import ROOT
from drawing.pictures import PALETTE, Drawn, contact_sheet, draw_objects, save_picture
from pixels.masks import MaskBlock

GREY = 90


def blank(height=200, width=300):
    return torch.full((3, height, width), GREY, dtype=torch.uint8)


def objects(boxes, captions=None, **kwargs):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    colours = np.arange(len(boxes))
    return Drawn(boxes, captions or [""] * len(boxes), colours, **kwargs)


def has_colour(picture, colour):
    return (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0)


def test_no_object_leaves_the_picture_as_it_is_and_never_the_input_changed():
    image = blank()
    assert torch.equal(draw_objects(image, objects([])), image)
    draw_objects(image, objects([[20, 20, 80, 80]], ["a"]))
    assert torch.equal(image, blank())


def test_a_box_is_drawn_on_its_edges_in_its_colour():
    picture = draw_objects(blank(), objects([[40, 60, 120, 150], [200, 60, 250, 100]]))
    first, second = has_colour(picture, PALETTE[0]), has_colour(picture, PALETTE[1])
    assert first[60, 40:121].all() and first[150, 40:121].all() and first[60:151, 40].all() and first[60:151, 120].all()
    assert not first[80, 80] and not first[:, :40].any()
    assert second[60, 200:251].all() and not second[:, :200].any()


@pytest.mark.parametrize(
    "box", [[-50, -50, 400, 400], [290, 190, 310, 210], [100, 100, 100, 100], [-20, 50, -10, 60], [400, 400, 500, 500]]
)
@pytest.mark.parametrize("size", [(200, 300), (9, 7), (1, 1)])
def test_boxes_beyond_the_picture_and_tiny_pictures_are_no_error(box, size):
    drawn = objects([box], ["a caption that is long"], keypoints=np.array([[[*box[:2], 2], [*box[2:], 1]]]))
    picture = draw_objects(blank(*size), drawn, Skeleton(("a", "b"), ((0, 1),)), keypoint_names=True)
    assert picture.shape == (3, *size) and picture.dtype == torch.uint8


def test_captions_stand_above_their_box_and_not_on_each_other():
    drawn = objects([[40, 60, 120, 150], [42, 62, 122, 152]], ["one", "two"])
    picture = draw_objects(blank(), drawn)
    first, second = has_colour(picture, PALETTE[0]), has_colour(picture, PALETTE[1])
    assert first[45:60, 40:60].sum() > 100  # its ground
    without = draw_objects(blank(), objects(drawn.boxes))
    covered = first & ~has_colour(without, PALETTE[0]) | second & ~has_colour(without, PALETTE[1])
    alone = draw_objects(blank(), objects(drawn.boxes, ["one", ""]))
    ground = has_colour(alone, PALETTE[0]) & ~has_colour(without, PALETTE[0])
    assert (first | ~ground).float().mean() > 0.999  # the second caption hides nothing of the first
    assert covered.sum() > ground.sum()


def test_a_caption_that_could_only_stand_on_others_is_left_out():
    def drawn(number):
        boxes = np.full((number, 4), [40.0, 60, 120, 150])
        captions = [f"{n + 10}" for n in range(number)]
        return draw_objects(blank(), Drawn(boxes, captions, np.zeros(number, dtype=int)))

    assert not torch.equal(drawn(2), drawn(1))  # beside the first, above, below or inside
    assert torch.equal(drawn(50), drawn(8)) and not torch.equal(drawn(8), drawn(2))


def test_a_mask_tints_its_pixels_and_no_others():
    block = MaskBlock(100, 50, np.eye(40, dtype=np.uint8))
    picture = draw_objects(blank(), objects([[100, 50, 139, 89]], masks=[block]))
    inside = picture[:, 60, 110].tolist()
    assert inside != [GREY] * 3 and picture[:, 60, 115].tolist() == [GREY] * 3
    expected = [0.55 * GREY + 0.45 * c for c in PALETTE[0]]
    assert np.abs(np.array(inside) - expected).max() <= 1


def test_keypoints_are_filled_hollow_or_absent():
    points = np.array([[[50, 50, 2], [150, 50, 1], [250, 50, 0]]], dtype=np.float64)
    picture = draw_objects(blank(), objects([[20, 20, 280, 180]], keypoints=points), Skeleton((), ((0, 1), (1, 2))))
    colour = has_colour(picture, PALETTE[0])
    assert colour[50, 50] and colour[50, 100]  # the point, and its link to a hidden one
    assert picture[:, 50, 250].tolist() == [GREY] * 3 and not colour[50, 200]
    hollow = draw_objects(blank(), objects([[20, 20, 280, 180]], keypoints=points))
    assert hollow[:, 50, 150].tolist() == [GREY] * 3 and hollow[:, 50, 140:160].float().std() > 10


def test_what_is_drawn_grows_with_the_picture_and_with_how_much_it_is_shrunk():
    def height_of_caption(height, width, shown_at=None):
        drawn = objects([[width // 4, height // 2, width // 2, height - 2]], ["a"])
        picture = draw_objects(blank(height, width), drawn, shown_at=shown_at)
        return int(has_colour(picture, PALETTE[0])[: height // 2 - 1].any(dim=1).sum())

    assert height_of_caption(200, 300) < height_of_caption(1080, 1920) < height_of_caption(1080, 1920, shown_at=320)


def test_names_of_keypoints_are_left_out_where_they_have_no_room():
    names = Skeleton(("head", "tail", "left", "right"))
    box = [[50, 50, 60, 60]]
    near = np.array([[[50, 50, 2], [60, 60, 2], [55, 50, 2], [50, 55, 2]]])
    drawn = objects(box, keypoints=near)
    assert torch.equal(draw_objects(blank(), drawn, names, keypoint_names=True), draw_objects(blank(), drawn, names))
    far = objects(box, keypoints=(near - [[[50, 50, 0]]]) * [[[10, 10, 1]]] + [[[50, 50, 0]]])
    assert not torch.equal(draw_objects(blank(), far, names, keypoint_names=True), draw_objects(blank(), far, names))


def test_letters_beyond_ascii_are_drawn_as_themselves():
    drawn = [draw_objects(blank(), objects([[20, 90, 280, 180]], [text])) for text in ("ßßß", "жжж", "ééé")]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_contact_sheet_has_a_cell_for_every_picture():
    pictures = [("a" * 200, blank(100, 300)), ("b", blank(300, 100)), ("", blank(10, 10))]
    sheet = contact_sheet(pictures, columns=2, cell=120)
    assert sheet.dtype == torch.uint8 and 240 < sheet.shape[2] < 270
    # The three pictures, each with 120 pixels on its long side.
    assert has_colour(sheet, (GREY,) * 3).sum() == 120 * 40 + 40 * 120 + 120 * 120
    assert contact_sheet(pictures[:1], columns=5, cell=64).shape[2] < 80
    with pytest.raises(ValueError, match="got 0, 2 and 64"):
        contact_sheet([], columns=2, cell=64)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_saved_by_suffix(tmp_path, suffix):
    save_picture(blank(30, 40), tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.size == (40, 30) and image.getpixel((5, 5)) == (GREY,) * 3


@pytest.mark.slow
@pytest.mark.parametrize("without", [False, True], ids=["with matplotlib", "without"])
def test_matplotlib_is_loaded_when_text_is_drawn_and_not_needed_for_it(without, tmp_path):
    program = f"""
import sys
if {without}:
    sys.modules["matplotlib"] = None  # an import of it fails
import predict, torch
from drawing import pictures as drawing
assert not sys.modules.get("matplotlib")
objects = drawing.Drawn([[10, 40, 60, 90]], ["a caption"], [1])
drawing.save_picture(drawing.draw_objects(torch.zeros(3, 100, 200, dtype=torch.uint8), objects), "drawn.png")
assert bool(sys.modules.get("matplotlib")) == (not {without})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    picture = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert (picture[:38] > 0).any()  # the caption stands above the box
