"""Run a stack of blocks under a plan."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.attention import Inside, Tokens
from stgfast.batching.context import as_spread
from stgfast.batching.fastest import Fastest
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Plan, Step
from stgfast.batching.rows import alone, as_given, as_tuple, chunks, join, spans, take
from stgfast.batching.seam import Call, Handler, as_written, compiled
from stgfast.errors import EngineError
from stgfast.kinds import Mark, kind_of


class Ends(Protocol):
    """What is stored of the hidden states before the first and after the last block, to skip the blocks in some passes.
    Hidden states have the same number of rows for each branch.
    """

    def seen(self, branches: Sequence[str], before: Sequence[Tensor], after: Sequence[Tensor | None]) -> None: ...

    def carried(self, branches: Sequence[str], before: Sequence[Tensor]) -> list[Tensor | None]: ...


class Stack:
    """One pass through a model's blocks, in which each block computes the rows of its step in the plan.

    The blocks are entered and left with `prompts` rows for each branch, in the order of the plan's branches. `max_rows`
    limits the rows that a block computes at once. `compiled` has calls to use in place of some blocks' own. `ends`
    stores what all blocks added, and supplies it if none runs. `fastest` replaces attention where it can. `grid`
    returns the (frames, height, width) of tokens in a block that is called with these arguments.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        prompts: int,
        *,
        max_rows: int | None = None,
        compiled: Mapping[nn.Module, Call] = MappingProxyType({}),
        grid: Callable[[Arguments], Tokens] | None = None,
        ends: Ends | None = None,
        fastest: Fastest | None = None,
    ):
        self.layout, self.plan, self.prompts, self.max_rows, self.compiled = layout, plan, prompts, max_rows, compiled
        self.fastest = fastest or Fastest(())
        self.inside, self.ends = Inside(layout, grid, self.fastest), ends
        self._entered: list[Tensor] = []
        self._done = 0
        self._taken: dict[tuple[str, tuple[int, ...], int], tuple[Any, Any]] = {}

    def handlers(self) -> Mapping[nn.Module, Handler]:
        """The replacements for the calls of this pass."""
        handlers: dict[nn.Module, Handler] = dict.fromkeys(self.fastest.modules, self.fastest.call)
        for number, (unit, step) in enumerate(zip(self.layout.units, self.plan.steps, strict=True)):
            handlers[unit.module] = functools.partial(self._block, number)
            handlers |= self.inside.handlers(unit, step.marks)
        return handlers

    def finish(self) -> None:
        """Raise if a block did not run: the result would only look guided."""
        if self._done != self.layout.depth:
            raise EngineError(f"blocks run by the model: got {self._done}, expected {self.layout.depth}")

    def _block(self, number: int, plain: Call, arguments: Arguments) -> Any:
        """The replacement of block `number`."""
        if number != self._done:
            raise EngineError(f"blocks run in order: got block {number}, expected block {self._done}")
        step, unit = self.plan.steps[number], self.layout.units[number]
        state = unit.state or self.layout.blocks.state
        # Rows that pass a block must also be sharded, if the block is the one that shards tokens.
        spread = as_spread(arguments) if step.keep or (self.ends is not None and number == 0) else arguments
        before = [spread[name] for name in state] if step.keep else []
        self.inside.locate(step.marks, arguments)
        if step.run:
            computed: Sequence[Any] = self._compute(number, plain, self._chosen(step, arguments, state))
        else:
            computed = [None] * len(before)
        self._done = number + 1
        left = [self._after(step, new, old) for new, old in itertools.zip_longest(computed, before)]
        if self.ends is not None:
            if number == 0:
                self._entered = [spread[name] for name in state]
            if self._done == self.layout.depth:
                left = self._end(self.ends, left)
        return as_given(left, wrapped=unit.wrapped)

    def _end(self, ends: Ends, left: list[Any]) -> list[Any]:
        """The output of the last block: stored, or extrapolated from earlier passes if no block ran."""
        names = [branch.name for branch in self.plan.branches]
        if not any(self.plan.computed):
            return ends.carried(names, self._entered)
        ends.seen(names, self._entered, left)
        return left

    def _chosen(self, step: Step, arguments: Arguments, state: tuple[str, ...]) -> Arguments:
        """The arguments of a block for the groups that it computes."""
        layout = self.layout

        def choose(name: str, value: Any) -> Any:
            if name in state:
                return take(value, spans(step.run, self.prompts), step.before * self.prompts, name)
            if name not in layout.blocks.rows and name not in layout.blocks.packed:
                return value
            # Equal for all blocks of a pass, so taken once for each set of groups.
            key = (name, step.rows_of, id(value))
            if key not in self._taken:
                rows, where = len(self.plan.branches) * self.prompts, spans(step.rows_of, self.prompts)
                self._taken[key] = (value, layout.taken(arguments, name, value, where, rows))
            return self._taken[key][1]

        return arguments.changed(choose)

    def _compute(self, number: int, plain: Call, arguments: Arguments) -> Sequence[Any]:
        step = self.plan.steps[number]
        marks = [mark for mark in step.marks for _ in range(self.prompts)]
        inputs = [group * self.prompts + prompt for group in step.run for prompt in range(self.prompts)]
        # Calls inside compiled code cannot be replaced, so a block with perturbed rows runs uncompiled.
        module, perturbed = arguments.module, self.inside.perturbed(marks)
        call: Call = as_written(module) if perturbed else self.compiled.get(module, plain)
        runs_compiled = module in self.compiled or compiled(module)
        outputs = []
        for part in self._parts(marks):
            given = self.layout.some(arguments, [part], len(marks)).replaced(self._changes(marks[part.start]))
            if runs_compiled:
                given = given.changed(lambda name, value: alone(value))
            self.inside.begin(marks[part], inputs[part])
            outputs.append(as_tuple(given.given_to(call)))
            if perturbed:
                self.inside.finish(number, self.layout.units[number])
        return [join(parts) if parts[0] is not None else None for parts in zip(*outputs, strict=True)]

    def _changes(self, mark: Mark | None) -> Mapping[str, Any]:
        """The arguments that ask a block for what a mark says."""
        return {} if mark is None else kind_of(mark).changes(self.layout)

    def _parts(self, marks: Sequence[Mark | None]) -> list[slice]:
        """The rows with which a block is called at once: within the limit, and with the same arguments."""
        if not any(marks):
            return chunks(len(marks), self.max_rows)
        parts, start = [], 0
        for _, same in itertools.groupby(marks, key=lambda mark: mark if self._changes(mark) else None):
            count = len(list(same))
            parts += [slice(start + part.start, start + part.stop) for part in chunks(count, self.max_rows)]
            start += count
        return parts

    def _after(self, step: Step, computed: Tensor | None, before: Tensor | None) -> Tensor | None:
        """The stack after a block: computed and kept groups, in the plan's order."""
        runs, pieces = len(step.run), []
        for kept, groups in itertools.groupby(step.order, key=lambda group: group >= runs):
            source = before if kept else computed
            if source is None:
                return None  # for an output that a block may omit
            where = spans([step.keep[group - runs] if kept else group for group in groups], self.prompts)
            piece = take(source, where, (step.before if kept else runs) * self.prompts, "output of a block")
            # A model may be split over devices: a block's output is on its device.
            pieces.append(piece if computed is None else piece.to(computed.device))
        return join(pieces)
