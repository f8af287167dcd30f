"""Batches that another process renders, as seen by this one."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from stgfast.queue.batches import Batch, Task
from stgfast.queue.placing import discard
from stgfast.render.outcomes import Outcome, Progress, Written

LIVES = 5  # a process is given up after this many deaths in a row without a finished job
LOADING = 2 * 3600.0  # seconds for loading a model, including its download


def silent(hands: Sequence[Hand], asked: float) -> str:
    """Why a process with several batches is given up: it did not answer when asked for progress.

    Nobody knows which batch is the cause. A single batch has a time limit of its own.
    """
    since = time.monotonic() - asked
    limits = [hand.batch.limit or hand.batch.quiet for hand in hands]
    if len(hands) < 2 or any(limit is None or since <= limit for limit in limits):
        return ""
    return f"the worker process did not answer for {max(limit or 0.0 for limit in limits):g} s"


def brought(outcome: Outcome, scratch: Path) -> Outcome:
    """An outcome of another process, with its clip, if any, in the run's own folder."""
    if not isinstance(outcome, Written):
        return outcome
    path = scratch / outcome.task.file
    discard(path)
    os.rename(outcome.path, path)
    return dataclasses.replace(outcome, path=path)


@dataclasses.dataclass
class Hand:
    """A batch in another process.

    Attributes:
        aside: the temporary folder for this batch, if there is not one for all.
    """

    batch: Batch
    aside: Path | None = None
    settled: set[int] = dataclasses.field(default_factory=set)
    last: Progress | None = None
    at: float = dataclasses.field(default_factory=time.monotonic)  # when that was reported, or the batch was sent

    def left(self) -> tuple[Task, ...]:
        return tuple(task for task in self.batch.tasks if task.id not in self.settled)

    def hear(self, reports: Iterable[Progress]) -> None:
        """Store the progress that the process reports."""
        for progress in reports:
            if progress.batch == self.batch:
                self.last, self.at = progress, time.monotonic()

    def progress(self, *, alone: bool) -> Progress:
        """The reported progress, and the time since then. A batch that waits for others is not timed. `alone`: there
        are none.
        """
        since = time.monotonic() - self.at
        if self.last is None:
            return Progress(self.batch, "", 0, 0, *((since, since) if alone else (0.0, 0.0)))
        since = since if self.last.stage else 0.0
        return dataclasses.replace(self.last, seconds=self.last.seconds + since, quiet=self.last.quiet + since)
