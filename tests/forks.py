"""Processes that tests start, and the processes of pytest-xdist in which tests run. They are forks of one process that
has imported everything: the imports take seconds of processor time.

A fork has the arguments, environment, folder and open files that it would have as a new process, and is a child of the
process that started it. These are forks: the commands of `MODULES`, code (`python -c`) with `FORKED`, and what a fork
of these starts, except that a command of this package starts new processes. All others are new processes.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import importlib
import inspect
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHER = "torch.distributed.run"  # its processes are forks too
MODULES = (
    LAUNCHER,
    "stgfast.cli",
    "stgfast.render.child",
    "tests.processes",
    "tests.render.killed",
    "tests.render.tiny",
)
WORKER = "default_worker.py"  # of Ray
LIGHT = "serve"  # a command without torch
POSSIBLE = sys.platform == "linux"
FORKED = ("-X", "forked")  # Python accepts any name after -X
SUBREAPER, NAME = 36, 15  # of Linux: orphans of this process's descendants become its children; a process's name
STARTED = subprocess.Popen
GIVEN = list(inspect.signature(STARTED._execute_child).parameters)[1:]


class Popen(STARTED):
    """`subprocess.Popen`, where a command is forked if it can be."""

    def _execute_child(self, *values):
        given = dict(zip(GIVEN, values, strict=True))
        parts = _parts(given)
        if parts is None:
            return super()._execute_child(*values)
        streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        kept = {number: number if mine == -1 else mine for number, mine in enumerate(streams)}
        kept |= {number: number for number in given["pass_fds"]}
        asked = {
            **parts,
            "parent": os.getpid(),
            "folder": os.fspath(given["cwd"] or os.getcwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "session": given["start_new_session"],
            "files": list(kept),
        }
        self.pid = _forked(asked, list(kept.values()))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))


def _parts(given):
    """What a command runs, if it can be forked; None otherwise."""
    command = given["args"]
    if isinstance(command, str | bytes) or given["shell"] or given["preexec_fn"] is not None:
        return None
    python, *rest = map(os.fspath, command) if command else ("",)
    marked, buffered = tuple(rest[:2]) == FORKED, True
    rest = rest[2:] if marked else rest
    if rest[:1] == ["-u"]:
        buffered, rest = False, rest[1:]
    if python != sys.executable or len(rest) < 2:
        return None
    kind, what, *arguments = rest
    forked = what in MODULES and LIGHT not in arguments[:1] if kind == "-m" else kind == "-c" and marked
    return {"kind": kind, "what": what, "arguments": arguments, "buffered": buffered} if forked else None


_server: dict[int, socket.socket] = {}
_asking = threading.Lock()


def start():
    """Start the process that forks for this process, if there is none."""
    if os.getpid() in _server:
        return
    mine, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with theirs:
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        STARTED(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, cwd=ROOT)
    _server.clear()
    _server[os.getpid()] = mine


def _forked(asked, files):
    """The id of a fork, which is a child of this process."""
    with _asking:
        start()
        connection = _server[os.getpid()]
        _prctl(SUBREAPER, 1)
        try:
            _send(connection, asked, files)
            return int.from_bytes(_read(connection, 4), "little")
        finally:
            _prctl(SUBREAPER, 0)


def _prctl(what, value):
    ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def _send(connection, asked, files):
    message = json.dumps(asked).encode()
    connection.sendall(len(message).to_bytes(4, "little"))
    connection.sendmsg([message[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
    connection.sendall(message[1:])


def _received(connection):
    size = int.from_bytes(_read(connection, 4), "little")
    first, files, _, _ = socket.recv_fds(connection, 1, 64)
    return json.loads(first + _read(connection, size - 1)), files


def _read(connection, count):
    read = connection.recv(count, socket.MSG_WAITALL)
    if len(read) < count:
        raise EOFError
    return read


def _serve(connection):
    """Fork commands until the process that asks for them ends, and for others that know its id."""
    with connection, socket.socket(socket.AF_UNIX) as others:
        others.bind(_address(os.getppid()))
        others.listen()
        while True:
            for ready in select.select([connection, others], [], [])[0]:
                asking = connection if ready is connection else others.accept()[0]
                try:
                    asked, files = _received(asking)
                except EOFError:
                    return
                if asked["kind"] != "-c":
                    _import_package()
                if ready is connection:
                    _fork_for(asking, asked, files, [connection, others])
                else:
                    _fork_for_another(asking, asked, files, [connection, others])


def _address(pid):
    return f"\0stgfast tests {pid}"  # without a file


def _fork_for(asking, asked, files, sockets):
    """A child of the process that asks, which takes the child over from the process between them."""
    told, tell = os.pipe()
    between = os.fork()
    if not between:
        child = os.fork()
        if child:
            os.write(tell, child.to_bytes(4, "little"))
            os._exit(0)
        for file in (told, tell, *(each.detach() for each in sockets)):
            os.close(file)
        if asked["kind"] == "-c" or asked["what"] == LAUNCHER:
            _be_served()
        _run(asked, files)
    for file in (*files, tell):
        os.close(file)
    os.waitpid(between, 0)
    asking.sendall(os.read(told, 4))
    os.close(told)


def _fork_for_another(asking, asked, files, sockets):
    """A child of a process that waits for it, and sends its exit code."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    with asking:
        if not os.fork():
            child = os.fork()
            if not child:
                for each in (*sockets, asking):
                    os.close(each.detach())
                _run(asked, files)
            for each in (*map(socket.socket.detach, sockets), *files):
                os.close(each)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with suppress(OSError):
                asking.sendall(code.to_bytes(4, "little", signed=True))
            os._exit(0)
    for file in files:
        os.close(file)


