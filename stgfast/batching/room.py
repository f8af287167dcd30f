"""How many rows a block computes at once: what fits into memory without guidance fits with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALL = "all"
Rows = int | str | None  # a limit, ALL, or None for what fits
SPARE = 1.25  # factor of free memory over the counted one: an allocator cannot use all of it


class Room:
    """The limit of one run. If none was asked for, blocks compute no more rows at once than in the pipeline's own
    calls, until a call on a GPU has shown how much memory rows take and that there is enough for all.
    """

    def __init__(self, asked: Rows):
        self.asked = asked
        self._per_row: float | None = None  # bytes, if known
        self._limit: int | None = None

    def rows(self, own: int, stacked: int, device: torch.device) -> int | None:
        """The largest number of rows for a call with `own` rows that is stacked to `stacked`; None for no limit."""
        if self.asked is not None:
            return None if self.asked == ALL else int(self.asked)
        self._limit = own
        if self._per_row is None or stacked <= own:
            return own
        return None if SPARE * self._per_row * (stacked - own) <= _free(device) else own

    @contextmanager
    def watched(self, device: torch.device) -> Iterator[None]:
        """Measure, within the block, how much memory the first call on a GPU takes."""
        if self.asked is not None or self._per_row is not None or device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(device)
        yield
        # The peak since the process started, an upper limit of the peak since then.
        taken = torch.cuda.max_memory_allocated(device) - before
        self._per_row = taken / max(self._limit or 1, 1)


def _free(device: torch.device) -> int:
    """The free bytes on a GPU, including those that torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
