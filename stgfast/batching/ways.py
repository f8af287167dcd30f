"""How an attention with identity rows is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from torch import nn

from stgfast.batching.layout import Layout
from stgfast.batching.one_call import inputs_of, saves, unfit
from stgfast.batching.plan import Plan
from stgfast.batching.rows import chunks
from stgfast.kernels.backends import triton_runs
from stgfast.kinds import Mark, kind_of


class Way(Enum):
    """How an attention with identity rows is computed, in words.

    Attributes:
        ONE: one call of `masked_attention` for all rows. Used where that is one launch (on a GPU, in Triton's
            interpreter), or where it projects less.
        OWN: the same, by the family's own code in place of the module's.
        APART: rows that do not attend only use the projections of values and output.
    """

    ONE = "all rows in one call of the module"
    OWN = "all rows in one call, in place of the module's own"
    APART = "attending rows in one call of the module, only values for the others"


class Rows(NamedTuple):
    """The number of rows of a call: different inputs, rows that attend, rows that are V."""

    inputs: int
    attending: int
    masked: int


def way_of(layout: Layout, attention: nn.Module, device: str, rows: Rows) -> Way:
    """How a call on this device type is computed."""
    fused, both = triton_runs(device), bool(rows.attending and rows.masked)
    if layout.attend is not None:
        return Way.OWN if device in layout.blocks.attend_on or (both and fused) else Way.APART
    if not both or unfit(attention):
        return Way.APART
    return Way.ONE if fused or saves(*rows) else Way.APART


def along(layout: Layout, marks: Sequence[Mark | None], axis: str) -> list[Mark | None]:
    """The mark of each row, if it changes attention along this axis."""
    return [
        mark if mark is not None and layout.inside(mark) and kind_of(mark).concerns(mark, axis) else None
        for mark in marks
    ]


def together(marks: Sequence[Mark | None]) -> list[int]:
    """The rows that one call could have: those that attend, and those that are V."""
    return [row for row, mark in enumerate(marks) if mark is None or kind_of(mark).values]


def counted(marks: Sequence[Mark | None], inputs: Sequence[int]) -> Rows:
    """The rows of such a call, each with its mark and its input."""
    attending = sum(mark is None for mark in marks)
    return Rows(len(set(inputs)), attending, len(marks) - attending)


def ways(layout: Layout, plan: Plan, most: int, device: str) -> Iterator[tuple[int, Way, str]]:
    """For each attention with identity rows in a plan: its block, how it is computed, and why not otherwise. `most`
    limits the rows that a block computes at once.
    """
    for number, (unit, step) in enumerate(zip(layout.units, plan.steps, strict=True)):
        for part in chunks(len(step.marks), most) if any(step.marks) else ():
            inputs: Sequence[int] = step.run[part]
            for axis, attention in unit.attentions:
                marks = along(layout, step.marks[part], axis)
                rows = [row for row in together(marks) if any(marks)]
                count = counted([marks[row] for row in rows], inputs_of(attention, rows, inputs))
                if count.masked:
                    yield number, way_of(layout, attention, device, count), unfit(attention)
                if any(marks):
                    inputs = range(len(marks))
