"""Commands load what they need and no more, so that ``--help`` and small jobs start quickly."""

import json
import subprocess
import sys

import pytest

from helpers.drawn import ROOT

ROOMS_OF_TRAINING = {"engine", "training", "optimization", "runtime.step_guard"}
HEAVY = {"torchvision", "matplotlib", *ROOMS_OF_TRAINING}
NOT_LOADED = {"score": HEAVY, "compare": HEAVY, "sigmas": HEAVY, "predict": {*ROOMS_OF_TRAINING, "matplotlib"}}


def loaded_by(command):
    """Return the modules that a command has loaded when its flags are about to be read."""
    code = f"import json, sys, {command}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("command", NOT_LOADED)
def test_a_command_loads_nothing_that_it_does_not_need(command):
    assert not loaded_by(command) & NOT_LOADED[command]


@pytest.mark.slow
def test_the_look_at_what_is_loaded_can_fail():
    assert loaded_by("train") >= {"engine", "torchvision", "training"}
