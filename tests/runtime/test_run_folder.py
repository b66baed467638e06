"""The folder of a run."""

import datetime
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.run_folder import _start_of, choose_output_dir


def test_tasks_of_a_slurm_array_that_start_in_the_same_second_have_folders_of_their_own(monkeypatch):
    folders = set()
    for job in ("4", "5", "6"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        folders.add(choose_output_dir(None, dataset="coco", model="fcos_resnet50_fpn", root=Path("coco")))
    assert len(folders) == 3 and all(folder.match("runs/coco-fcos_resnet50_fpn-*-job?") for folder in folders)


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_the_folder_s_time_is_that_of_torchrun_s_start_also_where_there_is_no_proc(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    with subprocess.Popen(["sleep", "60"]) as process:
        found = {_start_of(process.pid, folder) for folder in (Path("/proc"), tmp_path)}
        process.kill()
    now = datetime.datetime.now()
    assert all(abs(now - started) < datetime.timedelta(minutes=1) for started in found)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    names = {choose_output_dir(None, dataset="coco", model="m", root=Path("coco")).name for _ in range(2)}
    assert names == {f"coco-m-{_start_of(os.getppid()):%Y%m%d-%H%M%S}"}
