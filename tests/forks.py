"""Commands of this package that tests start. Each is a fork of one process that has imported everything: the imports
take seconds of processor time.

A forked command has the arguments, environment, folder and open files that it would have as a new process, and is a
child of the process that started it. `python -c` is a new process, and so are processes that a command starts, except
those of torchrun.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHER = "torch.distributed.run"  # its processes are forks too
MODULES = (LAUNCHER, "stgfast.cli", "stgfast.render.child", "tests.render.killed", "tests.render.tiny")
LIGHT = "serve"  # a command without torch
SUBREAPER = 36  # of Linux: orphans of this process's descendants become its children
STARTED = subprocess.Popen
GIVEN = list(inspect.signature(STARTED._execute_child).parameters)[1:]


class Popen(STARTED):
    """`subprocess.Popen`, where a command of this package is forked."""

    def _execute_child(self, *values):
        given = dict(zip(GIVEN, values, strict=True))
        parts = _parts(given)
        if parts is None:
            return super()._execute_child(*values)
        flags, module, arguments = parts
        streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        kept = {number: number if mine == -1 else mine for number, mine in enumerate(streams)}
        kept |= {number: number for number in given["pass_fds"]}
        asked = {
            "parent": os.getpid(),
            "module": module,
            "arguments": [os.fspath(each) for each in arguments],
            "buffered": "-u" not in flags,
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
    """Flags, module and arguments of a command that can be forked; None of another one."""
    command = given["args"]
    if isinstance(command, str | bytes) or not command or command[0] != sys.executable or "-m" not in command:
        return None
    at = list(command).index("-m")
    flags, module, arguments = command[1:at], command[at + 1], command[at + 2 :]
    if given["shell"] or given["preexec_fn"] is not None or not set(flags) <= {"-u"} or sys.platform != "linux":
        return None
    return (flags, module, arguments) if module in MODULES and LIGHT not in arguments[:1] else None


_server: dict[int, socket.socket] = {}


def _forked(asked, files):
    """The id of a fork, which is a child of this process."""
    if os.getpid() not in _server:
        mine, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        with theirs:
            command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
            STARTED(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, cwd=ROOT)
        _server.clear()
        _server[os.getpid()] = mine
    connection = _server[os.getpid()]
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        message = json.dumps(asked).encode()
        connection.sendall(len(message).to_bytes(4, "little"))
        connection.sendmsg([message[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        connection.sendall(message[1:])
        pid = int.from_bytes(_read(connection, 4), "little")
    finally:
        prctl(SUBREAPER, 0, 0, 0, 0)
    return pid


def _read(connection, count):
    read = connection.recv(count, socket.MSG_WAITALL)
    if len(read) < count:
        raise EOFError
    return read


def _serve(connection):
    """Fork commands until the process that asks for them ends."""
    while True:
        try:
            size = int.from_bytes(_read(connection, 4), "little")
        except EOFError:
            return
        first, files, _, _ = socket.recv_fds(connection, 1, 64)
        asked = json.loads(first + _read(connection, size - 1))
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            child = os.fork()
            if child:
                os.write(tell, child.to_bytes(4, "little"))
                os._exit(0)
            for file in (told, tell, connection.detach()):
                os.close(file)
            if asked["module"] == LAUNCHER:
                _launch()
            _run(asked, files)
        for file in (*files, tell):
            os.close(file)
        os.waitpid(between, 0)  # now the child has its parent
        connection.sendall(os.read(told, 4))
        os.close(told)


def _launch():
    """Let the processes that this one starts be forks of another one, which has run nothing."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    mine, theirs = socket.socketpair()
    if not os.fork():
        mine.close()
        _serve(theirs)
        os._exit(0)
    theirs.close()
    _server[os.getpid()] = mine
    subprocess_handler.Popen = Popen


def _import_everything():
    import gc

    import av  # noqa: F401
    import diffusers
    import transformers

    import tests.render.killed  # noqa: F401

    names = ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "LTXPipeline", "WanPipeline", "WanTransformer3DModel")
    assert all(getattr(diffusers, name) for name in names)
    assert all(getattr(transformers, name) for name in ("AutoTokenizer", "T5EncoderModel", "UMT5EncoderModel"))
    gc.collect()
    gc.freeze()


def _run(asked, files):
    """Run a module as `python -m` does. Never returns."""
    code = 1
    try:
        while os.getppid() != asked["parent"]:  # as soon as the process between them has ended
            os.kill(asked["parent"], 0)
            time.sleep(0.0005)
        _become(asked, files)
        sys.modules.pop(asked["module"], None)
        try:
            runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
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
    sys.argv = [asked["module"], *asked["arguments"]]
    sys.path[0] = os.getcwd()
    sys.stdout.reconfigure(line_buffering=False, write_through=not asked["buffered"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


if __name__ == "__main__":
    _import_everything()
    _serve(socket.socket(fileno=int(sys.argv[1])))