def instead(owner):
    """Run a worker of Ray as a fork, from a Python that Ray has started for it. Its other programs run as they are."""
    arguments = sys.argv[1:]
    if os.path.basename(arguments[0]) != WORKER:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        for _ in range(600):  # it may still import
            if server.connect_ex(_address(owner)) == 0:
                break
            time.sleep(0.1)
        given = {"kind": "file", "what": arguments[0], "arguments": arguments[1:], "buffered": True, "parent": None}
        more = {"folder": os.getcwd(), "environment": dict(os.environ), "session": False, "files": [0, 1, 2]}
        _send(server, given | more, [0, 1, 2])
        sys.exit(int.from_bytes(_read(server, 4), "little", signed=True))


def _be_served():
    """Let the processes that this one starts be forks of another one, which has run nothing."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    mine, theirs = socket.socketpair()
    if not os.fork():
        mine.close()
        _serve(theirs)
        os._exit(0)
    theirs.close()
    _server[os.getpid()] = mine
    subprocess.Popen = subprocess_handler.Popen = Popen


def _import_libraries():
    import gc

    import torch.distributed.run

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # of the tests
    import av  # noqa: F401
    import diffusers
    import functorch.compile  # noqa: F401  (torch.compile imports it)
    import hypothesis  # noqa: F401
    import torch._inductor.cudagraph_trees  # (a guided call of compiled blocks imports it)
    import transformers

    names = ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "LTXPipeline", "WanPipeline", "WanTransformer3DModel")
    assert all(getattr(diffusers, name) for name in names)
    assert all(getattr(transformers, name) for name in ("AutoTokenizer", "T5EncoderModel", "UMT5EncoderModel"))
    gc.collect()
    gc.freeze()


def _import_package():
    logging.disable()  # about libraries that are not installed
    for name in ("stgfast.bench.ranks", "tests.ranks.jobs", "tests.render.killed"):
        importlib.import_module(name)

    logging.disable(logging.NOTSET)


def _run(asked, files):
    """Run a program as Python does. Never returns."""
    code = 1
    try:
        while asked["parent"] not in (None, os.getppid()):  # as soon as the process between them has ended
            os.kill(asked["parent"], 0)
            time.sleep(0.0005)
        _become(asked, files)
        try:
            _program(asked["kind"], asked["what"])
            code = 0
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)  # noqa: T201
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _program(kind, what):
    if kind == "file":
        runpy.run_path(what, run_name="__main__")
    elif kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("stgfast", "tests")]:
            if name != __name__:
                del sys.modules[name]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


def _become(asked, files):
    import torch

    above = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 500) for file in files]
    for mine, number in zip(above, asked["files"], strict=True):
        os.dup2(mine, number, inheritable=True)
    for file in (*above, *(file for file in files if file not in asked["files"])):
        os.close(file)
    if asked["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    what = "-c" if asked["kind"] == "-c" else asked["what"]
    _prctl(NAME, what.rpartition(".")[2].encode())
    sys.argv = [what, *asked["arguments"]]
    sys.path[0] = {"-c": "", "-m": os.getcwd(), "file": os.path.dirname(what)}[asked["kind"]]
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in more if folder and folder not in sys.path]
    sys.stdout.reconfigure(line_buffering=False, write_through=not asked["buffered"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


if __name__ == "__main__":
    own = importlib.import_module("tests.forks")  # not `__main__`, which a fork replaces
    own._import_libraries()
    own._serve(socket.socket(fileno=int(sys.argv[1])))
