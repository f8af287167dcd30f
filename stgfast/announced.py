"""Pipelines that ask for perturbed branches themselves, pass by pass, and combine them.

The first pass with the conditional rows computes the later passes too, as one stack. These are then answered from what
is stored, or extrapolated from earlier steps. The combination stays that of the pipeline or its guider.
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
    """The strategy of a run of such a pipeline."""

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

    # Replaced if branches are divided over processes.

    def foresee(self, passes: Passes) -> None:
        """The passes that the coming step will ask for."""

    def step(self, *of_step: Any) -> AnsweringStep:
        return AnsweringStep(*of_step)

    def perturbed_layers(self, layout: Layout) -> Collection[int | None]:
        return {unit.layer for unit in layout.units}  # what the pipeline will ask for is known later


class AnsweringStep:
    """The state of one step."""

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
        self.held: dict[str, Any] = {}  # outputs of branches that were not asked for yet
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
        """Store what was computed, and what is extrapolated together with the conditional branch."""
        recalled: frozenset[str] = frozenset()
        if COND in held:
            self.cond, recalled = tensors_of(held[COND]), self.recalled
        known = {name: tensors_of(part) for name, part in held.items() if name in self.passes.differing}
        self.memory.complete(known := known | {COND: self.cond}, recalled)
        self.held |= held | {name: with_tensors(output, known[name]) for name in recalled}


def memory_for(announced: Announced, guidance: Guidance) -> KeptDifferences:
    return KeptDifferences(guidance, dict.fromkeys(announced.perturbed, COND))


def plan_of(
    passes: Passes,
    asked: Sequence[str],
    recalled: Collection[str],
    skips: bool,
    layout: Layout,
    mine: Collection[str] | None = None,
) -> Plan:
    """The plan of a pass: its branch and, for the conditional branch, all branches that perturb it; or some of them."""
    branches = [Branch(name, name) for name in asked]
    if COND in asked:
        branches += [Branch(name, COND, layout.marks(part) if part else {}) for name, part in passes.perturbed.items()]
    computed = [one for one in branches if one.name not in recalled and (mine is None or one.name in mine)]
    return passing(make_plan(computed, layout.depth, full=layout.blocks.full), skips)


def parts_of(output: Any, plan: Plan) -> dict[str, Any]:
    """The outputs for each branch of a plan."""
    names = [branch.name for branch in plan.branches]
    return {name: _mapped(lambda all, n=n: all.chunk(len(names))[n], output) for n, name in enumerate(names)}


def _mapped(change: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Combine outputs of a denoiser into one of the same form: a tensor, a tuple, or named fields."""
    if isinstance(first, Tensor):
        return change(first, *others)
    if isinstance(first, tuple):
        return tuple(_mapped(change, *parts) for parts in zip(first, *others, strict=True))
    return type(first)(
        **{name: _mapped(change, part, *(other[name] for other in others)) for name, part in first.items()}
    )


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors in a denoiser's output, in the order in which `with_tensors` takes them."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(see, output)
    return tuple(found)


def with_tensors(output: Any, tensors: Sequence[Tensor]) -> Any:
    """A copy of an output with these tensors in it."""
    left = iter(tensors)
    return _mapped(lambda _: next(left), output)
