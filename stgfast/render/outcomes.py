"""What becomes of the jobs of a batch, and how far it is."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

from stgfast.queue.batches import Batch, Task


@dataclasses.dataclass(frozen=True)
class Written:
    """A clip that is whole, aside."""

    task: Task
    path: Path
    seconds: dict[str, float]
    remark: str = ""  # what is strange about it


@dataclasses.dataclass(frozen=True)
class Failed:
    """A job that cannot be rendered; `memory`: it takes more than the device has, with nothing else on it."""

    task: Task
    error: str
    seconds: dict[str, float]
    trace: str = ""
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class Again:
    """Jobs that nothing is wrong with, and that are to be rendered another time.

    rows   no more of this shape than so many fit into memory
    apart  each alone: together they cannot, or something is wrong with one of them
    """

    tasks: tuple[Task, ...]
    why: str
    shape: str = ""
    rows: int = 0
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Stopped:
    """Jobs that were put down because the run ends, and the error that ends it."""

    tasks: tuple[Task, ...]
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True)
class Expired:
    """Jobs of a batch that took longer than it may, or that is not wanted any more."""

    tasks: tuple[Task, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class Died:
    """Jobs that were in hand when the process that rendered them ended."""

    tasks: tuple[Task, ...]
    why: str
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a batch is.

    seconds  that it has computed, without those in which it waited for other batches
    quiet    seconds since there was a sign of it: a step, or the beginning of a stage
    """

    batch: Batch
    stage: str
    step: int
    steps: int
    seconds: float
    quiet: float


class Clip(NamedTuple):
    """As the pipeline hands it over."""

    frames: Any
    sound: Any = None
    rate: int = 0


class Clock:
    """How long a batch has computed, without the time in which it waits for others."""

    def __init__(self) -> None:
        self.before, self.since, self.signed = 0.0, time.monotonic(), time.monotonic()
        self.waiting = False

    def go(self) -> None:
        self.since = self.signed = time.monotonic()
        self.waiting = False

    def pause(self) -> None:
        self.before, self.waiting = self.seconds, True

    def sign(self) -> None:
        self.signed = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.waiting else time.monotonic() - self.since)

    @property
    def quiet(self) -> float:
        return 0.0 if self.waiting else time.monotonic() - self.signed


Outcome = Written | Failed | Again | Stopped | Expired | Died
Prompt = tuple[str, str | None]  # and the negative one


def tasks_of(outcome: Outcome) -> tuple[Task, ...]:
    """The jobs that an outcome is about."""
    return (outcome.task,) if isinstance(outcome, (Written, Failed)) else outcome.tasks
