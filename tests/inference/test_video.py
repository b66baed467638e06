"""Videos: frames upright and at their times, an mp4 that plays, memory that does not grow, and files that are no videos."""

import csv
import json
import os
import re
import resource
import shlex
import shutil
import struct
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from helpers.drawn import ROOT
from helpers.shaken import shaken_checkpoint
from inference import video
from inference.detector import Detector
from inference.video import Frame, VideoError, VideoReader, VideoWriter
from inference.video_results import _batches
from loading.shapes_dataset import ShapeDrawer, shapes_annotations

av = pytest.importorskip("av", reason="needs PyAV: pip install av")

SSDLITE = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shaken_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.pth", SSDLITE, score_threshold=0.3)


def drawn_frames(count, height=120, width=160):
    """Return drawn pictures, cut to one size."""
    annotations = shapes_annotations("val", 8)
    pictures = [ShapeDrawer("val").read(annotations, n) for n in range(8)]
    pictures = [picture for picture in pictures if picture.shape[0] >= height and picture.shape[1] >= width]
    return [pictures[n % len(pictures)][:height, :width] for n in range(count)]


def write_clip(path, times, height=120, width=160, rate=25):
    with VideoWriter(path, Fraction(rate)) as writer:
        for time, pixels in zip(times, drawn_frames(len(times), height, width)):
            writer.add(pixels, time)
    return path


def read_clip(path, every=1):
    with VideoReader(path) as reader:
        return list(reader.frames(every))


def run(*flags):
    return predict.run([*map(str, flags), "--device", "cpu", "--workers", "0"])


