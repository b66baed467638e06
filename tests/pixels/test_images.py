"""Every kind of image becomes RGB with its real brightness; broken ones are named."""

import pickle

import numpy as np
import pytest
from PIL import ExifTags, Image

from annotations.image_checks import find_shared_files
from helpers.deep_images import save_png16, save_tiff16
from pixels.images import BadImageError, read_header, read_image, read_values
from pixels.value_range import ValueRange

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))


def save(image, path, **options):
    image.save(path, **options)
    return path


def with_orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "a.png"), ("P", "a.gif"), ("RGBA", "a.png"), ("LA", "a.png"), ("CMYK", "a.jpg"), ("CMYK", "a.tif")],
)
def test_other_colour_modes_keep_their_brightness(tmp_path, mode, name):
    image = Image.fromarray(RAMP).convert(mode) if mode == "P" else Image.fromarray(RAMP).convert("RGB").convert(mode)
    pixels = read_image(save(image, tmp_path / name))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - RAMP[:, :, None]).max() <= 12


def test_sixteen_bit_images_are_scaled_not_saturated(tmp_path):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for name in ("a.png", "a.tif"):
        pixels = read_image(save(deep, tmp_path / name))
        assert (pixels == RAMP[:, :, None]).all()


def test_one_bit_images_become_black_and_white(tmp_path):
    image = Image.fromarray((RAMP > 127).astype(np.uint8) * 255).convert("1")
    assert set(np.unique(read_image(save(image, tmp_path / "a.png")))) == {0, 255}


TWELVE_BITS = ValueRange(whole=(0, 4095))
COLOURS = np.random.default_rng(0).integers(0, 4096, (48, 64, 4)).astype(np.uint16)


def test_twelve_bits_are_as_bright_as_eight(tmp_path):
    path = save(Image.fromarray(RAMP.astype(np.uint16) << 4), tmp_path / "a.png")
    assert (read_image(path, value_range=TWELVE_BITS) == RAMP[:, :, None]).all()
    assert read_image(path).max() == 15  # as 16 bits


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_are_scaled_by_their_range(tmp_path, dtype):
    path = save(Image.fromarray((RAMP.astype(np.int64) << 8).astype(dtype)), tmp_path / "a.tif")
    shown = ValueRange(whole=(0, 65535), real=(0, 65280))
    assert read_header(path).is_deep and (read_image(path, value_range=shown) == RAMP[:, :, None]).all()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_have_all_their_bits(tmp_path, channels):
    values = COLOURS[:, :, :channels]
    path = save_png16(values, tmp_path / "a.png")
    wanted = values[:, :, 0] if channels == 2 else values[:, :, :3]
    assert read_header(path).is_deep and (read_values(path) == wanted).all()
    levels = wanted >> 4
    assert (read_image(path, value_range=TWELVE_BITS) == (levels[:, :, None] if channels == 2 else levels)).all()
    with Image.open(path) as image:  # 16 bits are as Pillow has them
        assert (read_image(path) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_tiff_colours_of_16_bits_have_all_their_bits(tmp_path, order, deflate):
    path = save_tiff16(COLOURS[:, :, :3], tmp_path / "a.tif", order, deflate)
    assert (read_values(path) == COLOURS[:, :, :3]).all()


@pytest.mark.parametrize("kind", ["P6", "P3"])
def test_a_ppm_in_colour_has_all_its_bits_as_a_grey_one_has(tmp_path, kind):
    values = (np.arange(4 * 5 * 3).reshape(4, 5, 3) * 60).astype(np.uint16)  # 12 bits
    path = tmp_path / "a.ppm"

    def write(white):
        body = " ".join(map(str, values.reshape(-1))).encode() if kind == "P3" else values.astype(">u2").tobytes()
        path.write_bytes(f"{kind}\n5 4\n{white}\n".encode() + body)

    write(65535)
    assert read_header(path).is_deep and (read_values(path) == values).all()
    assert read_image(path, value_range=TWELVE_BITS).tolist() == (values >> 4).tolist()
    assert read_image(path).tolist() == (values >> 8).tolist()
    write(4000)  # the file says what is white
    assert (read_values(path) == np.rint(values * (65535 / 4000))).all()
    path.write_bytes(b"P6\n2 1\n255\n" + bytes(range(6)))
    assert not read_header(path).is_deep and read_image(path).reshape(-1).tolist() == list(range(6))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_pages_and_frames_after_the_first_are_seen_and_previews_are_not(tmp_path, kind):
    first, second = (Image.fromarray(level + np.zeros((8, 9, 3), np.uint8)) for level in (0, 200))
    first.save(tmp_path / "one", "JPEG" if kind == "MPO" else kind)
    first.save(tmp_path / "two", kind, save_all=True, append_images=[second])
    assert not read_header(tmp_path / "one").has_more
    assert read_header(tmp_path / "two").has_more == (kind != "MPO")  # a phone's second picture is a preview
    assert read_image(tmp_path / "two").max() < 10
    if kind == "TIFF":
        second.encoderinfo = {"tiffinfo": {254: 1}}  # a smaller copy, as in pyramids
        first.save(tmp_path / "pyramid", kind, save_all=True, append_images=[second])
        data = (tmp_path / "two").read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) // 2 + 50])
        assert not read_header(tmp_path / "pyramid").has_more and not read_header(tmp_path / "cut").has_more


