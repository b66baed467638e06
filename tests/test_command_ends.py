"""Every command ends well: by a signal, a closed pipe, a full disk, a folder that cannot be read."""

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import check_dataset
import compare
import export
import predict
import score
import sigmas
import train
import utils
from annotations.arrays import cached_annotations
from coco_utils import read_coco
from drawing.pictures import save_picture
from evaluation.results_files import PredictionWriter
from files import write_aside, write_torch_file
from helpers.coco_cases import random_case, to_detections
from helpers.drawn import ROOT
from helpers.outcomes import drawn_outcomes
from helpers.shaken import shaken_checkpoint
from loading import trainable
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from process import waiting
from report.eval_files import _folder_aside
from runtime import step_guard
from runtime.trackers import JsonlTracker
from utils import log_to_file, run_command, setup_logging

pytestmark = pytest.mark.usefixtures("restore_process")

SSDLITE = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shaken_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pth", SSDLITE, score_threshold=0.3)


@pytest.fixture
def given(tmp_path, drawn_coco, checkpoint):
    """Return {command: (module, flags that are right)}; results go into ``tmp_path / "out"``."""
    truth, results = random_case(1, "keypoints")
    for name, content in (("truth.json", truth), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "run" / "best").mkdir(parents=True)
    drawn_outcomes(np.random.default_rng(0), num_images=8).save(tmp_path / "run" / "best" / "matches_bbox.npz")
    (tmp_path / "photos").mkdir()
    (tmp_path / "out").mkdir()
    for n in range(3):
        pixels = torch.from_numpy(ShapeDrawer("val").read(shapes_annotations("val", 3), n)).permute(2, 0, 1)
        save_picture(pixels, tmp_path / "photos" / f"{n}.png")
    out = tmp_path / "out"
    files = ["--ground-truth", tmp_path / "truth.json", "--predictions", tmp_path / "results.json"]
    data = ["--data-path", drawn_coco, "--model", SSDLITE, "--workers", "0"]
    commands = {
        "score": (score, [*files, "--json", out / "score.json"]),
        "compare": (compare, [tmp_path / "run", tmp_path / "run", "--resamples", "9", "--json", out / "compare.json"]),
        "check_dataset": (check_dataset, [*data, "--view", "2", "--output-dir", out]),
        "sigmas": (sigmas, ["curve", *files]),
        "export": (export, ["--checkpoint", checkpoint, "--format", "torchscript", "--output", out / "m.pt"]),
        "predict": (predict, ["--checkpoint", checkpoint, tmp_path / "photos", "--output-dir", out / "found", "--workers", "0"]),
        "train": (train, [*data, "--dry-run", "--output-dir", out / "run", "--device", "cpu", "--batch-size", "2"]),
    }  # fmt: skip
    return {name: (module, list(map(str, flags))) for name, (module, flags) in commands.items()}


COMMANDS = ("score", "compare", "check_dataset", "sigmas", "export", "predict")


