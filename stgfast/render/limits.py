"""Time limits of batches, and aborting those that exceed them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence

from stgfast.queue.batches import Batch, Task, shape_of
from stgfast.queue.store import Store
from stgfast.render.crew import Crew
from stgfast.render.outcomes import Progress

# A batch may take this multiple of the slowest clip of its shape, for each of its clips, but at least this
# many seconds. If no clip was rendered yet, this many seconds without a step or other progress.
GENEROUS, LEAST, QUIET = 30.0, 600.0, 3600.0
GRACE = 30.0  # seconds for a batch to end, before its process is killed
MORE = "--timeout gives it another limit"


class Limits:
    """The batches of a run and their time.

    Attributes:
        timeout: the seconds for each clip of a batch; None for what is known of its shape.
    """

    def __init__(self, timeout: float | None, tell: Callable[..., None]):
        self.timeout, self.tell = timeout, tell
        self.overdue: dict[int, float] = {}  # since when batches are being aborted, by their first job

    def on(self, batch: Batch, store: Store) -> Batch:
        """The batch with its time limit."""
        if self.timeout is not None:
            return dataclasses.replace(batch, limit=self.timeout * len(batch))
        slowest = store.slowest(batch.tasks[0].model, shape_of(batch.tasks[0].job))
        if slowest is None:
            return dataclasses.replace(batch, quiet=QUIET)
        return dataclasses.replace(batch, limit=max(LEAST, GENEROUS * slowest * len(batch)))

    def enforce(self, crew: Crew, progress: Sequence[Progress], cancelled: Collection[int]) -> None:
        """Abort batches that take too long, or whose jobs were all cancelled."""
        now = time.monotonic()
        for each in progress:
            batch = each.batch
            unwanted = all(task.id in cancelled for task in batch.tasks)
            why = "it was cancelled" if unwanted else _too_long(each)
            if not why:
                continue
            since = self.overdue.setdefault(batch.tasks[0].id, now)
            if since == now:
                self.tell("overdue", files=[task.file for task in batch.tasks], why=why)
                crew.expire(batch, why)
            elif now - since > GRACE:
                crew.replace(batch, why)

    def settled(self, task: Task) -> None:
        self.overdue.pop(task.id, None)


def _too_long(progress: Progress) -> str:
    """Why a batch is aborted, if it is."""
    batch = progress.batch
    step = f", step {progress.step} of {progress.steps}" if progress.steps else ""
    at = f"in {progress.stage or 'its first stage'}{step}"
    if batch.limit is not None and progress.seconds > batch.limit:
        return f"it took longer than {batch.limit:g} s ({at}); {MORE}"
    if batch.quiet is not None and progress.quiet > batch.quiet:
        return f"it made no progress for {batch.quiet:g} s ({at}); {MORE}"
    return ""
