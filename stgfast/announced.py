"""Pipelines that ask for their weak branches themselves, pass after pass, and combine what they get.

The first pass that has the conditional rows computes, as one stack, what the passes after it are going to ask for;
these are answered from what is held, or carried on from earlier steps. How the results are combined stays the
pipeline's, or its guider's, own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Branch, Plan, make_plan, passing
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.engine import Run
from stgfast.errors import EngineError
from stgfast.forecast import KeptBlocks
from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Announced, Passes
from stgfast.memory import Memory
from stgfast.ranks.shared import Shared
from stgfast.reuse import KeptDifferences
from stgfast.schedules import Moment


class Answering:
    """What becomes of the calls of one run of such a pipeline."""

    def __init__(self, announced: Announced, guidance: Guidance):
        self.announced, self.guidance = announced, guidance
        self.memory: Memory = memory_for(announced, guidance)
        self.blocks = KeptBlocks(guidance)
        self.passes: Passes | None = None  # of the last step

    def begin(self, run: Run, name: str) -> AnsweringStep:
        moment = run.moment()
        passes = self.announced.passes(run.pipe, run.call, self.guidance, moment, name)
        if self.guidance.reuses and moment.step in run.noisier:
            self.memory.forget()
            self.blocks.forget()
        if run.ranks is not None and passes != self.passes:  # what blocks added may be on another process
            self.blocks.forget()
        self.passes = passes
        recalled = self.memory.recalled(passes.differing, moment.step, name)
        skips = self.blocks.skips(passes.branches, moment.step, name)
        return AnsweringStep(run, name, passes, self.memory, recalled, self.blocks, skips, moment)

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
        self.run, self.name, self.passes, self.calls = run, name, passes, passes.turns
        self.memory, self.recalled, self.blocks, self.skips = memory, recalled, blocks, skips
        self.held: dict[str, Any] = {}  # the output for every branch that is known and not asked for yet
        self.cond: tuple[Tensor, ...] = ()
        self.moment = moment
        # Where the branches are divided over processes: the calls whose results are sent at once, what this process
        # has of them, and what was handed out for those that it has not got yet.
        self.computing = [turn for turn, asked in enumerate(self.calls) if passes.computed_in(asked, recalled)]
        self.shared: Shared | None = None
        self.form: Any = None  # an output of the denoiser
        self.handed: list[tuple[tuple[str, ...], list[weakref.ref[Tensor]]]] = []

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        asked = self.calls[turn]
        if self.run.ranks is not None and turn in self.computing:
            self._share(turn, plain, arguments)
        elif not set(asked) <= self.held.keys() and self.shared is None:
            plan = self._plan(asked)
            output = self.run.compute(self.name, plain, arguments, asked, plan, self.blocks.ends)
            names = [branch.name for branch in plan.branches]
            self._hold(output, {name: _part(output, number, len(names)) for number, name in enumerate(names)})
        if self.shared is not None and not set(asked) <= self.held.keys():
            return self._hand_out(asked, self.shared)
        return self._held(asked)

    def _held(self, asked: Sequence[str]) -> Any:
        return _mapped(lambda *parts: join(parts), *(self.held.pop(branch) for branch in asked))

    def _plan(self, asked: Sequence[str], mine: Collection[str] | None = None) -> Plan:
        return plan_of(self.passes, asked, self.recalled, self.skips, self.run.layouts[self.name], mine)

    def _share(self, turn: int, plain: Call, arguments: Arguments) -> None:
        """Compute what is this process's of a call, and hold what all of them computed once the last one has begun."""
        run, asked = self.run, self.calls[turn]
        at_once = [self.calls[turn] for turn in self.computing] if not run.adapter.early else [asked]
        if self.shared is None or run.adapter.early:
            self.shared = self._divided(at_once, run.prompts(arguments, asked))
        shared, mine = self.shared, self._plan(asked, self.shared.mine)
        if mine.branches:
            names = [branch.name for branch in mine.branches]
            self.form = run.compute(self.name, plain, arguments, asked, mine, self.blocks.ends, shared.prompts)
            parts = {name: _part(self.form, number, len(names)) for number, name in enumerate(names)}
            shared.made |= {name: _tensors(part) for name, part in parts.items()}
        elif self.form is None:
            self.form = run.blank(self.name, plain, arguments, asked)
        if asked != at_once[-1]:
            return
        names = [branch.name for asked in at_once for branch in self._plan(asked).branches]
        where = f"{run.place(self.moment, arguments[run.adapter.sample])}, which takes {', '.join(names)}"
        whole = shared.whole(names, self._alike(shared), where)
        self._hold(self.form, {name: _with(self.form, tensors) for name, tensors in whole.items()})
        for asked, tensors in self.handed:
            for given, known in zip(tensors, _tensors(self._held(asked)), strict=True):
                tensor = given()
                if tensor is None:
                    raise EngineError(
                        "branches over processes: got a pipeline that makes something of a prediction before it asks "
                        "for the next one, expected one that does so when it has them all; say early=True of its "
                        "adapter"
                    )
                tensor.copy_(known)

    def _divided(self, at_once: Sequence[Sequence[str]], prompts: int) -> Shared:
        """Which process computes which branches."""
        return self.run.shared(self.name, [self._plan(asked).branches for asked in at_once], prompts)

    def _hand_out(self, asked: tuple[str, ...], shared: Shared) -> Any:
        """Tensors that are filled once all of this step is known."""
        rows = len(asked) * shared.all_prompts
        given = [like.new_zeros(rows, *like.shape[1:]) for like in self._alike(shared)]
        self.handed.append((asked, [weakref.ref(tensor) for tensor in given]))
        return _with(self.form, given)

    def _alike(self, shared: Shared) -> tuple[Tensor, ...]:
        """Tensors like every prediction, but for their rows."""
        return next(iter(shared.made.values()), _tensors(self.form))

    def _hold(self, output: Any, held: dict[str, Any]) -> None:
        """What was computed, and with the conditional branch what is carried on."""
        recalled: frozenset[str] = frozenset()
        if COND in held:
            self.cond, recalled = _tensors(held[COND]), self.recalled
        known = {name: _tensors(part) for name, part in held.items() if name in self.passes.differing}
        self.memory.complete(known := known | {COND: self.cond}, recalled)
        self.held |= held | {name: _with(output, known[name]) for name in recalled}


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


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """The outputs of a denoiser one by one, in the order in which `_with` takes them."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(see, output)
    return tuple(found)


def _with(output: Any, tensors: Sequence[Tensor]) -> Any:
    """An output with these tensors in it."""
    left = iter(tensors)
    return _mapped(lambda _: next(left), output)
