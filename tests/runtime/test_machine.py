"""Limits, waiting and signals: nothing hangs without a word, and one process alone opens no port."""

import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from faults.jobs import lives
from helpers.drawn import ROOT
from helpers.forked import Forked, run_script
from helpers.runs import QUICK, run
from loading import loaders
from process.joining import _name_attempt
from process.leaving import end_process
from runtime import machine
from runtime.machine import HangWatch, check_shared_memory, explain_failure
from runtime.trackers import Tracker

pytestmark = pytest.mark.usefixtures("restore_process")

SSDLITE = ["--model", "ssdlite320_mobilenet_v3_large", "--batch-size", "2", "--output-dir", "", "--eval-every", "0"]


def name_attempt_on_threads(port, world_size, delays):
    """Return what every rank calls the attempt; rank r joins ``delays[r]`` seconds late."""
    names = [None] * world_size

    def join(rank):
        time.sleep(delays[rank])
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        names[rank] = _name_attempt(store, rank, world_size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return names


def test_attempts_in_one_store_never_share_a_name():
    """The store outlives its processes, and some of an attempt may die before they have met."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = []
    for attempt in range(5):
        delays = [0.1 * ((attempt + rank) % 3) for rank in range(3)]
        found = name_attempt_on_threads(server.port, 3, delays)
        assert None not in found and len(set(found)) == 1
        names.append(found[0])
        # Left behind by processes of another attempt that died half way.
        server.set("token/1", f"dead{attempt}")
        if attempt % 2:
            server.set("roll", f"dead0 dead{attempt} dead2")
    assert len(set(names)) == 5


def print_raised_limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
    machine.prepare_process()
    print(resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)


@pytest.mark.slow
def test_the_limit_of_open_files_is_raised(tmp_path):
    process = Forked(tmp_path / "log", print_raised_limit)
    assert process.wait(120) == 0 and process.output().strip() == "(2048, 2048)"


def test_little_shared_memory_is_announced_with_what_to_do(caplog):
    check_shared_memory(1 << 10, 4)
    assert not caplog.records
    check_shared_memory(1 << 50, 0)
    assert not caplog.records
    check_shared_memory(1 << 50, 4)
    assert "/dev/shm has" in caplog.text and "--shm-size" in caplog.text and "--workers" in caplog.text


def listening_sockets():
    """Return this process's sockets that anyone could connect to."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] in ("0A", "07"):
                listening.append(fields[9])
    return listening


def tracked(on_step):
    """Return `train_one_epoch` with one more tracker."""
    wrapped, tracker = train.train_one_epoch, Tracker()
    tracker.on_step = on_step
    return lambda *args, trackers, **kwargs: wrapped(*args, trackers=[*trackers, tracker], **kwargs)


@pytest.mark.slow
def test_one_process_opens_no_port(drawn_coco, monkeypatch):
    seen, before = [], set(listening_sockets())  # other tests may have left some
    monkeypatch.setattr(
        train, "train_one_epoch", tracked(lambda record: seen.append(set(listening_sockets()) - before))
    )
    assert run(*QUICK, *SSDLITE, "--data-path", drawn_coco, "--workers", "1") == 0
    assert seen and not any(seen)


def test_the_look_for_ports_can_fail():
    import socket

    before = listening_sockets()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert len(listening_sockets()) == len(before) + 1


def train_and_disturb(monkeypatch, drawn_coco, disturb):
    """Train with one loading process and call ``disturb`` before the second step."""
    monkeypatch.setattr(train, "train_one_epoch", tracked(lambda record: disturb() if record.updates == 2 else None))
    return run(*QUICK, *SSDLITE, "--data-path", drawn_coco, "--workers", "1", "--epochs", "20")


def train_without_loader(root):
    """Kill the loading process of a run after its first update. For a process of its own."""

    def kill_loader(record):
        if record.updates == 2:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)

    train.train_one_epoch = tracked(kill_loader)
    end_process(run(*QUICK, *SSDLITE, "--data-path", root, "--workers", "1", "--epochs", "20"))


