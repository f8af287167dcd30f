"""Self-attention inside a block that runs on rows of which some are perturbed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.context import context_of, over_all
from stgfast.batching.fastest import Fastest
from stgfast.batching.layout import Layout, Unit
from stgfast.batching.one_call import UNSEEN, inputs_of, note, of_library, one_call, unfit
from stgfast.batching.rows import as_given, as_tuple, join, spans, take
from stgfast.batching.sdpa import UnfitError
from stgfast.batching.seam import Call, Handler, as_written, compiled, handling, held
from stgfast.batching.values import UnseenError, identity_attention, identity_of_scores
from stgfast.batching.ways import Way, along, counted, together, way_of
from stgfast.errors import EngineError
from stgfast.kinds import Mark, kind_of

Tokens = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Attention:
    """One call of a self-attention, for rows with the same perturbation: what a kind of perturbation can use."""

    layout: Layout
    plain_call: Call
    arguments: Arguments
    tokens: Tokens

    def plain(self) -> Any:
        """The module's own output."""
        return self.arguments.given_to(self.plain_call)

    def identity(self) -> Any:
        """The output with output = V."""
        module, identity = self.arguments.module, self.layout.blocks.identity
        # Another processor may do more than project its inputs.
        if identity is identity_attention and not of_library(module) and not unfit(module):
            try:
                return self.arguments.given_to(functools.partial(identity_of_scores, module))
            except UnseenError:
                note(module, UNSEEN)
        return self.arguments.given_to(functools.partial(identity, module))

    def with_queries(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The module's own output, with its queries changed."""
        module, grid = self.arguments.module, self.layout.blocks.grid
        name = grid.query if grid is not None else "to_q"
        context = context_of(self.layout.denoiser)
        if context is not None:
            change = over_all(context, math.prod(self.tokens), change)
        query, seen = module.get_submodule(name), list[Tensor]()

        def changed(plain: Call, arguments: Arguments) -> Tensor:
            seen.append(arguments.given_to(plain))
            return change(seen[-1])

        with held([query]), handling({query: changed}):
            output = self.arguments.given_to(as_written(module))
        if len(seen) != 1:
            raise EngineError(f"queries made by {name!r}: got {len(seen)} calls, expected one")
        return output

    @property
    def video_last(self) -> bool:
        """Whether other tokens, if any, come before those of the video."""
        return self.layout.blocks.grid is not None and self.layout.blocks.grid.last


class Inside:
    """The self-attentions of the block that runs now: the mark and the input of each row."""

    def __init__(self, layout: Layout, grid: Callable[[Arguments], Tokens] | None, fastest: Fastest):
        self.layout, self.grid, self.fastest = layout, grid, fastest
        self.marks: Sequence[Mark | None] = []
        self.inputs: Sequence[int] = []
        self.tokens: Tokens = (0, 0, 0)
        self.reached: set[nn.Module] = set()  # the attentions that the block has called

    def handlers(self, unit: Unit, marks: Sequence[Mark | None]) -> Mapping[nn.Module, Handler]:
        """The replacements for calls inside a unit that runs on groups with these marks."""
        handlers = dict[nn.Module, Handler]()
        inside = self.perturbed(marks)
        if inside:
            handlers |= dict.fromkeys(unit.compiled_around, self._around)
        if inside or self.layout.attend is not None:
            handlers |= {module: functools.partial(self._attention, axis) for axis, module in unit.attentions}
        return handlers

    def perturbed(self, marks: Sequence[Mark | None]) -> bool:
        """Whether any of these marks changes an attention."""
        return any(map(self.layout.inside, marks))

    def locate(self, marks: Sequence[Mark | None], arguments: Arguments) -> None:
        """Store the token positions in a block that is called with these arguments, if a kind needs them."""
        if self.grid is not None and any(mark is not None and kind_of(mark).grid for mark in marks):
            self.tokens = self.grid(arguments)

    def begin(self, marks: Sequence[Mark | None], inputs: Sequence[int]) -> None:
        self.marks, self.inputs, self.reached = marks, inputs, set()

    def finish(self, number: int, unit: Unit) -> None:
        """Raise if a block did not use its attention: it would give an unperturbed prediction for a perturbed one."""
        for axis, attention in unit.attentions:
            changed = [mark for mark in along(self.layout, self.marks, axis) if mark is not None]
            if changed and attention not in self.reached:
                raise EngineError(
                    f"attention of block {number}: got a block that ran without a call of {type(attention).__name__}, "
                    f"expected one, to change what it does ({changed[0].kind}); is the block compiled, or replaced?"
                )

    def _around(self, plain: Call, arguments: Arguments) -> Any:
        """The replacement of a compiled module that contains an attention."""
        return arguments.given_to(as_written(arguments.module) if self.perturbed(self.marks) else plain)

    def _attention(self, axis: str, plain: Call, arguments: Arguments) -> Any:
        """The replacement of a self-attention: perturbed rows run what their kind says, and nothing else."""
        self.reached.add(arguments.module)
        own, plain = plain, self.fastest.of(arguments.module, plain)
        marks, rows = along(self.layout, self.marks, axis), len(self.marks)
        groups: list[list[int]] = [[row for row in range(rows) if marks[row] == mark] for mark in dict.fromkeys(marks)]
        outputs, order, some = [], [], together(marks)
        stacked = self._stacked(own, arguments, [marks[row] for row in some], some)
        if any(marks):  # the rest of the block sees rows that differ
            self.inputs = range(rows)
        if stacked is not None:
            groups = [mine for mine in groups if mine[0] not in some]
            outputs.append(as_tuple(stacked))
            order += some
        for mine in groups:
            mark = marks[mine[0]]
            if len(mine) == rows and mark is None:
                return arguments.given_to(plain)
            call = Attention(self.layout, plain, self._some(arguments, mine), self.tokens)
            outputs.append(as_tuple(call.plain() if mark is None else kind_of(mark).attend(mark, call)))
            order += mine
        back = spans([order.index(row) for row in range(rows)], 1)
        return as_given([take(join(parts), back, rows, "attention") for parts in zip(*outputs, strict=True)])

    def _stacked(
        self, plain: Call, arguments: Arguments, marks: Sequence[Mark | None], rows: Sequence[int]
    ) -> Any | None:
        """The output of one call for rows that attend and rows that are V; None if they need separate calls."""
        module, inputs = arguments.module, inputs_of(arguments.module, rows, self.inputs)
        way = way_of(self.layout, module, arguments.device, counted(marks, inputs))
        if way is Way.APART:
            return None
        different, masked = list(dict.fromkeys(inputs)), [mark is not None for mark in marks]
        source = [different.index(one) for one in inputs]
        given = self._some(arguments, [rows[inputs.index(one)] for one in different])
        if way is Way.OWN and self.layout.attend is not None:
            return given.given_to(functools.partial(self.layout.attend, module, masked, source))
        try:
            call = as_written(module) if compiled(module) else plain
            return one_call(call, given, len(different), masked, source, self.fastest.keys_of(module))
        except UnfitError:  # recorded for the module: `way_of` returns APART from now on
            return None

    def _some(self, arguments: Arguments, rows: Sequence[int]) -> Arguments:
        return self.layout.some(arguments, spans(rows, 1), len(self.marks))
