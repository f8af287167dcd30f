"""Running a stack of blocks under a plan."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.plan import Plan, Step
from stgfast.batching.rows import chunks, join, spans, take
from stgfast.batching.seam import Call, Handler
from stgfast.errors import EngineError


@dataclass(frozen=True)
class Layout:
    """What a denoiser's stack of blocks is made of.

    state     the arguments that a block passes on, in the order in which it returns them
    rows      the arguments, of blocks and of their attention, that have a row for every sample
    identity  `identity(attention module, *args, **kwargs)`: the module's call with output = V
    attend    `attend(attention module, masked, source, *args, **kwargs)`: the module's call for rows of which some are
              the identity and some have the same input; None where the module's own is made, as it is on a device
              that is none of `attend_on`
    """

    denoiser: nn.Module
    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module]  # the self-attention of every block
    state: tuple[str, ...]
    rows: frozenset[str]
    identity: Callable[..., Any]
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.blocks)


class Stack:
    """One pass of a model's blocks, in which every block computes the rows that its step of the plan says.

    The blocks are entered, and left, with `prompts` rows for every branch, in the order of the plan's branches.
    `max_rows` bounds the rows that a block sees at once; `compiled` has calls to make in place of some blocks' own.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        prompts: int,
        *,
        max_rows: int | None = None,
        compiled: Mapping[nn.Module, Call] = MappingProxyType({}),
    ):
        self.layout, self.plan, self.prompts, self.max_rows, self.compiled = layout, plan, prompts, max_rows, compiled
        self._done = 0
        # Of every row of the block that runs now: is its self-attention the identity, and what input is it of?
        self._masked: list[bool] = []
        self._inputs: list[int] = []
        self._taken: dict[tuple[str, tuple[int, ...]], tuple[Any, Any]] = {}

    def handlers(self) -> Mapping[nn.Module, Handler]:
        """What stands in for the calls of this pass."""
        layout, handlers = self.layout, dict[nn.Module, Handler]()
        for number, (block, step) in enumerate(zip(layout.blocks, self.plan.steps, strict=True)):
            handlers[block] = functools.partial(self._block, number)
            if any(step.marks) or layout.attend is not None:
                handlers[layout.attentions[number]] = self._attention
        return handlers

    def finish(self) -> None:
        """Every block must have run: a model that goes around one would give a result that only looks guided."""
        if self._done != self.layout.depth:
            raise EngineError(f"blocks run by the model: got {self._done}, expected {self.layout.depth}")

    def _block(self, number: int, plain: Call, arguments: Arguments) -> Any:
        """Stands in for block `number`."""
        if number != self._done:
            raise EngineError(f"blocks run in order: got block {number}, expected block {self._done}")
        step = self.plan.steps[number]
        before = [arguments[name] for name in self.layout.state]
        computed = self._compute(step, plain, self._chosen(step, arguments)) if step.run else [None] * len(before)
        self._done = number + 1
        return _as_given([self._after(step, new, old) for new, old in zip(computed, before, strict=True)])

    def _chosen(self, step: Step, arguments: Arguments) -> Arguments:
        """The arguments of a block for the groups that it computes."""
        branches = len(self.plan.branches) * self.prompts

        def choose(name: str, value: Any) -> Any:
            if name in self.layout.state:
                return take(value, spans(step.run, self.prompts), value.shape[0], name)
            if name not in self.layout.rows:
                return value
            # The same for every block of a pass, so taken once for each set of groups.
            given, taken = self._taken.get((name, step.rows_of), (None, None))
            if given is not value:
                taken = take(value, spans(step.rows_of, self.prompts), branches, name)
                self._taken[name, step.rows_of] = (value, taken)
            return taken

        return arguments.changed(choose)

    def _compute(self, step: Step, plain: Call, arguments: Arguments) -> Sequence[Tensor]:
        masked = [bool(mark) for mark in step.marks for _ in range(self.prompts)]
        # Nothing can stand in for a call inside compiled code, so a block with masked rows runs as it is written.
        module = arguments.module
        call: Call = module._call_impl if any(masked) else self.compiled.get(module, plain)
        inputs = [group * self.prompts + prompt for group in step.run for prompt in range(self.prompts)]
        outputs = []
        for chunk in chunks(len(masked), self.max_rows):
            self._masked, self._inputs = masked[chunk], inputs[chunk]
            outputs.append(_as_tuple(self._only(arguments, [chunk], len(masked)).given_to(call)))
        return [join(parts) for parts in zip(*outputs, strict=True)]

    def _attention(self, plain: Call, arguments: Arguments) -> Any:
        """Stands in for a self-attention: rows that are masked run none of it."""
        rows = len(self._masked)
        if self.layout.attend is not None and arguments["hidden_states"].device.type in self.layout.attend_on:
            # Rows of one input are projected once.
            different = list(dict.fromkeys(self._inputs))
            once = self._only(arguments, spans([self._inputs.index(one) for one in different], 1), rows)
            source = [different.index(one) for one in self._inputs]
            return once.given_to(functools.partial(self.layout.attend, arguments.module, self._masked, source))
        if not any(self._masked):
            return arguments.given_to(plain)
        calls: dict[bool, Call] = {False: plain, True: functools.partial(self.layout.identity, arguments.module)}
        outputs, order = [], []
        for mask, call in calls.items():
            mine = [row for row, masked in enumerate(self._masked) if masked is mask]
            if mine:
                outputs.append(_as_tuple(self._only(arguments, spans(mine, 1), rows).given_to(call)))
                order += mine
        back = spans([order.index(row) for row in range(rows)], 1)
        return _as_given([take(join(parts), back, rows, "attention") for parts in zip(*outputs, strict=True)])

    def _only(self, arguments: Arguments, where: list[slice], rows: int) -> Arguments:
        """Some of the rows of a call that has `rows` rows."""
        return arguments.changed(
            lambda name, value: take(value, where, rows, name) if name in self.layout.rows else value
        )

    def _after(self, step: Step, computed: Tensor | None, before: Tensor) -> Tensor:
        """The stack that a block leaves: computed groups and kept ones, in the plan's order."""
        runs = len(step.run)
        pieces = []
        for kept, groups in itertools.groupby(step.order, key=lambda group: group >= runs):
            source = before if kept else computed
            assert source is not None
            where = spans([step.keep[group - runs] if kept else group for group in groups], self.prompts)
            pieces += [source if part == slice(0, source.shape[0]) else source[part] for part in where]
        return join(pieces)


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _as_given(outputs: Sequence[Tensor]) -> Any:
    """Outputs in the form in which modules return them: one alone, several as a tuple."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]
