"""The script for twelve minutes on a GPU, tried on the CPU: every step runs, and it can be cut and continued anywhere."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.drawn import ROOT, draw_coco

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that lies there

import on_gpu

MODEL = "ssdlite320_mobilenet_v3_large"


def try_on_cpu(folder, *flags):
    """Run the script on drawn images; returns the newest line of each figure, and the tables."""
    if not (folder / "coco").exists():
        draw_coco(folder / "coco")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "on_gpu.py",
        "--data-path",
        folder / "coco",
        "--device",
        "cpu",
        "--tiny",
    ]
    command += ["--output", folder / "out", "--workers", "1", "--models", MODEL, *flags]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "out" / "figures.jsonl").read_text().splitlines()]
    return {(line["step"], line["name"]): line for line in lines}, (folder / "out" / "figures.md").read_text()


@pytest.mark.slow
def test_a_machine_that_lacks_a_package_says_so_in_the_figures(tmp_path, monkeypatch):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "defusedxml.py").write_text("raise ImportError('no defusedxml here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lacking"))
    figures, _ = try_on_cpu(tmp_path, "--steps", "environment", "waits")
    assert "torch" in figures["environment", "machine"]["host"]
    assert figures["waits", ""]["ended"] == "not begun: no defusedxml here"


@pytest.mark.slow
def test_every_step_of_a_trial_writes_its_figures_and_what_is_done_is_not_done_again(tmp_path):
    steps = ["--steps", "environment", "slot_batches", "out_of_memory"]
    figures, tables = try_on_cpu(tmp_path, *steps)
    assert figures["environment", "machine"]["lacks"] == "nothing"
    assert (figures["slot_batches", "batches"]["compared"], figures["slot_batches", "batches"]["differ"]) == (5, 0)
    error = figures["out_of_memory", "error"]
    assert (error["code"], error["lines"]) == (1, 1) and "--batch-size" in error["text"]
    assert {figures[step, ""]["ended"] for step in steps[1:]} == {"in good order"}
    assert "| batches | 5 | 0 |" in tables
    assert try_on_cpu(tmp_path, *steps) == (figures, tables)


@pytest.mark.slow
def test_the_other_steps_run_on_a_cpu(tmp_path):
    tried = {"environment", "slot_batches", "out_of_memory"}
    others = [step.__name__ for step in on_gpu.STEPS if step.__name__ not in tried]
    figures, tables = try_on_cpu(tmp_path, "--steps", *others)
    assert not [line for line in figures.values() if "failed" in line]
    assert {name: figures[name, ""]["ended"] for name in others} == dict.fromkeys(others, "in good order")
    assert {line["code"] for (step, _), line in figures.items() if step == "dry_runs" and "code" in line} == {0}
    nan_batches = [line for (step, name), line in figures.items() if step == "nan_batches" and name]
    assert len(nan_batches) == 3
    assert all(line["bit_equal"] and line["moves_afterwards"] and line["finite_afterwards"] for line in nan_batches)
    assert figures["verified_resumes", MODEL]["equal"]
    assert (
        figures["waits", f"{MODEL}, batched step"]["waits"] < figures["waits", f"{MODEL}, torchvision's step"]["waits"]
    )
    assert figures["speeds", f"{MODEL}, suite"]["over_plain"] > 0
    group = [line for (step, name), line in figures.items() if step == "group_of_one" and name]
    assert [line["code"] for line in group] == [line["expected"] for line in group] == [3, 0]
    assert figures["average_precisions", "difference"]["within"]
    assert all(f"## {name}" in tables for name in others)


def fails_in_part(run):
    """Fail in one of two parts."""
    for name in ("a", "b"):
        if not run.figures.has(name):
            with run.figures.attempt(name):
                if name == "a" and not (run.args.output / "mended").exists():
                    raise ValueError("this is broken\nand this is why")
                run.figures.write(name, value=1)


def gpu_fails(run):
    """Fail in a way after which the process is of no use."""
    for name in ("a", "b"):
        if not run.figures.has(name):
            with run.figures.attempt(name):
                if name == "a":
                    raise RuntimeError("CUDA error: device-side assert triggered")
                run.figures.write(name, value=os.getpid())


def hangs(run):
    """Wait for ever, with a child that does too."""
    child = subprocess.Popen(["sleep", "1000"])
    run.figures.write("before", child=child.pid)
    child.wait()


def do(step, folder, started=1.0, limit=60):
    folder.mkdir(exist_ok=True)
    figures = on_gpu.Figures(folder / "figures.jsonl", step.__name__, started)
    on_gpu.run_step(step, argparse.Namespace(device="cpu", output=folder), figures, limit)
    return figures.lines()


def test_what_fails_is_noted_and_tried_again_by_the_next_run(tmp_path):
    lines = do(fails_in_part, tmp_path)
    assert lines["a"]["failed"] == "ValueError: this is broken" and lines["b"]["value"] == 1
    written = (tmp_path / "figures.jsonl").read_text()
    (tmp_path / "mended").touch()
    lines = do(fails_in_part, tmp_path, started=2.0)
    assert lines["a"]["value"] == 1 and "failed" not in lines["a"]
    assert (tmp_path / "figures.jsonl").read_text().removeprefix(written).count('"name": "b"') == 0
    assert "and this is why" in (tmp_path / "fails_in_part.log").read_text()


def test_a_line_that_was_cut_in_two_is_written_again(tmp_path):
    do(fails_in_part, tmp_path)
    path = tmp_path / "figures.jsonl"
    path.write_text(path.read_text()[:-40])
    assert "" not in on_gpu.Figures(path, "fails_in_part", 2.0).lines()
    (tmp_path / "mended").touch()
    lines = do(fails_in_part, tmp_path, started=2.0)
    assert lines[""]["ended"] == "in good order" and lines["a"]["value"] == lines["b"]["value"] == 1


def test_after_a_failure_of_the_gpu_the_rest_is_done_in_a_new_process(tmp_path):
    lines = do(gpu_fails, tmp_path)
    assert "device-side assert" in lines["a"]["failed"] and lines["b"]["value"] != os.getpid()
    assert lines[""]["ended"] == "in good order"


def test_a_step_that_takes_too_long_is_ended_with_its_children_and_its_figures_stay(tmp_path):
    started = time.monotonic()
    lines = do(hangs, tmp_path, limit=2)
    assert time.monotonic() - started < 30
    assert lines[""]["ended"] == "cut after 2 s"
    command = Path(f"/proc/{lines['before']['child']}/cmdline")
    assert not command.exists() or not command.read_text(), "the child is alive"
