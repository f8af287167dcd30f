"""Batches that another process renders, as this one knows them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from stgfast.queue.batches import Batch, Task
from stgfast.queue.placing import discard
from stgfast.render.outcomes import Outcome, Progress, Written

LIVES = 5  # a process that died so often in a row, while it loads or with no job settled in between, is given up
LOADING = 2 * 3600.0  # seconds that loading a model may take, with downloading it


def silent(hands: Sequence[Hand], asked: float) -> str:
    """Why a process of several batches is given up that was asked how far they are, and did not answer.

    Nobody knows which of them it is. One alone is timed by itself.
    """
    since = time.monotonic() - asked
    limits = [hand.batch.limit or hand.batch.quiet for hand in hands]
    if len(hands) < 2 or any(limit is None or since <= limit for limit in limits):
        return ""
    return f"the process that renders did not answer for {max(limit or 0.0 for limit in limits):g} s"


def brought(outcome: Outcome, scratch: Path) -> Outcome:
    """An outcome of another process, whose clip, if there is one, is in the run's own folder now."""
    if not isinstance(outcome, Written):
        return outcome
    path = scratch / outcome.task.file
    discard(path)
    os.rename(outcome.path, path)
    return dataclasses.replace(outcome, path=path)


@dataclasses.dataclass
class Hand:
    """A batch that another process has.

    aside  the folder into which it writes the clips of this batch, where that is not one for all
    """

    batch: Batch
    aside: Path | None = None
    settled: set[int] = dataclasses.field(default_factory=set)
    said: Progress | None = None
    at: float = dataclasses.field(default_factory=time.monotonic)  # when that was said, or the batch was sent

    def left(self) -> tuple[Task, ...]:
        return tuple(task for task in self.batch.tasks if task.id not in self.settled)

    def hear(self, said: Iterable[Progress]) -> None:
        """What the process says of how far its batches are."""
        for progress in said:
            if progress.batch == self.batch:
                self.said, self.at = progress, time.monotonic()

    def progress(self, *, alone: bool) -> Progress:
        """As it was said, and the time since; a batch that waits for others is not timed. `alone`: there are none."""
        since = time.monotonic() - self.at
        if self.said is None:
            return Progress(self.batch, "", 0, 0, *((since, since) if alone else (0.0, 0.0)))
        since = since if self.said.stage else 0.0
        return dataclasses.replace(self.said, seconds=self.said.seconds + since, quiet=self.said.quiet + since)
