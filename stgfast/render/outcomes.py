"""The results of a batch's jobs, and its progress."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

from stgfast.queue.batches import Batch, Task


@dataclasses.dataclass(frozen=True)
class Written:
    """A whole clip in a temporary place."""

    task: Task
    path: Path
    seconds: dict[str, float]
    remark: str = ""  # what looks strange


@dataclasses.dataclass(frozen=True)
class Failed:
    """A job that cannot be rendered. `memory`: it takes more than the device has, with nothing else on it."""

    task: Task
    error: str
    seconds: dict[str, float]
    trace: str = ""
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class Again:
    """Jobs to render another time, without an error of their own.

    Attributes:
        rows: no more of this shape fit into memory.
        apart: each in a batch of its own: together they cannot be rendered, or one of them has an error.
    """

    tasks: tuple[Task, ...]
    why: str
    shape: str = ""
    rows: int = 0
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Stopped:
    """Jobs that were released because the run ends, and the error that ends it."""

    tasks: tuple[Task, ...]
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True)
class Expired:
    """Jobs of a batch that exceeded its time limit, or that is not wanted any more."""

    tasks: tuple[Task, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class Died:
    """Unfinished jobs of a dead worker."""

    tasks: tuple[Task, ...]
    why: str
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a batch.

    Attributes:
        seconds: of computing, without waiting for other batches.
        quiet: the seconds since the last sign of progress: a step, or the start of a stage.
    """

    batch: Batch
    stage: str
    step: int
    steps: int
    seconds: float
    quiet: float


class Clip(NamedTuple):
    """Frames and audio returned by the pipeline."""

    frames: Any
    sound: Any = None
    rate: int = 0


class Clock:
    """How long a batch has computed, without waiting for others."""

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
Prompt = tuple[str, str | None]  # and its negative prompt


def tasks_of(outcome: Outcome) -> tuple[Task, ...]:
    """The jobs of an outcome."""
    return (outcome.task,) if isinstance(outcome, (Written, Failed)) else outcome.tasks
