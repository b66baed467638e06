"""Processes of their own that need not import torch first: copies of one server, each with its output in a file."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

# What the server has imported: its copies are new to each test, and ready in a tenth of a second.
PRELOADED = ["torch._dynamo", "torchvision", "torch.nn.parallel", "pycocotools.cocoeval", "pytest", "train"]


def server_context():
    """Return the start method of such processes; the server starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _enter(log, env, function, args):
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()  # the server's own are those of the test that started it
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # for loading processes, as in a command of its own
    function(*args)


def run_script(path, *flags):
    """Run a script as ``python path *flags`` does."""
    sys.argv = [str(path), *map(str, flags)]
    sys.path[0:0] = [str(Path(path).parent)]
    runpy.run_path(str(path), run_name="__main__")


class Forked:
    """A process in a session of its own; the methods are those of `subprocess.Popen`.

    Args:
        log: File that gets its stdout and stderr.
        function: Importable; what the process does.
        env: More environment variables.
    """

    def __init__(self, log, function, *args, env=None):
        self.log = Path(log)
        self.log.touch()
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.process = server_context().Process(target=_enter, args=(str(log), settings, function, args))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.log), timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def output(self):
        return self.log.read_text(errors="replace")
