"""Files are written whole or not at all, whatever happens in between, and told apart by their content."""

import bz2
import io
import signal
import subprocess
import sys

import pytest
from PIL import Image

from files import describe_content, write_aside
from helpers.drawn import ROOT


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path, durable):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with write_aside(path, durable=durable) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_between_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_aside(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_between_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from files import write_aside
with write_aside(Path({str(path)!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (leftover,) = set(tmp_path.iterdir()) - {path}
    assert leftover.suffix == ".tmp"  # what folders of checkpoints sweep at the next start


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "file.txt"
    with write_aside(path) as first, write_aside(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the block that ends last
    assert list(tmp_path.iterdir()) == [path]


TABLE = "image_id,größe\n1,2\n"


def picture(kind):
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, kind)
    return file.getvalue()


CONTENTS = {
    "picture": (picture("BMP"), "a picture (BMP)"),
    "animation": (picture("GIF"), "a picture (GIF)"),
    "packed": (bz2.compress(b"text"), "packed with bzip2; unpack it first"),
    "table of indices": (f"BMI,{TABLE}".encode(), "a text file"),
    "table that begins as an archive": (f"PK,{TABLE}".encode(), "a text file"),
    "table that begins as a packed file": (f"BZh,{TABLE}".encode(), "a text file"),
    "with a byte order mark": ("hello".encode("utf-8-sig"), "a text file"),
    "json with a byte order mark": ("{}".encode("utf-8-sig"), "JSON text, as annotation files are"),
    "other text": ("größe".encode("latin-1"), None),
    **{f"cut in a letter {n}": ("a" * n + "ö" * 600 + "\n", "a text file") for n in (0, 1)},
}


@pytest.mark.parametrize(("content", "expected"), CONTENTS.values(), ids=CONTENTS)
def test_a_file_is_known_by_its_content(content, expected, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert describe_content(path) == expected