def read(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((folder / "images.json").read_text()), json.loads((folder / "predictions.json").read_text()), rows


UNEVEN = [0, 0.04, 0.1, 0.5, 0.52, 1.7, 1.74]


def test_frames_keep_their_times_and_nearly_their_pixels(tmp_path):
    frames = read_clip(write_clip(tmp_path / "a.mp4", UNEVEN))
    assert [frame.number for frame in frames] == list(range(7))
    assert np.allclose([frame.seconds for frame in frames], UNEVEN, atol=1e-4)
    for frame, drawn in zip(frames, drawn_frames(7)):
        assert frame.pixels.shape == drawn.shape
        assert np.abs(frame.pixels.astype(int) - drawn).mean() < 6


def test_every_third_frame_is_taken_with_its_number(tmp_path):
    frames = read_clip(write_clip(tmp_path / "a.mp4", UNEVEN), every=3)
    assert [(frame.number, round(frame.seconds, 3)) for frame in frames] == [(0, 0), (3, 0.5), (6, 1.74)]


def test_odd_sides_are_made_even_by_their_last_row_and_column(tmp_path):
    (frame,) = read_clip(write_clip(tmp_path / "a.mp4", [0], height=119, width=155))
    assert frame.pixels.shape == (120, 156, 3)
    assert np.abs(frame.pixels[:119, :155].astype(int) - drawn_frames(1, 119, 155)[0]).mean() < 6


def turn(path, angle):
    """Say in an mp4 that players are to turn it clockwise, as telephones do: the matrix of its track's header."""
    content = bytearray(path.read_bytes())
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(
        ">9i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_turned_videos_are_read_upright(tmp_path, angle):
    path = write_clip(tmp_path / "a.mp4", [0])
    (stored,) = read_clip(path)
    turn(path, angle)
    (shown,) = read_clip(path)
    assert np.array_equal(shown.pixels, np.rot90(stored.pixels, -angle // 90))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda clip: b"", "the file is empty"),
        (lambda clip: b"no video at all" * 100, "not readable as a video: Invalid data"),
        (lambda clip: clip[: len(clip) // 2], "not readable as a video"),
    ],
)
def test_what_is_no_video_has_a_reason(tmp_path, content, message):
    clip = write_clip(tmp_path / "a.mp4", UNEVEN).read_bytes()
    (tmp_path / "b.mp4").write_bytes(content(clip))
    with pytest.raises(VideoError, match=message):
        read_clip(tmp_path / "b.mp4")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream in it"):
        read_clip(tmp_path / "a.mp4")


def test_without_pyav_one_line_says_what_to_install(tmp_path, checkpoint, monkeypatch, capsys):
    path = write_clip(tmp_path / "a.mp4", [0])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert run("--checkpoint", checkpoint, path, "--output-dir", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "videos need PyAV" in line and "pip install av" in line
    assert not (tmp_path / "out").exists()


def test_predict_finds_in_frames_what_it_finds_in_pictures(tmp_path, checkpoint):
    clip = write_clip(tmp_path / "clip.mp4", UNEVEN)
    out = tmp_path / "out"
    assert run("--checkpoint", checkpoint, clip, "--every", 2, "--batch-size", 2, "--output-dir", out) == 0
    images, records, rows = read(out)
    frames = read_clip(clip, every=2)
    assert [(f["id"], f["frame"], f["height"], f["width"]) for f in images["frames"]] == [
        (1, 0, 120, 160), (2, 2, 120, 160), (3, 4, 120, 160), (4, 6, 120, 160)
    ]  # fmt: skip
    assert np.allclose([f["seconds"] for f in images["frames"]], [0, 0.1, 0.52, 1.74], atol=1e-4)
    expected = []
    for n, found in enumerate(
        Detector.load(checkpoint, device="cpu")([frame.pixels for frame in frames], batch_size=2)
    ):
        place = {"frame": frames[n].number, "seconds": round(frames[n].seconds, 6)}
        expected += [{**record, **place} for record in found.to_coco(n + 1)]
    assert len(records) > 4 and records == json.loads(json.dumps(expected))
    assert [(int(r["image_id"]), int(r["frame"]), float(r["seconds"])) for r in rows] == [
        (r["image_id"], r["frame"], r["seconds"]) for r in records
    ]
    (entry,) = images["videos"]
    assert entry["num_frames"] == 4 and images["images"] == [] and images["skipped"] == []
    drawn = read_clip(out / entry["overlay"])
    assert np.allclose([frame.seconds for frame in drawn], [0, 0.1, 0.52, 1.74], atol=1e-4)
    boxed = [frame.pixels.astype(int) for frame in drawn]
    assert all(np.abs(a - b.pixels).max() > 100 for a, b in zip(boxed, frames))  # boxes are drawn in


def test_videos_and_pictures_go_together_and_broken_ones_are_skipped(tmp_path, checkpoint, capsys):
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "a.png")
    clip = write_clip(tmp_path / "b.mp4", UNEVEN[:3])
    (tmp_path / "c.mp4").write_bytes(b"")
    flags = ["--checkpoint", checkpoint, tmp_path / "a.png", clip, tmp_path / "c.mp4", "--output-dir", tmp_path / "out"]
    assert run(*flags) == predict.EXIT_SOME_SKIPPED
    images, records, rows = read(tmp_path / "out")
    assert [image["id"] for image in images["images"]] == [1]
    assert [frame["id"] for frame in images["frames"]] == [2, 3, 4]
    assert images["skipped"] == [{"file_name": str(tmp_path / "c.mp4"), "reason": "the file is empty"}]
    assert {row["frame"] for row in rows if row["image_id"] == "1"} == {""} and {1, 2} <= {
        r["image_id"] for r in records
    }
    captured = capsys.readouterr()
    assert "c.mp4: the file is empty" in captured.err and "objects in 1 picture and 3 frames" in captured.out
    assert sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir())[-1].endswith("_b.mp4")


def test_a_video_that_breaks_off_keeps_what_came_before(tmp_path, checkpoint):
    """The frames' data end in the middle, while the index at the end is whole."""
    clip = write_clip(tmp_path / "a.mp4", [n / 25 for n in range(40)])
    content = bytearray(clip.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    for place in range((start + end) // 2, end):
        content[place] = 0
    clip.write_bytes(content)
    out = tmp_path / "out"
    assert run("--checkpoint", checkpoint, clip, "--output-dir", out) == predict.EXIT_SOME_SKIPPED
    images, _, _ = read(out)
    (entry,), (skipped,) = images["videos"], images["skipped"]
    assert skipped["reason"].startswith(f"broken after {entry['num_frames']} frames: not readable as a video")
    assert 5 < entry["num_frames"] < 40 and len(read_clip(out / entry["overlay"])) == entry["num_frames"]


def test_being_stopped_leaves_a_video_that_plays(tmp_path, checkpoint, monkeypatch):
    clip = write_clip(tmp_path / "a.mp4", [n / 25 for n in range(60)])
    add = VideoWriter.add

    def add_and_stop(self, pixels, seconds):
        add(self, pixels, seconds)
        if seconds > 0.3:
            os.kill(os.getpid(), 2)
            VideoWriter.add = add

    monkeypatch.setattr(VideoWriter, "add", add_and_stop)
    out = tmp_path / "out"
    assert run("--checkpoint", checkpoint, clip, "--batch-size", 2, "--output-dir", out) == 130
    images, records, _ = read(out)
    (entry,) = images["videos"]
    assert entry["stopped"] and 8 < entry["num_frames"] < 30
    assert len(read_clip(out / entry["overlay"])) == entry["num_frames"] == len(images["frames"])
    assert records and not list((out / "overlays").glob("*.tmp"))


def test_ids_of_pictures_do_not_go_with_videos(tmp_path, checkpoint, capsys):
    clip = write_clip(tmp_path / "a.mp4", [0])
    (tmp_path / "t.json").write_text('{"images": []}')
    assert run("--checkpoint", checkpoint, clip, "--ids-from", tmp_path / "t.json") == 1
    assert "--ids-from has ids of pictures, not of frames" in capsys.readouterr().err


def test_videos_in_a_folder_are_named_among_what_is_left_out(tmp_path, checkpoint, capsys):
    write_clip(tmp_path / "photos.mp4", [0]).rename(tmp_path / "b.mp4")
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "a.png")
    assert run("--checkpoint", checkpoint, tmp_path, "--output-dir", tmp_path / "out", "--no-overlays") == 0
    assert "a video: name it to have it predicted (1)" in capsys.readouterr().out


def test_no_more_than_three_batches_are_decoded_ahead(tmp_path, checkpoint, monkeypatch):
    """However long the video: frames that are decoded but not yet written are counted."""
    clip = write_clip(tmp_path / "a.mp4", [n / 25 for n in range(48)])
    lock, alive, most = threading.Lock(), [0], [0]

    class Counted(Frame):
        def __init__(self, *values):
            super().__init__(*values)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])

        def __del__(self):
            with lock:
                alive[0] -= 1

    monkeypatch.setattr(video, "Frame", Counted)
    assert run("--checkpoint", checkpoint, clip, "--batch-size", 2, "--output-dir", tmp_path / "out") == 0
    assert 2 < most[0] <= 10 and alive[0] == 0


def test_large_frames_come_in_smaller_batches():
    frames = [Frame(n, n / 25, np.zeros((4000, 3000, 3), np.uint8)) for n in range(5)]
    assert [len(batch) for batch in _batches(iter(frames), 4)] == [2, 2, 1]


@pytest.mark.parametrize("title", ["Videos", "Large pictures"])
def test_the_commands_in_the_docs_run(title, tmp_path, checkpoint, monkeypatch):
    page = (ROOT / "docs" / "predict_export.md").read_text()
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    commands = [shlex.split(line)[2:] for line in re.findall(r"^ {4}python predict\.py .*$", section, flags=re.M)]
    weights = tmp_path / "runs" / "first" / "weights"
    weights.mkdir(parents=True)
    shutil.copy(checkpoint, weights / "best.pth")
    for folder in ("photos", "aerial"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.tile(drawn_frames(1)[0], (8, 6, 1))).save(tmp_path / folder / "a.png")
    (tmp_path / "clips").mkdir()
    shutil.copy(write_clip(tmp_path / "clip.mp4", UNEVEN[:3]), tmp_path / "clips" / "a.mov")
    monkeypatch.chdir(tmp_path)
    assert commands
    for n, words in enumerate(commands):
        assert run(*words, "--output-dir", f"out{n}") == 0
        assert read(tmp_path / f"out{n}")[1]


def test_a_disk_that_is_full_from_the_start_is_an_error_and_no_crash():
    with pytest.raises(OSError, match="No space left"), VideoWriter(Path("/dev/full"), Fraction(25)) as writer:
        for pixels in drawn_frames(30):
            writer.add(pixels, 0)


def test_a_full_disk_ends_a_video_with_one_line(tmp_path, checkpoint, capsys):
    clip = tmp_path / "a.mp4"
    with VideoWriter(clip, Fraction(25)) as writer:
        for n in range(12):  # noise takes much room
            writer.add(np.random.default_rng(n).integers(0, 256, (120, 160, 3)).astype(np.uint8), n / 25)
    assert clip.stat().st_size > 120_000
    never = write_clip(tmp_path / "b.mp4", [0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        code = run(
            "--checkpoint", checkpoint, clip, never, "--score-threshold", "0.9", "--output-dir", tmp_path / "out"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("predict.py")]
    assert code == 1 and "File too large" in line and "found until then, are in" in line
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    (entry,) = images["videos"]
    assert entry["file_name"] == str(clip) and entry["num_frames"] == len(images["frames"]) > 0
    assert entry["stopped"] and "overlay" not in entry and images["skipped"] == []
    assert images["not_reached"] == [{"file_name": str(never)}]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".mp4")]