@pytest.mark.slow
def test_a_killed_loading_process_ends_the_run_with_advice(drawn_coco, tmp_path):
    process = Forked(tmp_path / "log", train_without_loader, drawn_coco)
    assert process.wait(300) == 1
    output = process.output()
    assert "a loading process has died" in output and "--workers" in output
    assert "Traceback" not in output


def end_beside_stuck_loader():
    """Ends a process whose loading process does not answer."""
    batches = iter(torch.utils.data.DataLoader(list(range(8)), num_workers=1, persistent_workers=True))
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGSTOP)
        print("done", child.pid)
    end_process(0)


@pytest.mark.slow
def test_a_finished_run_does_not_wait_for_a_stuck_loading_process(tmp_path):
    process = Forked(tmp_path / "log", end_beside_stuck_loader)
    assert process.wait(60) == 0
    done, pid = process.output().split()
    assert done == "done"
    end = time.time() + 60
    while lives(int(pid)) and time.time() < end:
        time.sleep(0.05)
    assert not lives(int(pid))


def fail_in_a_group(store, error):
    """Train as one process of a group that cannot be left, as NCCL's where the others wait. For a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)

    def main(args, distributed, stop, trackers):
        if error is not None:
            raise error
        return 0

    def destroy():
        print("leaving the group", flush=True)
        if error is not None:
            time.sleep(60)

    train.main, dist.destroy_process_group = main, destroy
    train.run_and_leave([*QUICK, *SSDLITE])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("a bug"), 1, r"Traceback (?s:.*)in main\n(?s:.*)ZeroDivisionError: a bug"),
        (RuntimeError("Connection closed by peer"), 1, r".*: error: another process of this run .*"),
        (train.NonFiniteLossError("loss not finite"), 3, "loss not finite"),
        (None, 0, "leaving the group"),
    ],
)
def test_a_process_that_fails_says_why_and_does_not_wait_for_the_others(tmp_path, error, code, said):
    process = Forked(tmp_path / "log", fail_in_a_group, tmp_path / "store", error)
    try:
        assert process.wait(30) == code
    finally:
        process.kill()
    assert re.search(rf"^{said}$", process.output(), re.MULTILINE)
    assert ("leaving the group" in process.output()) == (error is None)


@pytest.mark.slow
def test_a_slow_loading_process_ends_the_run_with_advice(drawn_coco, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "WORKER_TIMEOUT_SECONDS", 1)
    read = loaders.DetectionDataset.__getitem__

    def stuck(self, item):
        if item[0] == 1:
            time.sleep(1.5)
        return read(self, item)

    monkeypatch.setattr(loaders.DetectionDataset, "__getitem__", stuck)
    assert train_and_disturb(monkeypatch, drawn_coco, lambda: None) == 1
    error = capsys.readouterr().err
    assert "DataLoader timed out after 1 seconds" in error and "--resume auto" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_bad_image_in_a_loading_process_is_one_line(drawn_coco, monkeypatch, capsys):
    def spoil():
        for path in (drawn_coco / "train2017").iterdir():
            path.write_bytes(path.read_bytes()[:100])

    assert train_and_disturb(monkeypatch, drawn_coco, spoil) == 1
    error = capsys.readouterr().err
    assert "cannot decode the image" in error and "train2017" in error and len(error.splitlines()) == 1


MESSAGES = {
    "received 0 items of ancdata": "ulimit -n",
    "[Errno 24] Too many open files": "ulimit -n",
    "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:36266": "--resume auto",
    "Application timeout caused pair closure": "another process of this run",
    "DataLoader worker (pid 7) is killed by signal: Bus error.": "/dev/shm",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_failures_of_the_machine_are_explained(text):
    assert MESSAGES[text] in explain_failure(RuntimeError(text))
    assert "\n" not in explain_failure(RuntimeError(text))


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:93, {0}, NCCL version 2.27.5\n{1}.\nLast error:\n{2}\n"


@pytest.mark.parametrize(
    ("kind", "last", "said"),
    [
        (
            ("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library"),
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000: two processes have been given one GPU",
        ),
        (
            ("unhandled system error", "ncclSystemError: System call (e.g. socket, malloc) or external library call failed"),
            "socketStartConnect: Connect to 10.0.0.7<4000> failed : No route to host",
            "by NCCL: socketStartConnect: Connect to 10.0.0.7<4000> failed : No route to host; NCCL_DEBUG=WARN",
        ),
        (
            ("remote process exited or there was a network error", "ncclRemoteError: A call failed possibly due to a network"),
            "socketProgress: Connection closed by remote peer node1<3000>",
            "another process of this run has ended",
        ),
    ],
)  # fmt: skip
def test_what_nccl_says_is_quoted_and_only_a_lost_process_is_called_one(kind, last, said):
    explained = explain_failure(dist.DistBackendError(NCCL.format(*kind, last)))
    assert said in explained and "\n" not in explained
    assert ("another process" in explained) == ("ncclRemoteError" in kind[1])


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", "nvidia-smi"),
        ("CUDA error: no kernel image is available for execution on the device\nFor debugging", "not built for this"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "--batch-size"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel", "to itself"),
    ],
)
def test_what_cuda_says_is_explained(text, advice):
    explained = explain_failure(torch.AcceleratorError(text))
    assert explained.startswith(text.splitlines()[0]) and advice in explained and "\n" not in explained


def test_a_full_memory_of_the_machine_is_explained():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    explained = explain_failure(raised.value)
    assert "can't allocate memory" in explained and "--batch-size" in explained and "\n" not in explained


def test_a_bug_on_a_gpu_keeps_its_traceback():
    assert explain_failure(torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel")) is None


def test_other_errors_keep_their_traceback():
    assert explain_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain_failure(KeyError("boxes")) is None


def stuck_in_here():
    machine.HANG_SECONDS = 1
    watch = HangWatch()
    watch.alive()
    time.sleep(60)


@pytest.mark.slow
def test_a_process_without_progress_prints_its_stacks_and_ends(tmp_path):
    begun = time.time()
    process = Forked(tmp_path / "log", stuck_in_here)
    assert process.wait(120) == 1 and "stuck_in_here" in process.output() and time.time() - begun < 50


def test_a_watch_that_ended_lets_the_process_be(monkeypatch):
    monkeypatch.setattr(machine, "HANG_SECONDS", 1)
    watch = HangWatch()
    watch.alive()
    watch.end()
    time.sleep(1.5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_loading_processes_outlive_a_signal_to_the_whole_job(drawn_coco, tmp_path, number):
    """A scheduler signals all processes of a job; the checkpoint is written and the run ends with 0."""
    flags = ["--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu", "--workers", "1"]
    flags += ["--batch-size", "2", "--epochs", "50", "--eval-every", "0", "--print-freq", "1"]
    flags += ["--output-dir", tmp_path / "out"]
    process = Forked(tmp_path / "log", run_script, ROOT / "train.py", *flags)
    while "Epoch: [0] [2/" not in process.output():
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    os.killpg(process.pid, number)
    assert process.wait(60) == 0 and "asked to stop: " in process.output()
    assert (tmp_path / "out" / "weights" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_a_stop_ends_an_evaluation_alone(drawn_coco, tmp_path, monkeypatch, capsys):
    """--test-only looks for the wish to stop too."""
    from training import evaluate_model

    seen = []

    def stopped(*args, stop, **kwargs):
        seen.append(stop)

    assert run(*QUICK, *SSDLITE[:4], "--data-path", drawn_coco, "--output-dir", tmp_path, "--eval-every", "0") == 0
    monkeypatch.setattr(evaluate_model, "evaluate", stopped)
    flags = ["--test-only", "--resume", tmp_path / "weights" / "checkpoint.pth"]
    assert run(*QUICK, *SSDLITE, "--data-path", drawn_coco, *flags) == 0
    assert len(seen) == 1 and seen[0] is not None


def test_a_low_limit_is_not_lowered():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    machine.prepare_process()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
