"""The child process that renders: it loads the model, and makes the batches that it receives. It ends with its
parent.

    parent to child     Begin, then (name of a method of the worker, its arguments)
    child to parent     Ready or an error, then outcomes, and lists of Progress whenever they are asked for
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENDED = 70  # exit code of a child that has reported its error


@dataclass(frozen=True)
class Begin:
    """The first message to a child, beside the setup of its worker. `bars`: it may show progress bars of loading."""

    scratch: Path
    bars: bool


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    device_name: str


def main(handle: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent ends this process
    parent = Connection(handle)
    sys.path[:], begin = parent.recv()
    _end_with_parent()
    os.dup2(2, 1)  # output of libraries must not mix with that of a run
    sending = threading.Lock()

    def send(message: Any) -> None:
        try:
            with sending:
                parent.send(message)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(ENDED)

    try:
        setup = parent.recv()
        if not begin.bars:
            from stgfast.render.loading import without_bars

            without_bars()
        worker = setup.worker(begin.scratch)
    except Exception as error:
        send(plain(error))
        return ENDED
    send(Ready(worker.device_name))

    def listen() -> None:
        while True:
            try:
                name, *arguments = parent.recv()
            except (EOFError, OSError):
                os._exit(ENDED)
            if name == "progress":
                send(worker.progress())
            else:
                getattr(worker, name)(*arguments)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        outcome = worker.outcome(60.0)
        if outcome is not None:
            send(_plain_within(outcome))


def _plain_within(outcome: Any) -> Any:
    from stgfast.render.outcomes import Stopped

    if isinstance(outcome, Stopped) and outcome.error is not None:
        return Stopped(outcome.tasks, plain(outcome.error))
    return outcome


def plain(error: BaseException) -> BaseException:
    """An error that can be sent to another process and keeps its kind there."""
    from stgfast.errors import DeviceError, LoadError, SettingsError, UnsupportedPipelineError, one_line

    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    if type(error) in (DeviceError, LoadError, SettingsError, UnsupportedPipelineError):
        return error
    why = one_line(error)
    kinds = (LoadError, SettingsError, UnsupportedPipelineError, DeviceError)
    return next((kind(why) for kind in kinds if isinstance(error, kind)), DeviceError(why))


def _end_with_parent() -> None:
    """Let the kernel end this process with its parent, whatever this process does."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        death_signal = 1
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


if __name__ == "__main__":
    # Import under its own name, by which pickled classes are found.
    from stgfast.render.child import main as run

    sys.exit(run(int(sys.argv[1])))
