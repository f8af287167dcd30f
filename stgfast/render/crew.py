"""What renders a run's batches: a worker in this process, a child process, or actors of a cluster. The run does not
need to know.
"""

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
    """One device that takes batches, several at a time."""

    @property
    def device_name(self) -> str:
        """The device for which memory limits are remembered: another card may hold more."""

    @property
    def where(self) -> dict[str, Any]:
        """What the listener learns about it."""

    @property
    def idle(self) -> bool:
        """Whether it has no batch."""

    @property
    def place(self) -> str:
        """Its number among several: a job whose process died goes to another one."""

    def start(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Take a batch; `ahead` are prompts that come later."""


class Crew(Protocol):
    """All devices of a run. A `Worker` is a crew of one, and its own seat."""

    stopping: bool
    aborting: bool

    @property
    def alike(self) -> bool:
        """Whether all its devices have the same memory."""

    @property
    def busy(self) -> bool:
        """Whether an outcome is still to come."""

    @property
    def places(self) -> int:
        """The number of devices that take batches."""

    def free(self) -> Sequence[Seat]:
        """The devices that take another batch, beginning with the one that has fewest."""

    def progress(self) -> list[Progress]:
        """The progress of unfinished batches."""

    def expire(self, batch: Batch, why: str) -> None:
        """Abort a batch as soon as its thread can be interrupted."""

    def replace(self, batch: Batch, why: str) -> None:
        """Abort a batch that could not be interrupted in time, together with its process if it has one of its own."""

    def outcome(self, seconds: float) -> Outcome | None:
        """The outcome of some jobs, if it is known within this time."""

    def stop(self) -> None:
        """Finish batches that denoise, release the others."""

    def abort(self) -> None:
        """Abort all batches at once."""

    def close(self, seconds: float) -> None:
        """Stop writing, and wait no longer than this."""


@dataclass(frozen=True)
class Setup:
    """Everything from which a worker is made, on this machine or another."""

    model: Model
    form: Form
    own_fps: bool
    loading: Loading = USUAL

    def worker(self, scratch: Path, others: Others | None = None) -> Worker:
        """Make the worker. `scratch` is created if needed. `others` make each clip together with it: all of them
        have a worker, or none.
        """
        with nullcontext() if others is None else others.ranks.together():
            scratch.mkdir(exist_ok=True)
            pipe = self.model.load(self.loading)
            fps = self.model.fps if self.own_fps else None
            text = self.loading.offload == TEXT
            revision = self.model.revision
            return Worker(pipe, scratch, self.form, fps=fps, offload_text=text, revision=revision, others=others)
