"""No wait is silent, endless or deaf to signals, and a signal that ends a command lets it clean up."""

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torchvision.models._api import Weights, WeightsEnum

import utils
from annotations import arrays
from annotations.arrays import cached_annotations
from coco_utils import read_coco
from helpers.drawn import ROOT
from helpers.forked import server_context
from helpers.ranks import run_on_ranks
from helpers.runs import run
from models import weights
from models.weights import WeightsSource, read_weights
from process.waiting import GRACE_SECONDS, Stopped, WaitError, note_signal, signals_raise, wait_for, wait_until
from runtime.signals import StopRequest
from utils import meet

pytestmark = pytest.mark.usefixtures("restore_process")


@pytest.fixture(autouse=True)
def no_wish():
    yield
    note_signal(None)


def never(seconds):
    time.sleep(seconds)
    return False


def send_soon(number=signal.SIGTERM, seconds=0.3):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_a_wait_says_after_a_while_what_it_is_for_and_gives_up_at_its_limit_with_advice(caplog):
    with pytest.raises(WaitError, match="^waited 1 s for the moon: look up$"):
        wait_until(never, "the moon", limit=0.6, advice="look up", silent=0.2)
    (record,) = caplog.records
    assert record.getMessage() == "waiting for the moon (gives up in 0 s): look up"


def test_a_short_wait_says_nothing(caplog):
    wait_until(lambda seconds: True, "the moon", limit=1)
    assert not caplog.records


def test_a_wait_hears_a_signal_that_is_only_noted():
    StopRequest().install()
    begun = time.monotonic()
    send_soon()
    with pytest.raises(Stopped, match="stopped by SIGTERM while waiting for the moon"):
        wait_until(never, "the moon", limit=20)
    assert time.monotonic() - begun < 15
    # One that came before the wait ends it too, unless the wait is short.
    begun = time.monotonic()
    with pytest.raises(Stopped):
        wait_until(never, "the moon", limit=20)
    assert GRACE_SECONDS <= time.monotonic() - begun < 15
    wait_until(lambda seconds: time.monotonic() - begun > GRACE_SECONDS, "the moon", limit=20)


def fail(seconds):
    raise RuntimeError("connection closed by peer")


def test_a_wait_that_fails_after_a_signal_was_ended_by_the_signal():
    with pytest.raises(RuntimeError, match="closed by peer"):
        wait_until(fail, "the moon", limit=20)
    note_signal("SIGTERM")
    with pytest.raises(Stopped, match="stopped by SIGTERM while waiting for the moon"):
        wait_until(fail, "the moon", limit=20)


def meet_after_signal(rank, path, queue):
    """Two processes get a signal: one waits for the other, which is busy and comes when the first has left."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    dist.barrier()
    utils.GRACE_OF_MEETINGS = 0.2
    note_signal("SIGTERM")
    if rank == 0:
        time.sleep(1.5)
    try:
        meet("are slow")
    except BaseException as error:
        queue.put((rank, type(error).__name__, str(error)))
    queue.close()
    queue.join_thread()
    os._exit(0)


def test_a_signal_to_all_processes_is_not_taken_for_the_loss_of_those_that_left_first(tmp_path):
    context = server_context()
    queue = context.Queue()
    processes = [context.Process(target=meet_after_signal, args=(r, tmp_path / "store", queue)) for r in (0, 1)]
    for process in processes:
        process.start()
    answers = sorted(queue.get(timeout=60) for _ in processes)
    expected = "stopped by SIGTERM while waiting for the other processes, which are slow"
    assert answers == [(0, "Stopped", expected), (1, "Stopped", expected)]
    for process in processes:
        process.join()


def test_code_that_hears_no_signal_is_waited_for_in_the_open():
    assert wait_for(lambda: 7, "the moon", limit=1) == 7
    with pytest.raises(KeyError, match="stone"):
        wait_for(lambda: {}["stone"], "the moon", limit=1)
    StopRequest().install()
    send_soon(signal.SIGINT)
    blocked = threading.Event()
    with pytest.raises(Stopped, match="SIGINT"):
        wait_for(blocked.wait, "the moon", limit=20)
    blocked.set()


def test_a_signal_raises_once_and_handlers_are_put_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, signals_raise():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # as timeout(1) does: to the process, and to its group
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == before


def late_meeting(rank, world_size):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    if rank == 1:
        time.sleep(1.8)
    meet("tie their shoes")
    return lines


@pytest.mark.slow
def test_a_meeting_of_processes_waits_in_the_open():
    mine, others = run_on_ranks(2, late_meeting)
    assert len(mine) == 1 and not others
    assert mine[0].startswith("waiting for the other processes, which tie their shoes (gives up in 30")


def meetings_with_a_signal(rank, world_size):
    """Process 0 alone gets a signal, longer before the other one comes than a wait of one's own goes on."""
    met = 0
    try:
        for _ in range(3):
            if rank == 0 and met == 1:
                send_soon()
            if rank == 1:
                time.sleep(0.3 + 3 * GRACE_SECONDS)
            meet("tie their shoes")
            met += 1
    except Stopped as stopped:
        return met, str(stopped)


def stopped_at_meetings(rank, world_size):
    StopRequest().install()
    answer = meetings_with_a_signal(rank, world_size)
    note_signal(None)
    return answer


