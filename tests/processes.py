"""Several processes of one torch.distributed group that run the same function of the tests.

python -m tests.processes FUNCTION ARGUMENTS RESULT RANK SIZE PORT
"""

import importlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch


def started(size, function, *arguments, folder):
    """The running processes; each saves what the function gives it, and what is printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.processes", f"{function.__module__}:{function.__name__}"]
    running = []
    for rank in range(size):
        mine = [json.dumps(arguments), str(Path(folder) / f"result.{rank}"), str(rank), str(size), str(port)]
        with open(Path(folder) / f"printed.{rank}", "wb") as printed:
            running.append(subprocess.Popen([*command, *mine], stdout=printed, stderr=subprocess.STDOUT))
    return running


def results(size, function, *arguments, limit=300.0):
    """What a function of a module gives in each of so many processes; none may fail."""
    with tempfile.TemporaryDirectory() as folder:
        running = started(size, function, *arguments, folder=folder)
        ended = time.monotonic() + limit
        try:
            codes = [process.wait(max(ended - time.monotonic(), 0.1)) for process in running]
        finally:
            for process in running:
                process.kill()
        assert codes == [0] * size, "\n".join(printed(folder, rank) for rank in range(size))
        return [torch.load(Path(folder) / f"result.{rank}", weights_only=False) for rank in range(size)]


def printed(folder, rank):
    return (Path(folder) / f"printed.{rank}").read_text(errors="replace")


def main(function, arguments, result, rank, size, port):
    torch.set_num_threads(1)
    module, name = function.split(":")
    store = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=limit)
    torch.save(getattr(importlib.import_module(module), name)(*json.loads(arguments)), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
