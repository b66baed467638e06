"""All processes of a run compute in one precision."""

import pytest
import torch

from helpers.ranks import run_on_ranks
from optimization import precision
from optimization.precision import choose_amp

CPU = torch.device("cpu")


def _chosen(rank, world_size, lacking):
    precision.computes_in_bfloat16 = lambda device: rank not in lacking
    dtype, scaler = choose_amp("auto", CPU)
    return str(dtype), scaler is not None


@pytest.mark.slow
def test_one_gpu_without_bfloat16_takes_all_processes_to_float16():
    assert run_on_ranks(2, _chosen, [1]) == [("torch.float16", True)] * 2


def test_a_type_that_is_asked_for_is_taken():
    assert choose_amp("auto", CPU) == choose_amp("bfloat16", CPU) == (torch.bfloat16, None)
    assert choose_amp("float16", CPU)[0] == torch.float16
