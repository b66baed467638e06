"""A drawn COCO dataset in tmp_path, real photographs where they are at hand, and train.py as a user runs it."""

import logging
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers.drawn import ROOT, draw_coco
from helpers.shaken import limit_proposals
from process.log_lines import LogFile
from process.waiting import STOP_SIGNALS

torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("DETECTION_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, default=300, help="changed files for each fuzzed test")
    parser.addoption("--fuzz-seed", type=int, default=0, help="which files")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Keep every test's caches to itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_log_file_stays():
    """The log file of a run in this process ends with its test, whose folder goes."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LogFile)]:
        root.removeHandler(handler)
        handler.close()


def _real(name):
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"real images are not at hand ({folder}); set DETECTION_TEST_DATA")
    return folder


@pytest.fixture
def tiny_coco():
    return _real("tiny_coco")


@pytest.fixture
def glue_tubes(tmp_path):
    """A copy that runs may write into."""
    return Path(shutil.copytree(_real("glue_tubes"), tmp_path / "glue_tubes"))


@pytest.fixture
def drawn_coco(tmp_path):
    return draw_coco(tmp_path / "coco")


@pytest.fixture
def few_proposals(monkeypatch):
    """R-CNNs look at 50 places instead of 1000."""
    limit_proposals(monkeypatch)


@pytest.fixture
def restore_process(monkeypatch):
    """In-process runs change signal handlers and the root logger."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    root = logging.getLogger()
    saved = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = saved[0], saved[1]
    for number, handler in handlers.items():
        signal.signal(number, handler)
