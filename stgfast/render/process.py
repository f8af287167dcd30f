"""A worker in a child process, as a crew: if it hangs or dies, another process replaces it.

Only this process has the state of the folder. The child writes clips into a temporary folder of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from stgfast.errors import DeviceError
from stgfast.queue.batches import Batch, takes_more
from stgfast.queue.store import Store
from stgfast.render.batch_run import STAGES
from stgfast.render.child import Begin, Ready
from stgfast.render.crew import Setup
from stgfast.render.hands import LIVES, LOADING, Hand, brought, silent
from stgfast.render.outcomes import Died, Expired, Outcome, Progress, Prompt, Stopped, tasks_of


class OwnProcess:
    """One child process at a time. It is its own seat."""

    alike = True
    places = 1
    place = ""

    def __init__(self, setup: Setup, store: Store, tell: Callable[..., None], *, bars: bool = True):
        self.setup, self.scratch, self.lock, self.tell, self.bars = setup, store.scratch, store.lock, tell, bars
        self.stopping = self.aborting = self.told_to_stop = False
        self.found: deque[Outcome] = deque()
        self.hands: list[Hand] = []
        self.asked = 0.0  # when progress was requested, if there is no answer yet
        self.started = self.deaths = 0
        self.device_name = ""
        self._start()

    def _start(self) -> None:
        self.started += 1
        self.folder = self.scratch / f"process-{self.started}"
        self.folder.mkdir()
        self.ready, self.asked, self.since = False, 0.0, time.monotonic()
        self.connection, theirs = Pipe()
        with theirs:
            # The child inherits the lock of this run, because it may write as long as it lives.
            handles = (theirs.fileno(), self.lock)
            command = [sys.executable, "-m", "stgfast.render.child", str(theirs.fileno())]
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=handles, env=environment)
        self._send(sys.path, Begin(self.folder, self.bars))
        self._send_one(self.setup)

    @property
    def busy(self) -> bool:
        return bool(self.found or self.hands)

    @property
    def idle(self) -> bool:
        return not self.hands

    @property
    def where(self) -> dict[str, Any]:
        return {"device": self.device_name, "pid": self.process.pid}

    def free(self) -> Sequence[OwnProcess]:
        return [self] if self.ready and takes_more((hand.batch for hand in self.hands), len(STAGES)) else []

    def start(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        self.hands.append(Hand(batch))
        self._send("start", batch, ahead)

    def outcome(self, seconds: float) -> Outcome | None:
        if self.stopping and not self.told_to_stop:
            self.told_to_stop = True
            self._send("stop")
        if not self.found:
            self._listen(seconds)
        if not self.ready and time.monotonic() - self.since > LOADING:
            self._end(f"the model was not loaded after {LOADING:g} s")
        return self.found.popleft() if self.found else None

    def progress(self) -> list[Progress]:
        """The last progress of the child, and the time since then: one that hangs reports none."""
        if self.ready and not self.asked and self.hands:
            self.asked = time.monotonic()
            self._send("progress")
        elif self.asked and (why := silent(self.hands, self.asked)):
            self._end(why)
        return [hand.progress(alone=len(self.hands) == 1) for hand in self.hands]

    def expire(self, batch: Batch, why: str) -> None:
        self._send("expire", batch, why)

    def replace(self, batch: Batch, why: str) -> None:
        overdue = [hand for hand in self.hands if hand.batch == batch]
        self.hands = [hand for hand in self.hands if hand.batch != batch]
        self.found.extend(Expired(hand.left(), why) for hand in overdue)
        self.found.extend(Stopped(hand.left()) for hand in self.hands)  # they wait again, and are not at fault
        self.hands = []
        self.tell("replaced", pid=self.process.pid, why=why)
        self._kill()
        self._start()

    def stop(self) -> None:
        self.stopping = True  # this may be in a signal handler: the child learns of it at the next check

    def abort(self) -> None:
        self.stopping = self.aborting = True

    def close(self, seconds: float) -> None:
        """End the process. What it has not finished is discarded."""
        self._kill()

    def _send(self, *message: Any) -> None:
        self._send_one(message)

    def _send_one(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):  # noticed at the next read
            return

    def _listen(self, seconds: float) -> None:
        try:
            if not self.connection.poll(seconds):
                return
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._end(_ending(self.process))
            return
        if isinstance(message, Ready):
            self.ready, self.device_name = True, message.device_name
            self.tell("ready", **self.where)
        elif isinstance(message, BaseException):
            self.found.append(Stopped((), message))
        elif isinstance(message, list):
            self.asked = 0.0
            for hand in self.hands:
                hand.hear(message)
        else:
            self._heard(message)

    def _heard(self, outcome: Outcome) -> None:
        if isinstance(outcome, Stopped) and outcome.error is not None and not isinstance(outcome.error, OSError):
            self._end(str(outcome.error))  # the device is unusable for this process
            return
        outcome = brought(outcome, self.scratch)
        tasks = tasks_of(outcome)
        settled = {task.id for task in tasks}
        for hand in self.hands:
            hand.settled |= settled
        self.hands = [hand for hand in self.hands if hand.left()]
        self.deaths = 0
        self.found.append(outcome)

    def _end(self, why: str) -> None:
        """Handle a process that died or is useless, and start another one."""
        self._kill()
        left = tuple(task for hand in self.hands for task in hand.left())
        self.hands = []
        if left:
            self.found.append(Died(left, why))
        self.deaths += 1
        if self.deaths >= LIVES:
            error = DeviceError(f"the worker process died {LIVES} times in a row, the last time because: {why}")
            self.found.append(Stopped((), error))
        elif not self.stopping:
            self.tell("replaced", pid=self.process.pid, why=why)
            self._start()

    def _kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    name = signal.Signals(-code).name
    more = ", as the system does when memory is short" if name == "SIGKILL" else ""
    return f"the worker process was ended by {name}{more}"
