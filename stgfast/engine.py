"""One guided call of a pipeline, and its denoising steps. This module knows no model by name.

A pipeline calls its denoiser one or more times in each step. During a guided call, the engine replaces the forward of
the denoiser and of its blocks. A strategy decides what a step makes of these calls:

    combining.py  the engine combines: each prediction that the pipeline receives becomes g
    announced.py  the pipeline combines: its passes, perturbed ones included, are answered from one computation
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.execution import AS_IT_IS, AUTO, Execution
from stgfast.batching.fastest import Fastest, quickened
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Branch, Plan, make_plan, passing
from stgfast.batching.room import Room
from stgfast.batching.rows import spans, take
from stgfast.batching.seam import Call, compiled, compiled_calls, handling, held
from stgfast.batching.stack import Ends, Stack
from stgfast.errors import EngineError
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Fitted
from stgfast.integrations.steps import CallArguments, steps_back
from stgfast.ranks.division import Division, divide
from stgfast.ranks.shared import Shared, fingerprint
from stgfast.schedules import Moment


class Step(Protocol):
    """The state of one denoising step."""

    calls: tuple[tuple[str, ...], ...]  # calls of the denoiser, each with the branches of its rows

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        """The output for the call of the denoiser with this number."""


class Strategy(Protocol):
    """What a run makes of the calls of the denoiser."""

    def begin(self, run: Run, name: str) -> Step:
        """Begin a step, at a call of the denoiser with this name."""

    def perturbed_layers(self, layout: Layout) -> Collection[int | None]:
        """The layers whose attention is replaced."""


class Run:
    """The state of one guided call of a pipeline."""

    def __init__(
        self,
        fitted: Fitted,
        guidance: Guidance,
        call: CallArguments,
        strategy: Strategy,
        execution: Execution = AS_IT_IS,
    ):
        self.pipe, self.adapter, self.layouts = fitted
        self.guidance, self.call, self.strategy = guidance, call, strategy
        self.room, self.ranks = Room(execution.max_rows), execution.ranks
        # The calls of blocks that are compiled for a guided run alone. A denoiser compiled as a whole would not let its
        # blocks be reached: they are compiled one by one instead.
        self.compiled: dict[nn.Module, Call] = {}
        for name, layout in self.layouts.items():
            make, units = getattr(getattr(self.pipe, name), "dynamo_ctx", None), layout.units
            if make is None and execution.compilation is not None:
                make = functools.partial(torch.compile, **execution.compilation)
                units = tuple(unit for unit in units if unit.layer is not None and not compiled(unit.module))
            if make is not None:
                self.compiled |= compiled_calls([unit.module for unit in units], make)
        every = [unit.module for layout in self.layouts.values() for unit in layout.units]
        self.compiles = bool(self.compiled) or any(map(compiled, every))
        auto = execution.attention == AUTO
        self.quickened = {layout.denoiser: quickened(layout) if auto else () for layout in self.layouts.values()}
        # Whether a step without guidance also runs block by block.
        blockwise = execution.max_rows is not None or execution.ranks is not None or self.compiled
        self.divided = bool(blockwise or any(self.quickened.values()))
        self.steps_done = self.steps = 0
        self.part_began = self.part_ends = 0  # steps of the run, if a longer clip is made in parts
        self.turn = 0  # calls of the denoiser done in this step
        self.step: Step | None = None  # None while the scheduler works
        self.sigmas: list[float] | None = None
        self.divisions: dict[Any, Division] = {}  # of steps, over processes
        self.blanks: dict[Any, Any] = {}  # outputs of the denoiser without its blocks, by sources and shape

    def whole(self, call: Callable[[], Any]) -> Any:
        with self.in_place():
            result = call()
        self.finish()
        return result

    def finish(self) -> None:
        """Raise if the run did not make all its steps, unless it was interrupted: then some steps were not guided."""
        # As in the last step: a guider that the next call shares may have started again.
        steps = self.steps if self.steps_done or self.turn else self.adapter.steps(self.pipe)
        done = self.steps_done - self.part_began
        if (done, self.turn) != (steps, 0) and not getattr(self.pipe, "interrupt", False):
            made = f"{self.steps_done} steps" + (f" and {self.turn} calls of another" if self.turn else "")
            raise EngineError(
                f"guided steps: got {made}, expected {steps}; was pipe.{next(iter(self.layouts))} replaced during the "
                f"call, or are the adapter's protocol ({self.adapter.protocol!r}) or denoisers wrong?"
            )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Guide the calls of the denoiser within the block."""
        modules = [module for layout in self.layouts.values() for module in self._reached(layout)]
        handlers = {layout.denoiser: functools.partial(self._denoise, name) for name, layout in self.layouts.items()}
        with self.adapter.within(self.pipe), self._uncompiled(), held(modules), handling(handlers):
            yield

    def moment(self) -> Moment:
        """The position in the run, at the start of a step."""
        self.steps = steps = self.adapter.steps(self.pipe)
        if self.adapter.windowed and self.steps_done == self.part_ends:
            self.part_began, self.part_ends = self.steps_done, self.steps_done + steps
        number = self.steps_done - self.part_began
        if number >= steps:
            raise EngineError(f"denoising steps: got one more than the {steps} steps of the scheduler")
        if not self.guidance.by_sigma:
            return Moment(number, steps)
        if self.sigmas is None or number == 0:
            self.sigmas = self.adapter.sigmas(self.pipe, steps)
        return Moment(number, steps, self.sigmas[number])

    @functools.cached_property
    def noisier(self) -> frozenset[int]:
        """The steps before which noise is added, or with which another part of a longer clip begins."""
        return steps_back(self.pipe, self.adapter.steps(self.pipe)) | ({0} if self.adapter.windowed else set())

    def compute(
        self,
        name: str,
        plain: Call,
        arguments: Arguments,
        sources: tuple[str, ...],
        plan: Plan,
        ends: Ends | None = None,
        part: slice | None = None,
    ) -> Any:
        """Compute the denoiser's output for the branches of a plan, for all prompts or some. `arguments` have the rows
        of the branches' sources.
        """
        layout, sample = self.layouts[name], arguments[self.adapter.sample]
        rows, device, every = sample.shape[0], sample.device, self.prompts(arguments, sources)
        mine = range(every)[part or slice(None)]
        prompts = len(mine)
        where = spans([sources.index(one.source) * every + prompt for one in plan.branches for prompt in mine], 1)
        grid = layout.blocks.grid and functools.partial(layout.blocks.grid.size, self.call, arguments)
        if self.compiles:  # CUDA graphs of blocks keep their outputs until the next call of the denoiser
            torch.compiler.cudagraph_mark_step_begin()
        limit = self.room.rows(len(sources) * prompts, len(plan.branches) * prompts, device)
        quick = Fastest(self.quickened[layout.denoiser])
        stack = Stack(
            layout, plan, prompts, max_rows=limit, compiled=self.compiled, grid=grid, ends=ends, fastest=quick
        )
        with handling(stack.handlers()), self.room.watched(device):
            output = arguments.changed(
                lambda name, value: take(value, where, rows, name) if name in layout.blocks.rows else value
            ).given_to(plain)
        stack.finish()
        return output

    def prompts(self, arguments: Arguments, sources: Sequence[str]) -> int:
        """The number of rows that a call of the denoiser has for each source."""
        rows = arguments[self.adapter.sample].shape[0]
        prompts, left = divmod(rows, len(sources))
        if left:
            raise EngineError(
                f"rows of the denoiser: got {rows}, expected the same number for each of {', '.join(sources)}"
            )
        return int(prompts)

    def shared(self, name: str, calls: Sequence[Sequence[Branch]], prompts: int) -> Shared:
        """A step in which these branches are divided over processes."""
        assert self.ranks is not None
        every = tuple((one.name, one.source, tuple(one.marks.items())) for call in calls for one in call)
        key, layout = (name, every, prompts), self.layouts[name]
        if key not in self.divisions:
            full = layout.blocks.full
            self.divisions[key] = divide(calls, layout.depth, self.ranks.size, prompts=prompts, full=full)
        return Shared(self.ranks, self.divisions[key], prompts)

    def blank(self, name: str, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> Any:
        """An output of the denoiser for one source, right in form and shape only: blocks are skipped where possible."""
        key = name, sources, tuple(arguments[self.adapter.sample].shape)
        if key not in self.blanks:
            layout = self.layouts[name]
            plan = make_plan([Branch(sources[0], sources[0])], layout.depth, full=layout.blocks.full)
            left_out = passing(plan, not layout.blocks.full)
            self.blanks[key] = self.compute(name, plain, arguments, sources, left_out)
        return self.blanks[key]

    def place(self, moment: Moment, sample: Tensor) -> str:
        """The position in the run, in words that are the same on each rank."""
        words = f"step {moment.step} of {moment.steps}"
        if moment.step == 0:
            words += f" of call {fingerprint(self.call)} by {fingerprint({'guidance': repr(self.guidance)})}"
        if moment.step in (0, 1, moment.steps - 1):  # this waits for the device
            words += f" on latents {fingerprint(sample)}"
        return words

    def _denoise(self, name: str, plain: Call, arguments: Arguments) -> Any:
        """The replacement of a denoiser's forward."""
        step = self.step if self.step is not None else self.strategy.begin(self, name)
        output = step.answer(self.turn, plain, arguments)
        self.turn = (self.turn + 1) % len(step.calls)
        self.step = step if self.turn else None
        self.steps_done += not self.turn
        return output

    def _reached(self, layout: Layout) -> Iterator[nn.Module]:
        """The modules whose forward is replaced."""
        perturbed = self.strategy.perturbed_layers(layout)
        every = layout.attend is not None and not self.compiled
        yield layout.denoiser
        yield from self.quickened[layout.denoiser]
        for unit in layout.units:
            yield unit.module
            if every or unit.layer in perturbed:
                yield from (module for _, module in unit.attentions)
            if unit.layer in perturbed:
                yield from unit.compiled_around

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Let the pipeline hold its denoisers without their compiled wrappers, within the block."""
        parts = vars(self.pipe)
        given = {name: parts[name] for name in self.layouts}
        parts |= {name: layout.denoiser for name, layout in self.layouts.items()}
        try:
            yield
        finally:
            for name, layout in self.layouts.items():
                if parts[name] is layout.denoiser:  # not another one that was set meanwhile
                    parts[name] = given[name]
