"""Run a function on several gloo processes of this machine."""

import os
import tempfile
import traceback

import torch
import torch.distributed as dist

from helpers.forked import server_context


def _entry(rank, world_size, path, queue, function, args):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
        queue.put((rank, function(rank, world_size, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run_on_ranks(world_size, function, *args):
    """Return ``function(rank, world_size, *args)`` of every rank; ``function`` is importable."""
    context = server_context()
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, f"{folder}/store", queue, function, args)
        processes = [context.Process(target=_entry, args=(rank, *arguments)) for rank in range(world_size)]
        for process in processes:
            process.start()
        results = {}
        for _ in processes:
            rank, result, error = queue.get(timeout=600)
            if error is not None:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = result
        for process in processes:
            process.join()
    return [results[rank] for rank in range(world_size)]
