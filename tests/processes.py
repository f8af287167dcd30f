"""Several processes of one torch.distributed group that run the same function of the tests."""

import pickle
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch


def started(size, function, *arguments, folder, all_end=False):
    """Start processes; each saves what the function returns and prints. If all of them finish, they exit together: the
    first one has the store, which the others may still need.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (Path(folder) / "function").write_bytes(pickle.dumps((function, arguments)))
    command = [sys.executable, "-m", "tests.processes", str(folder), str(size), str(port), str(int(all_end))]
    running = []
    for rank in range(size):
        with open(Path(folder) / f"printed.{rank}", "wb") as printed:
            running.append(subprocess.Popen([*command, str(rank)], stdout=printed, stderr=printed))
    return running


def results(size, function, *arguments, limit=300.0):
    """What a function of a module returns in each of these processes; none may fail."""
    with tempfile.TemporaryDirectory() as folder:
        running = started(size, function, *arguments, folder=folder, all_end=True)
        codes = ended(running, limit)
        assert codes == [0] * size, f"{codes}\n" + "\n".join(printed(folder, rank)[-3000:] for rank in range(size))
        return [result(folder, rank) for rank in range(size)]


def ended(running, limit):
    """The exit codes of processes that end; those that do not end within the limit are killed, and have None."""
    until = time.monotonic() + limit
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        time.sleep(0.02)
    codes = [process.returncode for process in running]
    for process in running:
        process.kill()
        process.wait()
    return codes


def result(folder, rank):
    return torch.load(Path(folder) / f"result.{rank}", weights_only=False)


def printed(folder, rank):
    return (Path(folder) / f"printed.{rank}").read_text(errors="replace")


def _main(folder, size, port, all_end, rank):
    torch.set_num_threads(1)
    function, arguments = pickle.loads((Path(folder) / "function").read_bytes())
    store, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=limit)
    torch.save(function(*arguments), Path(folder) / f"result.{rank}")
    if int(all_end):
        torch.distributed.barrier()


if __name__ == "__main__":
    _main(*sys.argv[1:])