@pytest.mark.slow
def test_a_signal_to_one_process_that_waits_for_others_stops_all_of_them():
    """It comes in the second meeting, which still takes place; the third one tells of it."""
    mine, others = run_on_ranks(2, stopped_at_meetings)
    assert mine == (2, "stopped by SIGTERM while waiting for the other processes, which tie their shoes")
    assert others == (
        2,
        "stopped by SIGTERM to another process while waiting for the other processes, which tie their shoes",
    )


def meeting_alone(rank, world_size):
    utils.GRACE_OF_MEETINGS = 0.8
    if rank == 0:
        note_signal("SIGTERM")
    else:
        time.sleep(4)
    begun = time.monotonic()
    with pytest.raises(Stopped):
        meet("sleep")
    note_signal(None)
    return time.monotonic() - begun


@pytest.mark.slow
def test_others_that_do_not_come_are_not_waited_for_after_a_signal():
    alone, _ = run_on_ranks(2, meeting_alone)
    assert 0.8 <= alone < 3.8


def held_cache(drawn_coco, folder):
    """Build a cache, remove it but for its lock, and hold that."""
    source = next((drawn_coco / "annotations").glob("instances_val*.json"))
    build = lambda: read_coco(source)  # noqa: E731
    cached_annotations(source, build, folder)
    (lock,) = folder.glob("*.lock")
    file = lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return source, build, file


def test_a_cache_that_another_process_builds_is_waited_for_in_the_open(drawn_coco, tmp_path, caplog):
    source, build, file = held_cache(drawn_coco, tmp_path / "cache")
    threading.Timer(1.4, file.close).start()
    assert cached_annotations(source, build, tmp_path / "cache").cache_file is not None
    assert f"waiting for another process, which reads {source} for the cache" in caplog.text
    assert "fuser -v" in caplog.text


def test_a_wait_for_a_cache_ends_by_a_signal_and_at_its_limit(drawn_coco, tmp_path, caplog, monkeypatch):
    source, build, file = held_cache(drawn_coco, tmp_path / "cache")
    with file:
        send_soon()
        with pytest.raises(Stopped), signals_raise():
            cached_annotations(source, build, tmp_path / "cache")
        monkeypatch.setattr(arrays, "LOCK_SECONDS", 0.2)
        found = cached_annotations(source, build, tmp_path / "cache")
    assert found.cache_file is None and len(found) == len(build())
    assert "no annotation cache in" in caplog.text and "waited 0 s for another process" in caplog.text


class Server(threading.Thread):
    """Answers every request with the beginning of a file, and then with nothing."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.answer, self.socket, self.open = answer, socket.create_server(("127.0.0.1", 0)), []
        self.start()

    def run(self):
        while True:
            connection, _ = self.socket.accept()
            self.open.append(connection)
            connection.recv(1000)
            connection.sendall(self.answer)
            if not self.answer:
                connection.close()


def published(port):
    class Published(WeightsEnum):
        V1 = Weights(url=f"http://127.0.0.1:{port}/some-0123abcd.pth", transforms=None, meta={})

    return WeightsSource(entry=Published.V1)


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + bytes(500)


def test_a_download_ends_by_a_signal_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = published(Server(HALF).socket.getsockname()[1])
    StopRequest().install()
    send_soon(seconds=0.5)
    with pytest.raises(Stopped):
        read_weights(source)
    assert "downloading http://127.0.0.1" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("answer", [HALF, b"", b"HTTP/1.1 404 Not Found\r\n\r\n"], ids=["silent", "closed", "404"])
def test_a_download_that_fails_says_how_to_bring_the_file(tmp_path, monkeypatch, answer):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "SILENT_SERVER_SECONDS", 0.4)
    source = published(Server(answer).socket.getsockname()[1])
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(.+\); load http://.*some-0123abcd.pth on a machine with net"
    ):
        read_weights(source)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and socket.getdefaulttimeout() is None
    assert torch.hub.get_dir() == str(tmp_path / "hub")


SHAPES = ["train.py", "--dataset", "shapes", "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu"]
TWO_TASKS = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
LAUNCHED = {
    "the other tasks never come": (
        {**TWO_TASKS, "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
        "the other 1 of 2 processes at localhost:20007",
        "all tasks of the srun must be running and reach that port",
        signal.SIGTERM,
    ),
    "the first process never comes": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        "process 0 of 2 at 127.0.0.1:1",
        "start the same command once for every RANK",
        signal.SIGINT,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LAUNCHED)
def test_a_process_whose_others_do_not_come_says_so_and_ends_at_once(case, tmp_path):
    variables, what, advice, number = LAUNCHED[case]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    process = subprocess.Popen(
        [sys.executable, *SHAPES, "--output-dir", tmp_path / "out"], cwd=ROOT, env={**clean, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert f"waiting for {what} (gives up in 10 min): " in line and advice in line
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in error
    name = signal.Signals(number).name
    assert f"train.py: stopped by {name} while waiting for {what}; nothing was trained\n" in error


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["batch script", "shell of salloc"])
def test_a_slurm_job_of_several_tasks_without_srun_is_told_to_use_it(step, monkeypatch, capsys):
    """What SLURM sets was seen on a real one, see tests/cluster/."""
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**TWO_TASKS, **step}.items():
        monkeypatch.setenv(name, value)
    assert run(*SHAPES[1:], "--output-dir", "") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: this SLURM job has 2 tasks, but no srun has started this process")
    assert "write `srun " in line
