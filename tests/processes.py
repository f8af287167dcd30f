"""Several processes of one torch.distributed group that run the same function of the tests. They are forks of one
process that has imported everything, which takes seconds, and has run nothing.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.ranks.jobs", "stgfast.bench.ranks"])


def started(size, function, *arguments, folder, all_end=False):
    """Start processes; each saves what the function returns and prints. If all of them finish, they exit together: the
    first one has the store, which the others may still need.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        FORKS.Process(target=_process, args=(function, arguments, str(folder), rank, size, port, all_end), daemon=True)
        for rank in range(size)
    ]
    for process in running:
        process.start()
    return running


def results(size, function, *arguments, limit=300.0):
    """What a function of a module returns in each of these processes; none may fail."""
    with tempfile.TemporaryDirectory() as folder:
        running = started(size, function, *arguments, folder=folder, all_end=True)
        codes = ended(running, limit)
        assert codes == [0] * size, f"{codes}\n" + "\n".join(printed(folder, rank)[-3000:] for rank in range(size))
        return [result(folder, rank) for rank in range(size)]


def ended(running, limit):
    """The exit codes of processes that end or are killed."""
    until = time.monotonic() + limit
    for process in running:
        process.join(max(until - time.monotonic(), 0.1))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


def result(folder, rank):
    return torch.load(Path(folder) / f"result.{rank}", weights_only=False)


def printed(folder, rank):
    return (Path(folder) / f"printed.{rank}").read_text(errors="replace")


def _process(function, arguments, folder, rank, size, port, all_end):
    with open(Path(folder) / f"printed.{rank}", "wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    store, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    torch.save(function(*arguments), Path(folder) / f"result.{rank}")
    if all_end:
        torch.distributed.barrier()
