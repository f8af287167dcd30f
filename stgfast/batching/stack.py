"""Running a stack of blocks under a plan."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Plan, Step
from stgfast.batching.rows import alone, chunks, join, spans, take, take_packed
from stgfast.batching.seam import Call, Handler, as_written, compiled, handling, held
from stgfast.errors import EngineError
from stgfast.guidance import ATTENTION, BLUR, TEMPORAL


class Stack:
    """One pass of a model's blocks, in which every block computes the rows that its step of the plan says.

    The blocks are entered, and left, with `prompts` rows for every branch, in the order of the plan's branches.
    `max_rows` bounds the rows that a block sees at once; `compiled` has calls to make in place of some blocks' own;
    `grid` says how many (frames, height, width) of tokens there are in a block that is called with these arguments.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        prompts: int,
        *,
        max_rows: int | None = None,
        compiled: Mapping[nn.Module, Call] = MappingProxyType({}),
        grid: Callable[[Arguments], tuple[int, int, int]] | None = None,
    ):
        self.layout, self.plan, self.prompts, self.max_rows, self.compiled = layout, plan, prompts, max_rows, compiled
        self.grid = grid
        self._done = 0
        # Of every row of the block that runs now: what is done to it, and what input is it of?
        self._marks: list[str] = []
        self._inputs: list[int] = []
        self._attended: set[nn.Module] = set()  # the attentions that it has called
        self._tokens = (0, 0, 0)  # its (frames, height, width), where queries are blurred
        self._taken: dict[tuple[str, tuple[int, ...], int], tuple[Any, Any]] = {}

    def handlers(self) -> Mapping[nn.Module, Handler]:
        """What stands in for the calls of this pass."""
        layout, handlers = self.layout, dict[nn.Module, Handler]()
        for number, (unit, step) in enumerate(zip(layout.units, self.plan.steps, strict=True)):
            handlers[unit.module] = functools.partial(self._block, number)
            inside = any(map(self._inside, step.marks))
            if inside:
                handlers |= dict.fromkeys(unit.compiled_around, self._around)
            if inside or layout.attend is not None:
                for axis, attention in unit.attentions:
                    handlers[attention] = functools.partial(self._attention, axis)
        return handlers

    def finish(self) -> None:
        """Every block must have run: a model that goes around one would give a result that only looks guided."""
        if self._done != self.layout.depth:
            raise EngineError(f"blocks run by the model: got {self._done}, expected {self.layout.depth}")

    def _inside(self, mark: str) -> bool:
        """Whether a mark is about the attention inside of a block."""
        return mark.startswith((ATTENTION, BLUR)) and mark not in self.layout.changes

    def _block(self, number: int, plain: Call, arguments: Arguments) -> Any:
        """Stands in for block `number`."""
        if number != self._done:
            raise EngineError(f"blocks run in order: got block {number}, expected block {self._done}")
        step = self.plan.steps[number]
        state = self.layout.units[number].state or self.layout.state
        before = [arguments[name] for name in state] if step.keep else []
        if any(_sigma(mark) for mark in step.marks) and self.grid is not None:
            self._tokens = self.grid(arguments)
        if step.run:
            computed: Sequence[Any] = self._compute(number, plain, self._chosen(step, arguments, state))
        else:
            computed = [None] * len(before)
        self._done = number + 1
        both = itertools.zip_longest(computed, before)
        return _as_given([self._after(step, new, old) for new, old in both], wrapped=self.layout.units[number].wrapped)

    def _chosen(self, step: Step, arguments: Arguments, state: tuple[str, ...]) -> Arguments:
        """The arguments of a block for the groups that it computes."""

        def choose(name: str, value: Any) -> Any:
            if name in state:
                return take(value, spans(step.run, self.prompts), step.before * self.prompts, name)
            if name not in self.layout.rows and name not in self.layout.packed:
                return value
            # The same for every block of a pass, so taken once for each set of groups.
            key = (name, step.rows_of, id(value))
            if key not in self._taken:
                rows = len(self.plan.branches) * self.prompts
                self._taken[key] = (value, self._take(arguments, name, value, spans(step.rows_of, self.prompts), rows))
            return self._taken[key][1]

        return arguments.changed(choose)

    def _compute(self, number: int, plain: Call, arguments: Arguments) -> Sequence[Any]:
        step = self.plan.steps[number]
        marks = [mark for mark in step.marks for _ in range(self.prompts)]
        inputs = [group * self.prompts + prompt for group in step.run for prompt in range(self.prompts)]
        # Nothing can stand in for a call inside compiled code, so a block with masked rows runs as it is written.
        module, inside = arguments.module, any(map(self._inside, marks))
        call: Call = as_written(module) if inside else self.compiled.get(module, plain)
        runs_compiled = module in self.compiled or compiled(module)
        outputs = []
        for part in self._parts(marks):
            self._marks, self._inputs = marks[part], inputs[part]
            changes = self.layout.changes.get(marks[part.start], {})
            given = self._only(arguments, [part], len(marks)).replaced(changes)
            if runs_compiled:
                given = given.changed(lambda name, value: alone(value))
            self._attended = set()
            outputs.append(_as_tuple(given.given_to(call)))
            if inside:
                self._check_attended(number)
        return [join(parts) if parts[0] is not None else None for parts in zip(*outputs, strict=True)]

    def _parts(self, marks: Sequence[str]) -> list[slice]:
        """Rows that a block is called on at once: within the bound, and with the same arguments."""
        parts, start = [], 0
        for _, same in itertools.groupby(marks, key=lambda mark: mark if mark in self.layout.changes else ""):
            count = len(list(same))
            parts += [slice(start + part.start, start + part.stop) for part in chunks(count, self.max_rows)]
            start += count
        return parts

    def _check_attended(self, number: int) -> None:
        """A block that goes around its attention would give a plain prediction for a weak one."""
        for axis, attention in self.layout.units[number].attentions:
            changed = [mark for mark in self._marks if self._inside(mark) and _concerns(mark, axis)]
            if changed and attention not in self._attended:
                raise EngineError(
                    f"attention of block {number}: got a block that ran without a call of {type(attention).__name__}, "
                    f"expected one, to change what it does ({changed[0]}); is the block compiled, or replaced?"
                )

    def _around(self, plain: Call, arguments: Arguments) -> Any:
        """Stands in for a compiled module with an attention inside."""
        return arguments.given_to(as_written(arguments.module) if any(map(self._inside, self._marks)) else plain)

    def _attention(self, axis: str, plain: Call, arguments: Arguments) -> Any:
        """Stands in for a self-attention: rows that are masked run none of it."""
        self._attended.add(arguments.module)
        rows = len(self._marks)
        masked = [mark in (ATTENTION, f"{ATTENTION} {axis}") for mark in self._marks]
        sigmas = [None if axis == TEMPORAL else _sigma(mark) for mark in self._marks]
        if any(sigmas):  # rows of one input differ from the projection on: the module's own call, for each of them
            unmasked = [sigma for sigma, mask in zip(sigmas, masked, strict=True) if not mask]
            plain = functools.partial(self._with_blur, arguments.module, unmasked)
        elif self.layout.attend is not None and arguments["hidden_states"].device.type in self.layout.attend_on:
            # Rows of one input are projected once.
            different = list(dict.fromkeys(self._inputs))
            once = self._only(arguments, spans([self._inputs.index(one) for one in different], 1), rows)
            source = [different.index(one) for one in self._inputs]
            return once.given_to(functools.partial(self.layout.attend, arguments.module, masked, source))
        if not any(masked):
            return arguments.given_to(plain)
        calls: dict[bool, Call] = {False: plain, True: functools.partial(self.layout.identity, arguments.module)}
        outputs, order = [], []
        for mask, call in calls.items():
            mine = [row for row, is_masked in enumerate(masked) if is_masked is mask]
            if mine:
                outputs.append(_as_tuple(self._only(arguments, spans(mine, 1), rows).given_to(call)))
                order += mine
        back = spans([order.index(row) for row in range(rows)], 1)
        return _as_given([take(join(parts), back, rows, "attention") for parts in zip(*outputs, strict=True)])

    def _with_blur(self, attention: nn.Module, sigmas: Sequence[float | None], *args: Any, **kwargs: Any) -> Any:
        """The call of a self-attention, with the queries blurred of rows that have a sigma."""
        assert self.layout.grid is not None
        query, seen = attention.get_submodule(self.layout.grid.query), list[Tensor]()

        def blurred(plain: Call, arguments: Arguments) -> Tensor:
            seen.append(arguments.given_to(plain))
            return self._blur(seen[-1], sigmas)

        with held([query]), handling({query: blurred}):
            output = as_written(attention)(*args, **kwargs)
        if len(seen) != 1:
            raise EngineError(f"queries made by {self.layout.grid.query!r}: got {len(seen)} calls, expected one")
        return output

    def _blur(self, queries: Tensor, sigmas: Sequence[float | None]) -> Tensor:
        assert self.layout.grid is not None
        assert self.layout.blur is not None
        # A sample's row may be several neighbours, its frames say.
        each, tokens = len(queries) // len(sigmas), math.prod(self._tokens)
        first = queries.shape[1] - tokens if self.layout.grid.last else 0
        pieces, start = [], 0
        for sigma, same in itertools.groupby(sigmas):
            stop = start + len(list(same)) * each
            part = queries[start:stop]
            pieces.append(part if sigma is None else self.layout.blur(part, self._tokens, sigma, first=first))
            start = stop
        return join(pieces)

    def _only(self, arguments: Arguments, where: list[slice], rows: int) -> Arguments:
        """Some of the rows of a call that has `rows` rows."""
        return arguments.changed(lambda name, value: self._take(arguments, name, value, where, rows))

    def _take(self, arguments: Arguments, name: str, value: Any, where: list[slice], rows: int) -> Any:
        """Some of the rows of one argument."""
        if name in self.layout.packed:
            return take_packed(value, arguments[self.layout.packed[name]], where, rows, name)
        return take(value, where, rows, name) if name in self.layout.rows else value

    def _after(self, step: Step, computed: Tensor | None, before: Tensor | None) -> Tensor | None:
        """The stack that a block leaves: computed groups and kept ones, in the plan's order."""
        runs, pieces = len(step.run), []
        for kept, groups in itertools.groupby(step.order, key=lambda group: group >= runs):
            source = before if kept else computed
            if source is None:
                return None  # of an output that a block may leave out
            where = spans([step.keep[group - runs] if kept else group for group in groups], self.prompts)
            piece = take(source, where, (step.before if kept else runs) * self.prompts, "output of a block")
            # A model may be spread over devices: what a block leaves is where the block is.
            pieces.append(piece if computed is None else piece.to(computed.device))
        return join(pieces)


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _as_given(outputs: Sequence[Any], *, wrapped: bool = False) -> Any:
    """Outputs in the form in which modules return them: one alone, several as a tuple."""
    return tuple(outputs) if wrapped or len(outputs) > 1 else outputs[0]


def _concerns(mark: str, axis: str) -> bool:
    """Whether a mark is about attention along an axis."""
    return axis != TEMPORAL if _sigma(mark) is not None else mark in (ATTENTION, f"{ATTENTION} {axis}")


def _sigma(mark: str) -> float | None:
    kind, _, sigma = mark.partition(" ")
    return float(sigma) if kind == BLUR else None
