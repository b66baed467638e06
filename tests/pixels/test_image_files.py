"""Which files are pictures: one rule, from the installed Pillow, and nothing left out without a reason."""

import os

import numpy as np
import pytest
from PIL import Image

from pixels.image_files import is_picture_name, list_folder, result_folder, spelling, unreadable_format
from pixels.images import BadImageError, read_header


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_names_are_judged_by_the_installed_pillow_whatever_their_case():
    Image.init()
    for name in ("a.jpg", "a.JFIF", "a.jp2", "a.Webp", "x/a.tga"):
        assert is_picture_name(name) and unreadable_format(name) is None, name
    assert is_picture_name("a.heic") == is_picture_name("a.NEF") is True
    for name in ("a.heic", "a.NEF"):
        assert "the installed Pillow does not open" in unreadable_format(name)
    for name in ("a.txt", "a", "jpg", "a.mpg", "a.h5", "a.json", "a.pdf"):  # mpg and h5 are headers alone to Pillow
        assert not is_picture_name(name) and unreadable_format(name) is None, name


def test_a_program_that_draws_a_picture_is_not_run(tmp_path):
    """Pillow has Ghostscript run it, and without one fails in the middle of a training."""
    assert is_picture_name("a.EPS") and "does not open .EPS files; save it as JPEG or PNG" in unreadable_format("a.EPS")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="header: EPS is a program that draws a picture, and is not run; save it"):
        read_header(tmp_path / "a.png")


def test_a_format_that_a_plugin_adds_is_opened(monkeypatch):
    from pixels.image_files import readable_suffixes

    readable_suffixes.cache_clear()
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    try:
        assert unreadable_format("a.heic") is None
    finally:
        readable_suffixes.cache_clear()


def test_folders_are_listed_to_any_depth_with_a_reason_for_what_is_left_out(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in (
        "b.jpg",
        "a/c/d.png",
        ".hidden.jpg",
        ".thumbs/x.jpg",
        "a/runs/overlays/1.jpg",
        "a/runs/predictions.json",
    ):
        touch(root / name)
    touch(elsewhere / "deep" / "e.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jpg")
    content = list_folder(root)
    assert content.files == ["a/c/d.png", "b.jpg", "linked/deep/e.jpg"] and content.links == {"linked/deep/e.jpg"}
    assert content.left_out == [
        ("a/runs", "results of predict.py"),
        ("a/up", "a link to a folder above it"),
        ("device.jpg", "no regular file"),
        ("gone.jpg", "a link to nothing"),
        ("pipe.jpg", "no regular file"),
    ]
    assert list_folder(root / "a" / "runs").files == ["overlays/1.jpg", "predictions.json"]  # named outright
    assert list_folder(tmp_path / "none").left_out == [(".", "cannot be listed (No such file or directory)")]


def test_result_folders_are_known_by_what_their_command_writes():
    assert result_folder(["overlays", "predictions.json.tmp"]) == "predict.py"  # of a run that was killed
    assert result_folder(["args.json", "weights", "eval"]) == "train.py"
    assert result_folder(["annotated.jpg", "augmented_hflip.jpg"]) == "check_dataset.py"
    for names in ([], ["overlays", "a.jpg"], ["predictions.json", "a.jpg"], ["weights"], ["annotated.jpg", "b.jpg"]):
        assert result_folder(names) is None, names


def test_spellings_of_one_name_are_one():
    assert spelling("a\\U\u0308bung.jpg") == spelling("a/\u00dcbung.jpg") == "a/\u00dcbung.jpg"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "the installed Pillow does not open .heic files"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jpg", b"<!DOCTYPE html><html></html>", "a web page"),
        ("a.jpg", b"", "the file is empty"),
        ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1", r"header: a picture \(HEIC\)"),
        ("a.png", b"\x1f\x8b\x08\0\0", "packed with gzip; unpack it first"),
        ("a.png", b"%PDF-1.4", "a PDF document"),
        ("a.png", b"\x01\x02\x03\xfe\xff", "in no format that the installed Pillow reads"),
        ("a.jpg", b"pool/b.png", "the text 'pool/b.png' of a link"),
    ],
)
def test_a_file_that_is_no_picture_is_called_what_it_is(tmp_path, name, data, reason):
    (tmp_path / "pool").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "pool" / "b.png")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImageError, match=reason):
        read_header(tmp_path / name)
