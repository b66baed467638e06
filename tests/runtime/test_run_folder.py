"""The folder of a run."""

from pathlib import Path

from runtime.run_folder import choose_output_dir


def test_tasks_of_a_slurm_array_that_start_in_the_same_second_have_folders_of_their_own(monkeypatch):
    folders = set()
    for job in ("4", "5", "6"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        folders.add(choose_output_dir(None, dataset="coco", model="fcos_resnet50_fpn", root=Path("coco")))
    assert len(folders) == 3 and all(folder.match("runs/coco-fcos_resnet50_fpn-*-job?") for folder in folders)
