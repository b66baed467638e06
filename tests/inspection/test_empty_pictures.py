"""The doctor names pictures that show nothing, as the model gets them, and no others."""

import re

import numpy as np
import pytest
from PIL import Image

import check_dataset
from helpers.drawn import draw_coco

pytestmark = pytest.mark.usefixtures("restore_process")

SIZE = (60, 80)


def diagnose(root, capsys):
    """Return the doctor's text in one line."""
    flags = ["--dataset", "coco", "--model", "ssdlite320_mobilenet_v3_large", "--data-path", str(root)]
    assert check_dataset.run(flags) == 0
    return " ".join(capsys.readouterr().out.split())


def with_one_in_a_thousand(levels, value):
    """Change so many pixels as do not count."""
    levels[0, :4] = value
    return levels


EMPTY = {
    "black": with_one_in_a_thousand(np.random.default_rng(0).integers(0, 16, SIZE, dtype=np.uint8), 200),
    "white": with_one_in_a_thousand(np.random.default_rng(0).integers(240, 256, SIZE, dtype=np.uint8), 0),
    "flat: all of one grey level": with_one_in_a_thousand(np.full(SIZE, 128, np.uint8), 0),
}
FULL = {
    "dark": np.random.default_rng(0).integers(0, 18, SIZE, dtype=np.uint8),
    "bright": np.random.default_rng(0).integers(238, 256, SIZE, dtype=np.uint8),
    "noise, grey from afar": np.random.default_rng(0).integers(126, 131, SIZE, dtype=np.uint8),
    "small bright thing": with_one_in_a_thousand(np.pad(np.full((3, 3), 90, np.uint8), ((57, 0), (77, 0))), 80),
}


@pytest.mark.parametrize("what", EMPTY)
def test_pictures_that_show_nothing_are_named_by_kind(tmp_path, what, capsys):
    root = draw_coco(tmp_path / "data")
    assert "as the model gets them" not in diagnose(root, capsys)
    Image.fromarray(EMPTY[what]).save(root / "train2017" / "000000.png")
    text = diagnose(root, capsys)
    assert f"1 of 6 pictures of train are {what} as the model gets them 000000.png has levels" in text
    assert text.count("as the model gets them") == 1


def test_a_coloured_plate_is_flat_and_a_picture_that_shows_little_is_not(tmp_path, capsys):
    root = draw_coco(tmp_path / "data", 4, sizes=(SIZE,))
    for name, levels in zip(range(4), FULL.values(), strict=True):
        Image.fromarray(levels).save(root / "train2017" / f"{name:06d}.png")
    assert "as the model gets them" not in diagnose(root, capsys)
    Image.new("RGB", SIZE[::-1], (200, 10, 60)).save(root / "val2017" / "000001.png")
    assert re.search(r"1 of 4 pictures of val are flat: .* 000001\.png has levels", diagnose(root, capsys))


def test_deep_pictures_are_judged_as_their_rule_shows_them(tmp_path, capsys):
    root = draw_coco(tmp_path / "data")
    for path in sorted(root.glob("*2017/*.png")):
        levels = np.asarray(Image.open(path).convert("L"))
        levels = ((levels - levels.min()) * (255 / np.ptp(levels))).astype(np.uint16)
        Image.fromarray(levels << 4).save(path)
    text = diagnose(root, capsys)
    assert "0 to 4095 (12 bits) is taken as black to white" in text and "as the model gets them" not in text
    values = np.arange(60 * 80, dtype=np.uint16).reshape(SIZE) // 20
    Image.fromarray(values).save(root / "train2017" / "000003.png")
    text = diagnose(root, capsys)
    assert "1 of 6 pictures of train are black as the model gets them 000003.png has levels 0 to 14 of 255" in text
    # The same files under a wider rule: nothing of it is remembered wrongly.
    Image.fromarray(np.full(SIZE, 65000, np.uint16)).save(root / "val2017" / "000000.png")
    text = diagnose(root, capsys)
    assert "6 of 6 pictures of train are black" in text and "1 of 6 pictures of val are white" in text
