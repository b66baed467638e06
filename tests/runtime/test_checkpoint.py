"""Checkpoints are whole or absent, hashed, and refused in one line when they are not what they should be."""

import argparse
import io
import itertools
import logging
import os
import resource
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch

from helpers.contents import content
from helpers.forked import Forked
from models.weights import WeightsSource, find_model_weights, read_weights
from runtime import checkpoint
from runtime.checkpoint import (
    BEST,
    NEWEST,
    PREVIOUS,
    CheckpointError,
    CheckpointFolder,
    find_newest,
    load_checkpoint,
    lock_folder,
    open_checkpoint,
    save_checkpoint,
)


def test_what_is_saved_is_loaded_and_its_hash_stands_beside(tmp_path):
    path = tmp_path / NEWEST
    save_checkpoint(content(3), path)
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.full((10,), 3.0))
    done = subprocess.run(["sha256sum", "-c", f"{NEWEST}.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, f"{NEWEST}.sha256"]


def test_a_save_never_writes_into_the_file_that_it_replaces(tmp_path):
    """The new one takes the name when it is whole: a kill at any instant finds one of the two."""
    path, second_name = tmp_path / NEWEST, tmp_path / "second_name"
    save_checkpoint(content(1), path)
    os.link(path, second_name)
    before = second_name.read_bytes()
    save_checkpoint(content(2), path)
    assert second_name.read_bytes() == before != path.read_bytes()
    assert path.stat().st_ino != second_name.stat().st_ino


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / NEWEST
    save_checkpoint(content(1, size=1000), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged: its SHA-256 is not the one in checkpoint\.pth\.sha256"):
        load_checkpoint(path)


def test_the_newest_readable_one_is_found(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    for epoch in range(3):
        folder.save(content(epoch + 1), epoch_done=epoch)
    folder.save(content(3, batches=4))
    path, found = find_newest(tmp_path)
    assert path.name == NEWEST and found["progress"]["batches"] == 4
    path.write_bytes(b"")
    path, found = find_newest(tmp_path)
    assert found["progress"] == {"epoch": 3, "batches": 0, "updates": 0}
    assert "looking for an older one" in caplog.text
    for name in (PREVIOUS, "model_2.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert find_newest(tmp_path)[0].name == "model_1.pth"
    assert find_newest(tmp_path / "empty") is None


def test_old_epochs_are_removed_with_their_hashes(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in range(12):
        folder.save(content(epoch), epoch_done=epoch, is_best=epoch == 1)
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == ["best.pth", NEWEST, PREVIOUS, "model_10.pth", "model_11.pth"]
    assert all((tmp_path / f"{name}.sha256").exists() for name in names)
    assert len(list(tmp_path.glob("*.sha256"))) == len(names)
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 1


@pytest.mark.parametrize(("keep", "left"), [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3])])
def test_so_many_epochs_are_kept_and_all_with_0(tmp_path, keep, left):
    """Also where someone has removed the hash file of one."""
    folder = CheckpointFolder(tmp_path, keep)
    assert not folder.last_save_failed
    for epoch in range(4):
        assert folder.save(content(epoch + 1), epoch_done=epoch)
        (tmp_path / "model_0.pth.sha256").unlink(missing_ok=True)
    assert sorted(tmp_path.glob("model_*.pth")) == [tmp_path / f"model_{epoch}.pth" for epoch in left]


def test_the_best_epoch_is_that_of_its_file(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    assert folder.best_epoch() is None
    for epoch in range(3):
        folder.save(content(epoch + 1), epoch_done=epoch, is_best=epoch == 1)
    assert folder.best_epoch() == CheckpointFolder(tmp_path).best_epoch() == 1
    (tmp_path / "best.pth").write_bytes(b"damaged")
    assert folder.best_epoch() is None and "best.pth: damaged" in caplog.text


@pytest.mark.parametrize("saved", [BEST, NEWEST, "model_1.pth"])
def test_no_kill_leaves_a_newest_whose_best_is_not_there(tmp_path, monkeypatch, saved):
    """Each of the three files is the last one that is written."""
    folder, write = CheckpointFolder(tmp_path), checkpoint._write_hash
    folder.save({**content(1), "best": {"epoch": 0}}, epoch_done=0, is_best=True)

    def write_and_die(path, digest):
        write(path, digest)
        if path.name == saved:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write_hash", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        folder.save({**content(2), "best": {"epoch": 1}}, epoch_done=1, is_best=True)
    newest, best = (load_checkpoint(tmp_path / name) for name in (NEWEST, BEST))
    assert best["best"]["epoch"] == 1 == folder.best_epoch()
    assert newest["best"]["epoch"] == (0 if saved == BEST else 1)
    assert (tmp_path / "model_1.pth").exists() == (saved == "model_1.pth")


@pytest.mark.parametrize("keep", [0, 3])
def test_a_run_that_went_back_leaves_nothing_newer_than_itself(tmp_path, keep, caplog):
    """Whatever of its own is damaged later, the epochs that it gave up do not come back; the best one's file stays."""
    folder = CheckpointFolder(tmp_path, keep)
    for epoch in range(6):
        folder.save(content(epoch + 1), epoch_done=epoch, is_best=epoch == 4)
    assert "gave up" not in caplog.text
    goal = tmp_path / "model_3.pth"
    back = CheckpointFolder(tmp_path, keep, resumed_from=goal)
    back.save(content(4, batches=1))
    assert "removed model_4.pth, model_5.pth, of epochs that it gave up" in caplog.text
    assert sorted(tmp_path.glob("model_*.pth"))[-1] == goal
    assert not list(tmp_path.glob("model_[45].pth*"))
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 5
    (tmp_path / NEWEST).write_bytes(b"damaged")
    assert find_newest(tmp_path)[1]["progress"] == {"epoch": 4, "batches": 0, "updates": 0}
    again = CheckpointFolder(tmp_path, keep, resumed_from=tmp_path / PREVIOUS)
    again.save(content(4, batches=2))
    (tmp_path / NEWEST).write_bytes(b"damaged")
    assert find_newest(tmp_path)[1]["progress"] == {"epoch": 4, "batches": 0, "updates": 0}


def killed_between_hash_and_rename(path):
    """Leave a folder as a SIGKILL does after the hash file was written and before the checkpoint was renamed."""
    hashes = path.with_name(path.name + ".sha256")
    hashes.write_text(hashes.read_text() + f"{'0' * 64}  {path.name}\n")


def test_a_second_kill_in_the_middle_of_a_rename_loses_nothing(tmp_path):
    CheckpointFolder(tmp_path).save(content(1))
    killed_between_hash_and_rename(tmp_path / NEWEST)
    assert load_checkpoint(tmp_path / NEWEST)["progress"]["epoch"] == 1
    CheckpointFolder(tmp_path).save(content(2))
    assert load_checkpoint(tmp_path / PREVIOUS)["progress"]["epoch"] == 1
    for epoch in (3, 4):
        killed_between_hash_and_rename(tmp_path / NEWEST)
        killed_between_hash_and_rename(tmp_path / NEWEST)
        CheckpointFolder(tmp_path).save(content(epoch))
        assert load_checkpoint(tmp_path / PREVIOUS)["progress"]["epoch"] == epoch - 1


def test_a_kill_between_rename_and_hash_loses_nothing(tmp_path):
    """The hash file then names the content before and this one; the copy that is kept must get the right one."""
    for epoch in (1, 2):
        CheckpointFolder(tmp_path).save(content(epoch))
    hashes = tmp_path / f"{NEWEST}.sha256"
    hashes.write_text(f"{'0' * 64}  {NEWEST}\n" + hashes.read_text())
    CheckpointFolder(tmp_path).save(content(3))
    assert load_checkpoint(tmp_path / PREVIOUS)["progress"]["epoch"] == 2
    assert len((tmp_path / f"{PREVIOUS}.sha256").read_text().splitlines()) == 1


def test_a_damaged_newest_does_not_push_out_the_good_one_before_it(tmp_path):
    for epoch in (1, 2):
        CheckpointFolder(tmp_path).save(content(epoch))
    (tmp_path / NEWEST).write_bytes(b"damaged")
    assert find_newest(tmp_path)[1]["progress"]["epoch"] == 1
    CheckpointFolder(tmp_path).save(content(3))
    assert load_checkpoint(tmp_path / PREVIOUS)["progress"]["epoch"] == 1


def test_a_lost_hash_file_does_not_end_the_saving(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.save(content(1))
    (tmp_path / f"{NEWEST}.sha256").unlink()
    assert CheckpointFolder(tmp_path).save(content(2))
    assert load_checkpoint(tmp_path / NEWEST)["progress"]["epoch"] == 2


def test_stale_temporary_files_are_swept(tmp_path):
    (tmp_path / "checkpoint.pth.123.tmp").write_bytes(b"half")
    CheckpointFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def save_on_a_full_disk(folder):
    logging.basicConfig(level="INFO")
    saver = CheckpointFolder(folder)
    assert saver.save(content(1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
    assert not saver.save(content(2, size=100000))
    assert saver.last_save_failed


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(tmp_path):
    """A file-size limit stands in for the full disk: the write fails in the middle of the file."""
    folder = tmp_path / "weights"
    process = Forked(tmp_path / "log", save_on_a_full_disk, folder)
    assert process.wait(120) == 0, process.output()
    assert load_checkpoint(folder / NEWEST)["progress"]["epoch"] == 1
    assert "cannot write checkpoint" in process.output() and "MB free" in process.output()
    assert not list(folder.glob("*.tmp"))


def zipped(*names):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return packed.getvalue()


# What is given for a checkpoint by mistake, and what the line must say of it.
FOREIGN = {
    "empty": (b"", "the file is empty"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
    "text": (b"hello", "a text file"),
    "json": (b'{"images": []}', "JSON text, as annotation files are"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), r"a picture \(PNG\)"),
    "zip": (
        zipped("weights/a.pth", "readme.txt"),
        r"a zip archive of 2 file\(s\), weights/a.pth, readme.txt; unpack it",
    ),
    "npz": (zipped("a.npy"), "NumPy arrays"),
    "torchscript": (zipped("m/data.pkl", "m/code/model.py"), "a TorchScript model"),
    "cut off": (zipped("a", "b")[:-30], "cut off or damaged"),
    "safetensors": ((90).to_bytes(8, "little") + b'{"w": 1}' + bytes(90), "a safetensors file"),
    "keras": (b"\x89HDF\r\n" + bytes(50), "an HDF5 file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_kinds_are_refused_with_what_they_are(tmp_path, name):
    path = tmp_path / "c.pth"
    content, what = FOREIGN[name]
    path.write_bytes(content)
    for read in (load_checkpoint, lambda path: read_weights(WeightsSource(path=path))):
        with pytest.raises(ValueError, match=rf"c\.pth: not a readable checkpoint: .*{what}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "c.pth"
    torch.save(content(size=10000), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


class Pickled:
    def __init__(self, call, *arguments):
        self.state = call, arguments

    def __reduce__(self):
        return self.state


@pytest.mark.parametrize(
    "evil",
    [
        Pickled(os.system, "touch /tmp/owned"),
        Pickled(eval, "1 + 1"),
        Pickled(__import__, "os"),
        Pickled(open, "/tmp/owned", "w"),
        Pickled(getattr, "text", "upper"),
    ],
    ids=["os.system", "eval", "import", "open", "getattr"],
)
def test_malicious_checkpoints_are_refused(tmp_path, evil):
    path = tmp_path / "evil.pth"
    torch.save({**content(), "args": evil}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth.*pickled Python objects.*can run code"):
        load_checkpoint(path)
    assert not Path("/tmp/owned").exists()


def test_urls_are_not_fetched(tmp_path):
    with pytest.raises(ValueError, match="--resume http://host/a.pth: URLs are not fetched; download the file"):
        open_checkpoint("http://host/a.pth", tmp_path)


def test_a_run_goes_on_from_what_is_named_and_after_a_restart_from_its_own_folder(tmp_path, monkeypatch):
    """``restarts`` is what torchrun says; each line: --resume, restarts, epoch of the checkpoint that is taken."""
    own, other, empty = tmp_path / "own", tmp_path / "other", tmp_path / "empty"
    for folder, epoch in ((own, 1), (other, 2)):
        CheckpointFolder(folder / "weights").save(content(epoch))
    for resume, restarts, epoch in (
        ("", 0, None), ("auto", 0, 1), (other, 0, 2), (other / "weights" / NEWEST, 0, 2), ("", 1, 1), (other, 1, 1)
    ):  # fmt: skip
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        found, path = open_checkpoint(str(resume), own)
        assert (found and found["progress"]["epoch"]) == epoch
        assert path == (epoch and {1: own, 2: other}[epoch] / "weights" / NEWEST)
    assert open_checkpoint(str(other), empty)[1] == other / "weights" / NEWEST  # the restart came before the first save
    assert open_checkpoint("auto", empty) == (None, None)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert open_checkpoint(str(other), None)[1] == other / "weights" / NEWEST
    with pytest.raises(ValueError, match="--resume auto needs an --output-dir"):
        open_checkpoint("auto", None)


WEIGHTS = {"w": torch.zeros(3)}
OTHERS = {
    "torchvision's scripts": (
        {"model": WEIGHTS, "optimizer": {}, "lr_scheduler": {}, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        "start from its weights with --weights .*: it is one of torchvision's scripts, with model, optimizer",
    ),
    "another program": (
        {"model": WEIGHTS, "optimizer": {}},
        "start from its weights with --weights .*: it is one of another program",
    ),
    "state dict": (WEIGHTS, "start from its weights with --weights .*: it is a bare state dict of 1 entries"),
    "deeper": ({"state_dict": WEIGHTS, "epoch": 3}, "its weights are under 'state_dict'; save those alone"),
    "list": ([1, 2], "it holds list, no weights"),
    "else": ({"epoch": 3}, "it holds epoch, no weights"),
}


OTHERS |= {
    "empty": ({}, "it holds nothing, no weights"),
    "partly weights": ({"w": torch.zeros(3), "epoch": 3}, "it holds w, epoch, no weights"),
    "partly weights, deeper": ({"net": {"w": torch.zeros(3), "epoch": 3}}, "it holds net, no weights"),
    "scheduler alone": (
        {"model": WEIGHTS, "lr_scheduler": {}},
        "start from its weights with --weights .*: it is one of torchvision's scripts, with model, lr_scheduler",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_other_programs_are_named_with_the_flag_that_takes_them(tmp_path, name):
    path = tmp_path / "c.pth"
    torch.save(OTHERS[name][0], path)
    with pytest.raises(CheckpointError, match=f"c.pth: not a checkpoint of this suite; {OTHERS[name][1]}"):
        load_checkpoint(path)


def test_a_folder_given_for_a_file_is_named(tmp_path):
    CheckpointFolder(tmp_path / "weights").save(content())
    with pytest.raises(
        CheckpointError, match=r": a folder, expected a checkpoint; did you mean .*weights/checkpoint\.pth\?"
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="--weights .*: a folder, expected a file"):
        find_model_weights(str(tmp_path), "fcos_resnet50_fpn")


def test_later_checkpoints_are_named(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({**content(), "format": 99}, path)
    with pytest.raises(CheckpointError, match="its format is 99"):
        load_checkpoint(path)


def test_a_missing_file_gets_a_hint(tmp_path):
    (tmp_path / "weights").mkdir()
    save_checkpoint(content(), tmp_path / "weights" / NEWEST)
    with pytest.raises(CheckpointError, match=r"no such checkpoint; did you mean .*weights/checkpoint\.pth"):
        load_checkpoint(tmp_path / NEWEST)


@pytest.mark.slow
def test_a_folder_has_one_writer(tmp_path):
    lock = lock_folder(tmp_path)
    second = Forked(tmp_path / "log", lock_folder, tmp_path)
    assert second.wait(120) == 1
    assert f"another run (process {os.getpid()}) writes there" in second.output()
    lock.close()
    assert Forked(tmp_path / "log", lock_folder, tmp_path).wait(120) == 0


def test_the_lock_names_the_process_that_holds_it_alone(tmp_path):
    folder = tmp_path / "not" / "there"
    with lock_folder(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
    (folder / ".lock").write_text("99999999")
    with lock_folder(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())


def save_without_end(folder):
    saver = CheckpointFolder(folder)
    print("ready", flush=True)
    for step in itertools.count(1):
        saver.save(content(step, size=200_000), epoch_done=step % 3)


@pytest.mark.slow
def test_no_kill_inside_a_save_loses_the_checkpoint(tmp_path):
    """SIGKILL at random instants of a save loop; the newest must always load. The long run is in tests/faults/matrix.py."""
    lost = 0
    for attempt in range(6):
        process = Forked(tmp_path / f"log{attempt}", save_without_end, tmp_path)
        while "ready" not in process.output():
            time.sleep(0.01)
        time.sleep(0.1 + 0.041 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            load_checkpoint(tmp_path / NEWEST)
        except CheckpointError:
            lost += 1
    assert lost == 0
