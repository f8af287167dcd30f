"""Who renders a run's batches: one worker in this process, or actors of a cluster. The run does not know which."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stgfast.queue.batches import Batch
from stgfast.render.files import Form
from stgfast.render.loading import TEXT, USUAL, Loading
from stgfast.render.models import Model
from stgfast.render.outcomes import Outcome, Progress, Prompt
from stgfast.render.worker import Others, Worker


class Seat(Protocol):
    """One device that takes batches, of which it has some in hand at a time."""

    @property
    def device_name(self) -> str:
        """What memory is remembered for: another card may hold more."""

    @property
    def where(self) -> dict[str, Any]:
        """What the listener is told of it."""

    @property
    def idle(self) -> bool:
        """Whether it has no batch in hand."""

    @property
    def place(self) -> str:
        """Which of several it is: a job that a process died of goes to another one."""

    def start(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Take a batch; `ahead` are prompts that come later."""


class Crew(Protocol):
    """All devices of a run. A `Worker` is a crew of one, and its own seat."""

    stopping: bool
    aborting: bool

    @property
    def alike(self) -> bool:
        """Whether what one of its devices has no memory for, none has."""

    @property
    def busy(self) -> bool:
        """Whether there is an outcome to come."""

    @property
    def places(self) -> int:
        """How many of its devices take batches."""

    def free(self) -> Sequence[Seat]:
        """Those that take another batch, beginning with the one that has fewest in hand."""

    def progress(self) -> list[Progress]:
        """How far the batches in hand are."""

    def expire(self, batch: Batch, why: str) -> None:
        """A batch is put down as soon as the thread that renders it can be."""

    def replace(self, batch: Batch, why: str) -> None:
        """A batch that was not put down in time, with the process that renders it, where it has one of its own."""

    def outcome(self, seconds: float) -> Outcome | None:
        """What became of some jobs, if that is known within this time."""

    def stop(self) -> None:
        """Batches in hand are finished, others put down."""

    def abort(self) -> None:
        """Every batch is put down at once."""

    def close(self, seconds: float) -> None:
        """Nothing writes any more, or is not waited for longer than this."""


@dataclass(frozen=True)
class Setup:
    """Everything that a worker is made of, on this machine or another."""

    model: Model
    form: Form
    own_fps: bool
    loading: Loading = USUAL

    def worker(self, scratch: Path, others: Others | None = None) -> Worker:
        """`scratch` is made where it is not there. `others` make every clip with it: each has a worker of its own, or
        none has one."""
        with nullcontext() if others is None else others.ranks.together():
            scratch.mkdir(exist_ok=True)
            pipe = self.model.load(self.loading)
            fps = self.model.fps if self.own_fps else None
            text = self.loading.offload == TEXT
            revision = self.model.revision
            return Worker(pipe, scratch, self.form, fps=fps, offload_text=text, revision=revision, others=others)
