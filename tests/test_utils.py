"""Commands end with a line and an exit code, not a traceback."""

import resource
import sys

import pytest
import torch

from utils import peak_memory_mb, run_command


@pytest.mark.parametrize("error", [ValueError("no such thing"), FileNotFoundError("no such thing")])
def test_what_a_user_did_wrong_is_one_line_and_exit_code_1(error, capsys):
    def main(args):
        raise error

    assert run_command("tool.py", main, None, aftermath="; nothing was written") == 1
    assert capsys.readouterr().err == "tool.py: error: no such thing; nothing was written\n"


def test_a_fault_of_ours_keeps_its_traceback_and_exit_codes_pass():
    with pytest.raises(ZeroDivisionError):
        run_command("tool.py", lambda args: 1 // args, 0)
    assert run_command("tool.py", lambda args: args, 4) == 4


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1 << 10), ("darwin", 1)])
def test_the_peak_of_memory_is_in_mb_whatever_the_system_counts_in(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    assert peak_memory_mb(torch.device("cpu")) == pytest.approx(taken, abs=1)
