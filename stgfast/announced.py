"""Pipelines that ask for their weak branches themselves, pass after pass, and combine what they get.

The first pass that has the conditional rows computes, as one stack, what the passes after it are going to ask for;
these are answered from what is held. How the results are combined stays the pipeline's, or its guider's, own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Branch, Plan, make_plan
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.engine import GuidedRun
from stgfast.guidance import COND
from stgfast.integrations.spec import Passes


class AnnouncedRun(GuidedRun):
    """One call of such a pipeline while it runs."""

    def _denoise(self, name: str, plain: Call, arguments: Arguments) -> Any:
        """Stands in for a denoiser."""
        if self.turn == 0:
            self._begin_step(name)
        asked = self.passes.turns[self.turn]
        if not set(asked) <= self.held.keys():
            plan = plan_of(self.passes, asked, self.layout)
            output = self._compute(plain, arguments, asked, plan)
            branches = [branch.name for branch in plan.branches]
            self.held |= {name: _part(output, number, len(branches)) for number, name in enumerate(branches)}
        self.turn = (self.turn + 1) % len(self.passes.turns)
        self.step += self.turn == 0
        return _mapped(lambda *parts: join(parts), *(self.held.pop(branch) for branch in asked))

    def _begin_step(self, name: str) -> None:
        self.name, self.layout = name, self.layouts[name]
        assert self.adapter.passes is not None
        self.passes: Passes = self.adapter.passes(self.pipe, self.call, self.guidance, self._moment(), name)
        self.held: dict[str, Any] = {}  # the output for every branch that was computed and not asked for yet

    def _masked(self, layout: Layout) -> set[int | None]:
        return {unit.layer for unit in layout.units}  # what will be asked for is known only later


def plan_of(passes: Passes, asked: Sequence[str], layout: Layout) -> Plan:
    """The plan of a pass: what it asks for, and with the conditional branch all that are weak copies of it."""
    branches = [Branch(name, name) for name in asked]
    if COND in asked:
        branches += [Branch(name, COND, layout.marks(part) if part else {}) for name, part in passes.weak.items()]
    return make_plan(branches, layout.depth, full=layout.full)


def _part(output: Any, number: int, of: int) -> Any:
    return _mapped(lambda tensor: tensor.chunk(of)[number], output)


def _mapped(change: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Outputs of a denoiser as one, in their form: a tensor, a tuple, or fields by name."""
    if isinstance(first, Tensor):
        return change(first, *others)
    if isinstance(first, tuple):
        return tuple(_mapped(change, *parts) for parts in zip(first, *others, strict=True))
    return type(first)(
        **{name: _mapped(change, part, *(other[name] for other in others)) for name, part in first.items()}
    )
