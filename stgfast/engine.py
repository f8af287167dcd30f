"""One guided call of a pipeline, and its denoising steps. No model is named here.

A pipeline calls its denoiser once or more in every step. While a guided call runs, the engine stands in for those
calls, and for those of the denoiser's blocks:

    first call of a step     what every branch weighs at this moment             GuidedRun._begin_step
    every call of a step     its branches as one stack, no row computed twice    GuidedRun._predict
    last call of a step      g, which the pipeline then combines with itself     GuidedRun._combine
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Plan, branches_for, make_plan
from stgfast.batching.room import Room, Rows
from stgfast.batching.rows import spans, take
from stgfast.batching.seam import Call, compiled, compiled_calls, handling, held
from stgfast.batching.stack import Stack
from stgfast.errors import EngineError, SettingsError
from stgfast.guidance import ALONG_COND, ALONG_UNCOND, ATTENTION, BLUR, COND, GUIDED, ORTHOGONAL, UNCOND, Guidance
from stgfast.integrations.spec import Adapter, CallArguments
from stgfast.kernels import combine
from stgfast.reuse import Kept
from stgfast.schedules import Moment


class GuidedRun:
    """One guided call of a pipeline while it runs."""

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        guidance: Guidance,
        *,
        call: CallArguments,
        max_rows: Rows = None,
        compilation: Mapping[str, Any] | None = None,
    ):
        self.pipe, self.adapter, self.guidance, self.call, self.max_rows = pipe, adapter, guidance, call, max_rows
        self.room = Room(max_rows)
        self.layouts = adapter.layouts(pipe)
        # The calls of blocks that are compiled for a guided run alone. A denoiser compiled as a whole would not let its
        # blocks be reached: they are compiled one by one instead.
        self.compiled: dict[nn.Module, Call] = {}
        for name, layout in self.layouts.items():
            make, units = getattr(getattr(pipe, name), "dynamo_ctx", None), layout.units
            if make is None and compilation is not None:
                make = functools.partial(torch.compile, **compilation)
                units = [unit for unit in units if unit.layer is not None and not compiled(unit.module)]
            if make is not None:
                self.compiled |= compiled_calls([unit.module for unit in units], make)
        every = [unit.module for layout in self.layouts.values() for unit in layout.units]
        self.compiles = bool(self.compiled) or any(map(compiled, every))
        self.plans: dict[tuple[str, tuple[str, ...], frozenset[str]], Plan] = {}
        self.step = 0  # steps done
        self.turn = 0  # calls of the denoiser done in this step
        self.kept = Kept(guidance)
        self.predictions: dict[str, Tensor] = {}  # of every branch, as the step's calls give them
        self.form: Callable[[Tensor], Any] | None = None  # of what the denoiser returns

    def whole(self, call: Callable[[], Any]) -> Any:
        with self.in_place():
            result = call()
        self.finish()
        return result

    def finish(self) -> None:
        """A run that ended without interruption has made all its steps: one of another model, or around the model's
        call, was not guided."""
        steps = self.adapter.steps(self.pipe)
        if (self.step, self.turn) != (steps, 0) and not getattr(self.pipe, "interrupt", False):
            made = f"{self.step} steps" + (f" and {self.turn} calls of another" if self.turn else "")
            raise EngineError(
                f"guided steps: got {made}, expected {steps}; was pipe.{next(iter(self.layouts))} exchanged during the "
                f"call, or is the adapter's protocol, {self.adapter.protocol!r}, or are its denoisers wrong?"
            )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, calls of the denoiser are guided."""
        modules = [module for layout in self.layouts.values() for module in self._reached(layout)]
        handlers = {layout.denoiser: functools.partial(self._denoise, name) for name, layout in self.layouts.items()}
        with self.adapter.within(self.pipe), self._uncompiled(), held(modules), handling(handlers):
            yield

    def _reached(self, layout: Layout) -> Iterator[nn.Module]:
        """The modules that are stood in for."""
        masked = self._masked(layout)
        every = layout.attend is not None and not self.compiled
        yield layout.denoiser
        for unit in layout.units:
            yield unit.module
            if every or unit.layer in masked:
                yield from (module for _, module in unit.attentions)
            if unit.layer in masked:
                yield from unit.compiled_around

    def _masked(self, layout: Layout) -> set[int | None]:
        """The layers with attention to be stood in for."""
        return {
            layer for part in self.guidance.perturbations if part.kind in (ATTENTION, BLUR) for layer in part.layers
        }

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Within the block, the pipeline holds its denoisers themselves and not compiled wrappers around them."""
        parts = vars(self.pipe)
        given = {name: parts[name] for name in self.layouts}
        parts |= {name: layout.denoiser for name, layout in self.layouts.items()}
        try:
            yield
        finally:
            for name, layout in self.layouts.items():
                if parts[name] is layout.denoiser:  # and not another one, put there meanwhile
                    parts[name] = given[name]

    def _denoise(self, name: str, plain: Call, arguments: Arguments) -> Any:
        """Stands in for a denoiser."""
        if self.turn == 0:
            self._begin_step(name)
        last = self.turn == len(self.calls) - 1
        sources = self.calls[self.turn]
        if self.acts:
            self._predict(plain, arguments, sources)
            if last:
                self.kept.complete(self.predictions, self.old, self.scale)
            output = self._combine() if last else self._hand_out()
        elif self.max_rows is None and not self.compiled:
            output = arguments.given_to(plain)
        else:  # the pipeline's own step, within the bound on rows, or block by block
            output = self._compute(plain, arguments, sources, self._plan(Guidance(), sources, frozenset(sources)))
        if last:  # nothing of a step is held while the scheduler works
            self.predictions.clear()
            self.form = None
        self.turn = 0 if last else self.turn + 1
        self.step += last
        return output

    def _begin_step(self, name: str) -> None:
        self.name, self.layout = name, self.layouts[name]
        moment = self._moment()
        self.cfg = cfg = self.adapter.live(self.pipe, self.call, name)
        self.calls = self.adapter.calls(cfg is not None)
        self.acts = self.guidance.acts(moment)
        self.handed: list[weakref.ref[Tensor]] = []  # what earlier calls of this step gave
        if self.acts:
            self.weights = self.guidance.weights(moment, cfg)
            self.scale = self.guidance.cfg_at(moment, cfg)
            self.rescale = self.guidance.phi(moment)
            if cfg is None and self._needs_uncond():
                raise SettingsError(f"CFG was switched off at step {self.step}, but the guidance needs it")
            needed = branches_of(self._weighed())
            self.old = self.kept.old(needed, self.step, name)
            self.computed = needed - self.old

    def _moment(self) -> Moment:
        steps = self.adapter.steps(self.pipe)
        if self.step >= steps:
            raise EngineError(f"denoising steps: got one more than the {steps} that the scheduler has")
        if not self.guidance.by_sigma:
            return Moment(self.step, steps)
        if self.step == 0:
            self.sigmas = self.adapter.sigmas(self.pipe, steps)
        return Moment(self.step, steps, self.sigmas[self.step])

    def _weighed(self) -> Collection[str]:
        """The branches that this step combines."""
        return self.weights

    def _needs_uncond(self) -> bool:
        parts = zip(self.guidance.names, self.guidance.perturbations, strict=True)
        return not {UNCOND, GUIDED}.isdisjoint(self.weights) or any(
            part.of == UNCOND and name in self.weights for name, part in parts
        )

    def _predict(self, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> None:
        """Every branch that starts from the rows of this call."""
        plan = self._plan(self.guidance, sources, self.computed)
        if not plan.branches:
            return
        output = self._compute(plain, arguments, sources, plan)
        self.form = functools.partial(_in_form_of, output)
        predictions = _prediction_in(output).chunk(len(plan.branches))
        self.predictions |= zip([branch.name for branch in plan.branches], predictions, strict=True)

    def _compute(self, plain: Call, arguments: Arguments, sources: tuple[str, ...], plan: Plan) -> Any:
        """The denoiser's output for the branches of a plan, given arguments with the rows of their sources."""
        rows = arguments[self.adapter.sample].shape[0]
        prompts, left = divmod(rows, len(sources))
        if left:
            raise EngineError(f"rows of the denoiser: got {rows}, expected as many for each of {', '.join(sources)}")
        where = spans([sources.index(branch.source) for branch in plan.branches], prompts)
        grid = self.layout.grid and functools.partial(self.layout.grid.size, self.call, arguments)
        if self.compiles:  # blocks that are CUDA graphs keep what they made until the next call of the denoiser
            torch.compiler.cudagraph_mark_step_begin()
        stacked, device = len(plan.branches) * prompts, arguments[self.adapter.sample].device
        limit = self.room.rows(rows, stacked, device)
        stack = Stack(self.layout, plan, prompts, max_rows=limit, compiled=self.compiled, grid=grid)
        with handling(stack.handlers()), self.room.watched(device):
            output = arguments.changed(
                lambda name, value: take(value, where, rows, name) if name in self.adapter.rows else value
            ).given_to(plain)
        stack.finish()
        return output

    def _hand_out(self) -> Any:
        """The pipeline calls again before it combines: it is given a tensor that the last call fills with g."""
        given = self.predictions[COND].clone()
        self.handed.append(weakref.ref(given))
        return self._formed(given)

    def _combine(self) -> Any:
        """g in place of every prediction that the pipeline holds: whatever its CFG scale, u + s (c - u) is then g."""
        cond = self.predictions[COND]
        if GUIDED in self.weights:
            uncond, scale = self.predictions[UNCOND], cast(Tensor, self.cfg)
            self.predictions[GUIDED] = uncond + scale * (cond - uncond)
        weights = {COND: self.weights.get(COND, 0.0), **self.weights}
        guided = self._guided(weights, None if self.adapter.float32 else cond.dtype)
        held = [tensor() for tensor in self.handed]
        if self.handed and (self.adapter.early or None in held):
            # The pipeline has used c already, or holds a copy: with this for u, its own u + s (c - u) is g.
            scale = cast(Tensor, self.cfg)
            guided = (guided - scale * cond.to(guided.dtype)) / (1 - scale)
        else:
            for tensor in held:
                cast(Tensor, tensor).copy_(guided)
        copies = len(self.calls[self.turn])
        return self._formed(torch.cat([guided] * copies) if copies > 1 else guided)

    def _formed(self, prediction: Tensor) -> Any:
        assert self.form is not None
        return self.form(prediction)

    def _guided(self, weights: Mapping[str, float], dtype: torch.dtype | None) -> Tensor:
        """The formula. A learned sigma beside the noise is weighed alike, but no deviation or direction is its own."""
        numbers, directed = list(weights.values()), self._directed(list(weights))
        predictions = [self.predictions[name] for name in weights]
        if not self.adapter.learned_sigma:
            return combine(predictions, numbers, rescale=self.rescale, dtype=dtype, **directed)
        noise, sigma = zip(*(prediction.chunk(2, dim=1) for prediction in predictions), strict=True)
        guided = combine(noise, numbers, rescale=self.rescale, dtype=dtype, **directed)
        return torch.cat([guided, combine(sigma, numbers, dtype=dtype)], dim=1)

    def _directed(self, names: list[str]) -> dict[str, Any]:
        """Which difference loses its part along which direction; none where a branch of the two has no weight."""
        project = self.guidance.project
        if project == ORTHOGONAL and set(self.guidance.names) <= set(names):
            return {"orthogonal": tuple(map(names.index, self.guidance.names))}
        if project == ALONG_UNCOND and UNCOND in names:
            return {"cfg_zero": names.index(UNCOND)}
        if project == ALONG_COND and UNCOND in names:
            return {"apg": (names.index(UNCOND), self.guidance.eta)}
        return {}

    def _plan(self, guidance: Guidance, sources: tuple[str, ...], weighed: frozenset[str]) -> Plan:
        key = (self.name, sources, weighed)
        if key not in self.plans:
            self.plans[key] = plan_for(guidance, sources, weighed, self.layout)
        return self.plans[key]


def branches_of(weighed: Collection[str]) -> frozenset[str]:
    """The branches that have to be known where these have a weight: the CFG result is made of two."""
    return frozenset(weighed) - {GUIDED} | ({COND, UNCOND} if GUIDED in weighed else frozenset())


def plan_for(guidance: Guidance, sources: Sequence[str], weighed: Collection[str], layout: Layout) -> Plan:
    """The plan of a call of the denoiser on these rows, where these branches are to be computed."""
    branches = branches_for(guidance, sources, weighed, layout.marks)
    return make_plan(branches, layout.depth, full=layout.full)


def _prediction_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output[0] if isinstance(output, tuple) else output.sample)


def _in_form_of(output: Any, prediction: Tensor) -> Any:
    """A denoiser's output with another prediction in it."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return dataclasses.replace(output, sample=prediction)
