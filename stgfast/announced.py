"""Pipelines that ask for their weak branches themselves, pass after pass, and combine what they get.

The first pass that has the conditional rows computes, as one stack, what the passes after it are going to ask for;
these are answered from what is held. How the results are combined stays the pipeline's, or its guider's, own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Branch, Plan, make_plan
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.engine import Run
from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Announced, Passes


class Answering:
    """What becomes of the calls of one run of such a pipeline."""

    def __init__(self, announced: Announced, guidance: Guidance):
        self.announced, self.guidance = announced, guidance

    def begin(self, run: Run, name: str) -> AnsweringStep:
        passes = self.announced.passes(run.pipe, run.call, self.guidance, run.moment(), name)
        return AnsweringStep(run, name, passes)

    def weak_layers(self, layout: Layout) -> Collection[int | None]:
        return {unit.layer for unit in layout.units}  # what will be asked for is known only later


class AnsweringStep:
    """One step while it lasts."""

    def __init__(self, run: Run, name: str, passes: Passes):
        self.run, self.name, self.passes, self.calls = run, name, passes, passes.turns
        self.held: dict[str, Any] = {}  # the output for every branch that was computed and not asked for yet

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        asked = self.calls[turn]
        if not set(asked) <= self.held.keys():
            plan = plan_of(self.passes, asked, self.run.layouts[self.name])
            output = self.run.compute(self.name, plain, arguments, asked, plan)
            branches = [branch.name for branch in plan.branches]
            self.held |= {name: _part(output, number, len(branches)) for number, name in enumerate(branches)}
        return _mapped(lambda *parts: join(parts), *(self.held.pop(branch) for branch in asked))


def plan_of(passes: Passes, asked: Sequence[str], layout: Layout) -> Plan:
    """The plan of a pass: what it asks for, and with the conditional branch all that are weak copies of it."""
    branches = [Branch(name, name) for name in asked]
    if COND in asked:
        branches += [Branch(name, COND, layout.marks(part) if part else {}) for name, part in passes.weak.items()]
    return make_plan(branches, layout.depth, full=layout.blocks.full)


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