@contextlib.contextmanager
def stdout_into(monkeypatch, descriptor):
    with os.fdopen(descriptor, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


@contextlib.contextmanager
def no_file_above(num_bytes):
    """A limit of the file size stands in for a disk that is full in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_ends_a_command_without_a_word(given, name, monkeypatch, capfd, tmp_path):
    module, flags = given[name]
    read_end, write_end = os.pipe()
    os.close(read_end)
    with stdout_into(monkeypatch, write_end):
        assert module.run(flags) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""
    assert not [path for path in files_in(tmp_path / "out") if path.endswith(".tmp")]
    if name in ("score", "compare"):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["bbox" if name == "compare" else "keypoints"]
    if name == "predict":
        assert len(json.loads((tmp_path / "out" / "found" / "images.json").read_text())["images"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_a_full_disk_does_not_take_is_one_line(given, name, monkeypatch, capfd):
    module, flags = given[name]
    with stdout_into(monkeypatch, os.open("/dev/full", os.O_WRONLY)):
        assert module.run(flags) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: error: No space left on device; make room")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_a_command_with_one_line_and_its_code(given, name, number, monkeypatch, capfd, tmp_path):
    """It comes where a command writes, or prints where it writes nothing: nothing half-written stays."""
    module, flags = given[name]
    moments = {
        "sigmas": (sigmas, "read_coco"),
        "predict": (predict, "load_trained_model"),
        "export": (export, "check_file"),
    }
    owner, attribute = moments.get(name, (module, "write_sheets" if name == "check_dataset" else "write_aside"))

    def signalled(*args, **kwargs):
        signal.raise_signal(number)

    monkeypatch.setattr(owner, attribute, signalled)
    assert module.run(flags) == 128 + number
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{name}.py: stopped by {signal.Signals(number).name}")
    assert files_in(tmp_path / "out") == [] and not (tmp_path / "out" / "found").exists()


FULL = {"score": 900, "compare": 900, "check_dataset": 900, "export": 40_000, "predict": 900}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(given, name, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    module, flags = given[name]
    with no_file_above(FULL[name]):
        assert module.run(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{name}.py: error: ") and "File too large" in error and str(tmp_path / "out") in error
    assert files_in(tmp_path / "out") == []


def test_pictures_that_do_not_fit_cost_no_results(given, capsys, tmp_path):
    """What is found before the disk is full is whole, and no entry names a picture that is not there."""
    module, flags = given["predict"]
    with no_file_above(9000):
        assert module.run([*flags, "--batch-size", "1", "--score-threshold", "0.45"]) == 1
    found = tmp_path / "out" / "found"
    assert "File too large; " in capsys.readouterr().err
    content = json.loads((found / "images.json").read_text())
    assert content["images"] and content["not_reached"] and json.loads((found / "predictions.json").read_text())
    for key in ("overlay", "picture"):
        named = sorted(Path(entry[key]).name for entry in content["images"] if key in entry)
        there = files_in(found / f"{key}s")
        assert set(named) <= set(there) and not [name for name in there if name.endswith(".tmp")]
        assert key == "picture" or len(named) == len(there)


def test_a_page_that_does_not_fit_costs_no_results(given, capsys, tmp_path):
    module, flags = given["predict"]
    with no_file_above(20_000):  # less than the page's script and style, more than any other file
        assert module.run([*flags, "--score-threshold", "0.64"]) == 1
    found = tmp_path / "out" / "found"
    assert f"{found / 'index.html'}: File too large; " in capsys.readouterr().err
    content = json.loads((found / "images.json").read_text())
    assert [set(entry) >= {"overlay", "picture"} for entry in content["images"]] == [True] * 3
    assert json.loads((found / "predictions.json").read_text())
    assert [name for name in files_in(found) if "/" not in name] == [
        "images.json",
        "predictions.csv",
        "predictions.json",
    ]


def test_a_second_command_of_the_process_hears_signals_as_the_first_did(capfd):
    for _ in range(2):
        assert run_command("tool.py", lambda args: signal.raise_signal(signal.SIGTERM), None) == 143
    assert capfd.readouterr().err == "tool.py: stopped by SIGTERM\n" * 2


def test_the_system_s_errors_name_the_file_and_what_to_do():
    error = PermissionError(13, "Permission denied", "photos")
    assert utils.describe_error(error) == "photos: Permission denied; its owner or its rights forbid it"


def test_a_folder_that_cannot_be_read_is_one_line_of_train(given, capfd, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "train2017")

    monkeypatch.setattr(train, "load_data", refuse)  # root may read everything
    assert train.run_as_command(given["train"][1]) == 1
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith("error: train2017: Permission denied; its owner or its rights forbid it")
    )


def test_a_training_whose_log_nobody_reads_any_more_stops_as_for_a_signal(given, monkeypatch, capfd):
    read_end, write_end = os.pipe()
    os.close(read_end)
    seen = []
    monkeypatch.setattr(train, "main", lambda args, distributed, stop, trackers: seen.append(stop.signal_name) or 0)
    with stdout_into(monkeypatch, write_end):
        assert train.run_as_command(given["train"][1]) == 0
    assert seen == ["SIGPIPE"] and capfd.readouterr().err == ""


def test_predictions_that_do_not_fit_do_not_end_an_evaluation(tmp_path, caplog):
    truth, results = random_case(2, "bbox")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    writer = PredictionWriter(tmp_path / "out", ["bbox"], sizes)
    with no_file_above(500):
        for _ in range(40):
            for image_id in sizes:
                writer.add([image_id], [to_detections(results, image_id, "bbox")])
        writer.close()
    assert caplog.text.count("no predictions are written: ") == 1 and files_in(tmp_path / "out") == []


def test_a_line_of_metrics_that_does_not_fit_does_not_end_a_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # without those of commands run before
    tracker = JsonlTracker(tmp_path)
    tracker.on_epoch(0, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with no_file_above(len(before)):
        tracker.on_epoch(1, {"loss": 1.0})
    assert "no line for epoch 1: " in caplog.text and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_log_file_that_is_full_is_one_line(capsys, tmp_path):
    setup_logging(is_main=True)
    log_to_file(tmp_path / "log.txt")
    with no_file_above(0):
        for n in range(3):
            utils.logger.info("line %d", n)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["line 0", "line 1", "line 2"]
    assert len(captured.err.splitlines()) == 1 and "log.txt: File too large; lines are missing" in captured.err


@pytest.mark.parametrize(
    ("rank", "local_rank", "heard"),
    [
        (0, 0, ["a class without objects", "waiting", "the update is skipped", "over"]),
        (
            8,
            0,
            ["[rank 8] a class without objects", "[rank 8] waiting", "[rank 8] the update is skipped", "[rank 8] over"],
        ),
        (9, 1, ["[rank 9] waiting", "[rank 9] the update is skipped", "[rank 9] over"]),
    ],
)
def test_what_is_the_same_in_all_processes_is_said_once_a_machine(rank, local_rank, heard, monkeypatch, capsys):
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 16}.items():
        monkeypatch.setenv(name, str(value))
    setup_logging(is_main=rank == 0)
    trainable.logger.warning("a class without objects")
    waiting.logger.warning("waiting")
    step_guard.logger.warning("the update is skipped")
    trainable.logger.error("over")
    assert capsys.readouterr().out.splitlines() == heard


def test_a_cache_that_does_not_fit_costs_no_start(drawn_coco, tmp_path, caplog):
    source = next((drawn_coco / "annotations").glob("instances_val*.json"))
    with no_file_above(700):
        found = cached_annotations(source, lambda: read_coco(source), tmp_path / "cache")
    assert found.cache_file is None and len(found) and "no annotation cache in" in caplog.text
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_error_in_a_file_names_the_file_and_not_its_temporary_name(tmp_path):
    target = tmp_path / "a.pt"
    with (
        pytest.raises(OSError) as caught, no_file_above(100), write_aside(target) as path, path.open("wb") as file,
    ):  # fmt: skip
        write_torch_file({"a": torch.zeros(1000)}, file)
    assert caught.value.filename == str(tmp_path / "a.pt") and files_in(tmp_path) == []


def test_a_folder_of_an_evaluation_that_fails_is_removed(tmp_path):
    with pytest.raises(KeyError), _folder_aside(tmp_path / "eval") as folder:
        (folder / "half").write_text("")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, None])
def test_ctrl_c_is_never_a_traceback(given, seconds):
    """While torch is loading the signal itself ends the process; later it is one line."""
    flags = given["check_dataset"][1]
    process = subprocess.Popen(
        [sys.executable, "check_dataset.py", *flags, "--view", "300"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    if seconds is None:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    else:
        threading.Timer(seconds, process.send_signal, [signal.SIGINT]).start()
    _, error = process.communicate(timeout=60)
    assert process.returncode in ((130,) if seconds is None else (130, -signal.SIGINT))
    assert error.splitlines() in ([], ["check_dataset.py: stopped by SIGINT"])