def test_deep_colours_are_turned_by_exif_as_others_are(tmp_path):
    for orientation in range(1, 9):
        exif = with_orientation(orientation)
        deep = save_png16(COLOURS[:, :, :3], tmp_path / "deep.png", exif)
        flat = save(Image.fromarray((COLOURS[:, :, :3] >> 4).astype(np.uint8)), tmp_path / "flat.png", exif=exif)
        assert (read_image(deep, value_range=TWELVE_BITS) == read_image(flat)).all()


def test_a_range_changes_nothing_of_pictures_with_8_bits(tmp_path):
    image = Image.fromarray(np.repeat(RAMP[:, :, None], 3, axis=2))
    for mode, name in (("RGB", "a.png"), ("L", "b.png"), ("P", "c.gif"), ("RGBA", "d.png"), ("CMYK", "e.jpg")):
        path = save(image.convert(mode), tmp_path / name)
        assert not read_header(path).is_deep and read_values(path) is None
        assert (read_image(path, value_range=TWELVE_BITS) == read_image(path)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.fromarray(np.repeat(RAMP[:, :, None], 3, axis=2))
    path = save(image, tmp_path / "a.png", exif=with_orientation(orientation))
    header, pixels = read_header(path), read_image(path)
    assert header.orientation == orientation
    assert pixels.shape[:2] == header.shown_size
    turned = {3: RAMP[::-1, ::-1], 6: np.rot90(RAMP, -1), 8: np.rot90(RAMP)}
    if orientation in turned:
        assert (pixels[:, :, 0] == turned[orientation]).all()


TIFFS = {"plain": {}, "packed": {"compression": "tiff_lzw"}, "deep": {}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_is_turned_as_a_png_is(tmp_path, kind, orientation):
    """Pillow turns TIFF files, and no others, while it decodes them, and gives their size as shown."""
    grey = (RAMP.astype(np.uint16) * 257) if kind == "deep" else RAMP
    exif = with_orientation(orientation)
    tiff = save(Image.fromarray(grey), tmp_path / "a.tif", exif=exif, **TIFFS[kind])
    png = save(Image.fromarray(grey), tmp_path / "a.png", exif=exif)
    assert read_header(tiff) == read_header(png)
    assert (read_image(tiff) == read_image(png)).all()
    for size in ((48, 64), (64, 48)) if orientation > 4 else ((48, 64),):
        assert (read_image(tiff, size, apply_exif=False) == read_image(png, size, apply_exif=False)).all()


def test_coco_files_take_the_orientation_that_fits_their_size(tmp_path):
    image = Image.fromarray(np.repeat(RAMP[:, :, None], 3, axis=2))
    turned = save(image, tmp_path / "quarter.png", exif=with_orientation(6))
    assert read_image(turned, (48, 64), apply_exif=False).shape[:2] == (48, 64)
    assert read_image(turned, (64, 48), apply_exif=False).shape[:2] == (64, 48)
    upside_down = save(image, tmp_path / "half.png", exif=with_orientation(3))
    assert (read_image(upside_down, (48, 64), apply_exif=False)[:, :, 0] == RAMP).all()
    assert (read_image(upside_down, (48, 64), apply_exif=True)[:, :, 0] == RAMP[::-1, ::-1]).all()


def test_another_size_than_annotated_is_refused(tmp_path):
    path = save(Image.fromarray(RAMP), tmp_path / "a.png")
    with pytest.raises(BadImageError, match=r"a\.png.*64 x 48.*annotations say 100 x 90"):
        read_image(path, (90, 100))


def test_broken_files_are_refused_by_name(tmp_path):
    good = save(Image.fromarray(np.repeat(RAMP[:, :, None], 3, axis=2)), tmp_path / "good.jpg").read_bytes()
    cases = {
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "cut.jpg": good[: len(good) // 2],
        "header.jpg": good[:20],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImageError, match=name.replace(".", r"\.")):
            read_image(tmp_path / name)
    with pytest.raises(BadImageError, match=r"missing\.jpg"):
        read_header(tmp_path / "missing.jpg")


def test_image_bombs_are_refused_before_decoding(tmp_path):
    path = save(Image.new("1", (12000, 12000)), tmp_path / "bomb.png")
    for read in (read_header, read_image):
        with pytest.raises(BadImageError, match=r"bomb\.png.*12000 x 12000"):
            read(path)


def test_one_pixel_and_very_long_images_are_read(tmp_path):
    for size in ((1, 1), (500, 5)):
        path = save(Image.new("RGB", size, (1, 2, 3)), tmp_path / "a.png")
        assert read_image(path).shape == (size[1], size[0], 3)


def test_files_that_stand_in_both_splits_are_found(tmp_path):
    for folder, names in (("train", "abc"), ("val", "xyz")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(f"content of {folder}/{name}".encode())
    (tmp_path / "val" / "y").write_bytes((tmp_path / "train" / "b").read_bytes())
    (tmp_path / "val" / "z").write_bytes((tmp_path / "train" / "c").read_bytes()[::-1])  # same size, other bytes
    train, val = ([tmp_path / folder / name for name in names] for folder, names in (("train", "abc"), ("val", "xyz")))
    assert find_shared_files(train, val) == [(tmp_path / "train" / "b", tmp_path / "val" / "y")]
    assert find_shared_files([], val) == []


def test_an_error_keeps_path_and_problem_apart_also_between_processes(tmp_path):
    path = tmp_path / "photos: new" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"no")
    with pytest.raises(BadImageError) as caught:
        read_image(path)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.path == path and error.problem.startswith("cannot decode the image: ")
        assert str(error) == f"{path}: {error.problem}"
    # torch makes the error of a loading process anew from its traceback.
    assert str(BadImageError("Traceback ...\nimages.BadImageError: a.png: no image")).endswith("a.png: no image")
