"""How the processes of a run meet: who this one is, where the others are, and what to do when they do not come.

torchrun, SLURM's srun, or variables set by hand say so. What the processes then say to each other is in ``utils.py``.
"""

import datetime
import os
import re
import shlex
import sys
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist

from process.waiting import wait_for

# How long the processes wait for each other at the start.
START_TIMEOUT = datetime.timedelta(minutes=10)


def launched_ranks() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) from torchrun's variables, else SLURM's, else of a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    # A job or step of one task is a run of one process.
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(env["SLURM_NTASKS"])
    return 0, 0, 1


def _fill_in_slurm_address() -> None:
    """Derive MASTER_ADDR and MASTER_PORT from SLURM's variables where the user has not set them."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        # "node[012-014,020]" or "node7,node9": the first host of the list.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
        if first is None:
            raise ValueError("several SLURM tasks but no MASTER_ADDR and no node list; export MASTER_ADDR")
        env["MASTER_ADDR"] = first[1] + (first[2] or "")
    # One port per job, so that two jobs on a node do not meet.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))


def join_group(rank: int, world_size: int, device: torch.device, dist_url: str, timeout: datetime.timedelta) -> None:
    """Join the process group, with a word where the others take long.

    NCCL carries CUDA tensors and gloo CPU tensors in one group.

    Args:
        rank: This process among all of the job, from 0.
        world_size: Number of processes.
        device: Where this process computes, on CUDA with its index.
        dist_url: ``env://`` or an init method of ``torch.distributed``, such as ``tcp://host:port``.
        timeout: How long a collective may take.

    Raises:
        Stopped: A signal has come.
        ValueError: The others did not come or cannot come, the port is taken, or nothing says where to meet.
    """
    if _is_without_srun():
        raise ValueError(
            f"this SLURM job has {world_size} tasks, but no srun has started this process: write "
            f"`srun {shlex.join(sys.orig_argv)}`; for one process alone use srun --ntasks=1, or set SLURM_NTASKS=1"
        )
    if dist_url == "env://" and "RANK" not in os.environ:
        _fill_in_slurm_address()
    unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if dist_url == "env://" and unset:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(unset)}; start with torchrun, or export it"
        )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if dist_url == "env://" else dist_url
    others = f"the other {world_size - 1} of {world_size} processes" if rank == 0 else f"process 0 of {world_size}"
    try:
        wait_for(
            lambda: _join(rank, world_size, device, dist_url, timeout),
            f"{others} at {where}",
            limit=START_TIMEOUT.total_seconds(),
            advice=_advice_on_start(),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(f"port {where} is in use by another run; export MASTER_PORT with another number") from None


def _is_without_srun() -> bool:
    """Tell whether this process stands for a SLURM job of several tasks though no srun has started the others.

    In a batch script no step is named. The shell that `salloc` opens is a step of one task, with the job's number of
    tasks in SLURM_NTASKS.
    """
    by_slurm = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    return by_slurm and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1


def _advice_on_start() -> str:
    """Return what to do when the other processes do not come."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "all machines must run the same torchrun command and reach that port"
    if "RANK" not in os.environ:
        return "all tasks of the srun must be running and reach that port (squeue --steps; export MASTER_ADDR)"
    return "start the same command once for every RANK, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"


def _join(rank: int, world_size: int, device: torch.device, dist_url: str, timeout: datetime.timedelta) -> None:
    """Join the process group, however long the others take."""
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
        options["device_id"] = device
    if dist_url == "env://":
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0 and not agent_serves,
            timeout=2 * START_TIMEOUT,  # who waits gives up earlier, with advice
            multi_tenant=True,
        )
        options["store"] = dist.PrefixStore(_name_attempt(store, rank, world_size), store)
    else:
        options["init_method"] = dist_url
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **options)


def _name_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """Return a name that the living processes of this attempt share, and none of an earlier one has used.

    The launcher's store outlives the processes, and a machine that was brought back counts fewer restarts than the
    others, so counting does not name an attempt. Every process leaves a token of its own; process 0 calls the roll of
    tokens, its own first, until all processes have found theirs in it and answered.
    """
    token = uuid.uuid4().hex
    if rank != 0:
        store.set(f"token/{rank}", token)
        while True:
            roll = store.get("roll").decode().split()
            if roll[rank] == token:
                store.set(f"here/{roll[0]}/{token}", "")
                return roll[0]
            time.sleep(0.02)
    while True:
        tokens = [data.decode() for data in store.multi_get([f"token/{r}" for r in range(1, world_size)])]
        store.set("roll", " ".join([token, *tokens]))
        if store.check([f"here/{token}/{other}" for other in tokens]):
            return token
        time.sleep(0.02)
