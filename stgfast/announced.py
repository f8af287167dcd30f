"""Pipelines that ask for their weak branches themselves, pass after pass, and combine what they get.

The first pass that has the conditional rows computes, as one stack, what the passes after it are going to ask for;
these are answered from what is held, or carried on from earlier steps. How the results are combined stays the
pipeline's, or its guider's, own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Branch, Plan, make_plan, passing
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.engine import Run
from stgfast.forecast import KeptBlocks
from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Announced, Passes
from stgfast.memory import Memory
from stgfast.reuse import KeptDifferences
from stgfast.schedules import Moment


class Answering:
    """What becomes of the calls of one run of such a pipeline."""

    def __init__(self, announced: Announced, guidance: Guidance):
        self.announced, self.guidance = announced, guidance
        self.memory: Memory = memory_for(announced, guidance)
        self.blocks = KeptBlocks(guidance)

    def begin(self, run: Run, name: str) -> AnsweringStep:
        moment = run.moment()
        passes = self.announced.passes(run.pipe, run.call, self.guidance, moment, name)
        if self.guidance.reuses and moment.step in run.noisier:
            self.memory.forget()
            self.blocks.forget()
        self.foresee(passes)
        recalled = self.memory.recalled(passes.differing, moment.step, name)
        skips = self.blocks.skips(passes.branches, moment.step, name)
        return self.step(run, name, passes, self.memory, recalled, self.blocks, skips, moment)

    # Where branches are divided over processes, there is another way for these two.

    def foresee(self, passes: Passes) -> None:
        """What the step that begins is going to ask for."""

    def step(self, *of_step: Any) -> AnsweringStep:
        return AnsweringStep(*of_step)

    def weak_layers(self, layout: Layout) -> Collection[int | None]:
        return {unit.layer for unit in layout.units}  # what will be asked for is known only later


class AnsweringStep:
    """One step while it lasts."""

    def __init__(
        self,
        run: Run,
        name: str,
        passes: Passes,
        memory: Memory,
        recalled: frozenset[str],
        blocks: KeptBlocks,
        skips: bool,
        moment: Moment,
    ):
        self.run, self.name, self.passes, self.calls, self.moment = run, name, passes, passes.turns, moment
        self.memory, self.recalled, self.blocks, self.skips = memory, recalled, blocks, skips
        self.held: dict[str, Any] = {}  # the output for every branch that is known and not asked for yet
        self.cond: tuple[Tensor, ...] = ()

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        asked = self.calls[turn]
        if not set(asked) <= self.held.keys():
            plan = self.plan(asked)
            output = self.run.compute(self.name, plain, arguments, asked, plan, self.blocks.ends)
            self.hold(output, parts_of(output, plan))
        return self.answered(asked)

    def plan(self, asked: Sequence[str], mine: Collection[str] | None = None) -> Plan:
        return plan_of(self.passes, asked, self.recalled, self.skips, self.run.layouts[self.name], mine)

    def answered(self, asked: Sequence[str]) -> Any:
        return _mapped(lambda *parts: join(parts), *(self.held.pop(branch) for branch in asked))

    def hold(self, output: Any, held: dict[str, Any]) -> None:
        """What was computed, and with the conditional branch what is carried on."""
        recalled: frozenset[str] = frozenset()
        if COND in held:
            self.cond, recalled = tensors_of(held[COND]), self.recalled
        known = {name: tensors_of(part) for name, part in held.items() if name in self.passes.differing}
        self.memory.complete(known := known | {COND: self.cond}, recalled)
        self.held |= held | {name: with_tensors(output, known[name]) for name in recalled}


def memory_for(announced: Announced, guidance: Guidance) -> KeptDifferences:
    return KeptDifferences(guidance, dict.fromkeys(announced.weak, COND))


def plan_of(
    passes: Passes,
    asked: Sequence[str],
    recalled: Collection[str],
    skips: bool,
    layout: Layout,
    mine: Collection[str] | None = None,
) -> Plan:
    """The plan of a pass: what it asks for, and with the conditional branch all that are weak copies of it; or some."""
    branches = [Branch(name, name) for name in asked]
    if COND in asked:
        branches += [Branch(name, COND, layout.marks(part) if part else {}) for name, part in passes.weak.items()]
    computed = [one for one in branches if one.name not in recalled and (mine is None or one.name in mine)]
    return passing(make_plan(computed, layout.depth, full=layout.blocks.full), skips)


def parts_of(output: Any, plan: Plan) -> dict[str, Any]:
    """The output for every branch of a plan."""
    names = [branch.name for branch in plan.branches]
    return {name: _mapped(lambda all, n=n: all.chunk(len(names))[n], output) for n, name in enumerate(names)}


def _mapped(change: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Outputs of a denoiser as one, in their form: a tensor, a tuple, or fields by name."""
    if isinstance(first, Tensor):
        return change(first, *others)
    if isinstance(first, tuple):
        return tuple(_mapped(change, *parts) for parts in zip(first, *others, strict=True))
    return type(first)(
        **{name: _mapped(change, part, *(other[name] for other in others)) for name, part in first.items()}
    )


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """The outputs of a denoiser one by one, in the order in which `with_tensors` takes them."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(see, output)
    return tuple(found)


def with_tensors(output: Any, tensors: Sequence[Tensor]) -> Any:
    """An output with these tensors in it."""
    left = iter(tensors)
    return _mapped(lambda _: next(left), output)
