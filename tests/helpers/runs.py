"""The suite as users run it: a script in processes of its own, or train.py in this one."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

import train
from helpers.drawn import ROOT
from helpers.thin import use_thin_models
from runtime.signals import StopRequest
from utils import Distributed


def run_train(*flags, processes=1, timeout=600, env=None, script="train.py", check=True):
    """Run a script of the suite in processes of its own; returns the finished process with its output as text."""
    command = [sys.executable, script]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, script]
    done = subprocess.run(
        [*command, *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} {flags} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


QUICK = ["--device", "cpu", "--workers", "0", "--epochs", "1", "--warmup-iters", "0", "--lr", "0.0001"]


def run(*flags):
    return train.run_as_command([str(flag) for flag in flags])


def lines(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def train_once(root, output_dir, *flags, model="ssdlite320_mobilenet_v3_large"):
    assert run(*QUICK, "--data-path", root, "--model", model, "--output-dir", output_dir, *flags) == 0


def train_on_rank(rank, world_size, flags, is_thin=False):
    """Do what the flags say as one of the processes of `run_on_ranks`; returns the exit code."""
    multiprocessing.set_start_method("fork", force=True)  # for loading processes, as in a command of its own
    parser = train.get_args_parser()
    args = parser.parse_args([str(flag) for flag in flags])
    train.check_args(parser, args)
    with pytest.MonkeyPatch.context() as patch:
        if is_thin:
            use_thin_models(patch)
        return train.main(args, Distributed(rank, rank, world_size, torch.device("cpu")), StopRequest())
