"""Steps in which the engine combines: each prediction that the pipeline receives becomes g.

first call of a step     the weight of each branch at this moment
each call of a step      its branches as one stack, with no row computed twice
last call of a step      g, which the pipeline then combines with itself
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.outputs import prediction_in, with_prediction
from stgfast.batching.plan import Plan, branches_for, make_plan, passing
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.engine import Run
from stgfast.errors import SettingsError
from stgfast.forecast import KeptBlocks
from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.guidance import Guidance
from stgfast.kernels import Projection, combine
from stgfast.memory import Memory
from stgfast.reuse import KeptDifferences


class Combining:
    """The strategy of a run in which the engine combines."""

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        self.memory: Memory = KeptDifferences(guidance, guidance.bases)
        self.blocks = KeptBlocks(guidance)
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def begin(self, run: Run, name: str) -> CombiningStep:
        return CombiningStep(self, run, name)

    def perturbed_layers(self, layout: Layout) -> Collection[int | None]:
        return {layer for part in self.guidance.perturbations if part.how.inside for layer in part.layers}

    def plan(self, step: CombiningStep, sources: tuple[str, ...], mine: frozenset[str] | None = None) -> Plan:
        """The plan of a call of the denoiser, for all of its branches or some of them. Equal steps share one plan."""
        key = (step.name, step.acts, sources, step.computed, step.skips, mine)
        if key not in self.plans:
            plan = plan_for(step.guidance, sources, step.computed, step.layout, mine)
            self.plans[key] = passing(plan, step.skips)
        return self.plans[key]

    # Replaced for a sampler that combines by itself.

    def arranged(self, run: Run, arguments: Arguments, sources: Sequence[str]) -> Arguments:
        """The arguments of a call, with one row for each source and prompt."""
        return arguments

    def needed(self, step: CombiningStep) -> frozenset[str]:
        """The branches that the combination needs."""
        return branches_of(step.weights)

    def combined(self, step: CombiningStep) -> Any:
        """The output that the pipeline receives from the last call of a step."""
        return step.in_place_of_all(step.guided(step.weights, step.dtype))


class CombiningStep:
    """The state of one step."""

    def __init__(self, strategy: Combining, run: Run, name: str):
        self.strategy, self.run, self.name, self.layout = strategy, run, name, run.layouts[name]
        guidance, self.moment = strategy.guidance, run.moment()
        moment = self.moment
        self.cfg = cfg = run.adapter.live(run.pipe, run.call, name)
        self.calls = run.adapter.calls(cfg is not None)
        self.acts, self.skips = guidance.acts(moment), False
        self.guidance = guidance if self.acts else Guidance()  # of this step
        self.predictions: dict[str, Tensor] = {}  # predictions by branch, from the calls of this step
        self.handed: list[weakref.ref[Tensor]] = []  # outputs of earlier calls of this step
        self.form: Callable[[Tensor], Any] | None = None  # the form of the denoiser's output
        self.computed = frozenset(source for sources in self.calls for source in sources)
        if self.acts:
            self.weights = guidance.weights(moment, cfg)
            self.scale = guidance.cfg_at(moment, cfg)
            self.rescale = guidance.phi(moment)
            if cfg is None and guidance.needs_uncond(self.weights):
                raise SettingsError(f"CFG was switched off at step {moment.step}, but the guidance needs it")
            needed = strategy.needed(self)
            if guidance.reuses and moment.step in run.noisier:
                strategy.memory.forget()
                strategy.blocks.forget()
            self.recalled = strategy.memory.recalled(needed, moment.step, name)
            self.computed = needed - self.recalled
            self.skips = strategy.blocks.skips(self.computed, moment.step, name)

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        run, sources = self.run, self.calls[turn]
        if not self.acts and not run.divided:
            return arguments.given_to(plain)
        arguments = self.strategy.arranged(run, arguments, sources)
        if not self.acts:
            return self.own(turn, plain, arguments, sources)
        self.predict(plain, arguments, sources)
        return self.hand_out() if turn < len(self.calls) - 1 else self.end()

    def own(self, turn: int, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> Any:
        """Run the pipeline's own step, with the limit on rows, or block by block."""
        return self.run.compute(self.name, plain, arguments, sources, self.strategy.plan(self, sources))

    def end(self) -> Any:
        """The output of the last call, when all branches are known."""
        known: dict[str, tuple[Tensor, ...]] = {name: (prediction,) for name, prediction in self.predictions.items()}
        self.strategy.memory.complete(known, self.recalled, self.scale)
        self.predictions = {name: prediction for name, (prediction, *_) in known.items()}
        return self.strategy.combined(self)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of g: that of the computation, if the pipeline combines in float32."""
        return None if self.run.adapter.float32 else self.predictions[COND].dtype

    def guided(self, weights: Mapping[str, float], dtype: torch.dtype | None) -> Tensor:
        """The guidance formula. A learned sigma has the same weights, but no rescale and no projection."""
        if GUIDED in weights:
            uncond, scale = self.predictions[UNCOND], cast(Tensor, self.cfg)
            self.predictions[GUIDED] = uncond + scale * (self.predictions[COND] - uncond)
        weights = {COND: weights.get(COND, 0.0), **weights}
        numbers, predictions = list(weights.values()), [self.predictions[name] for name in weights]
        project = projection(self.strategy.guidance, list(weights))
        if not self.run.adapter.learned_sigma:
            return combine(predictions, numbers, rescale=self.rescale, project=project, dtype=dtype)
        noise, sigma = zip(*(prediction.chunk(2, dim=1) for prediction in predictions), strict=True)
        guided = combine(noise, numbers, rescale=self.rescale, project=project, dtype=dtype)
        return torch.cat([guided, combine(sigma, numbers, dtype=dtype)], dim=1)

    def in_place_of_all(self, guided: Tensor) -> Any:
        """Put g in place of each prediction that the pipeline has. Then u + s (c - u) is g, for any CFG scale."""
        held = self.held()
        if held is None:
            # The pipeline has used c already, or copied it: with this u, its own u + s (c - u) is g.
            scale, given = cast(Tensor, self.cfg), self.given()
            guided = (guided if given is None else guided - scale * given.to(guided.dtype)) / (1 - scale)
        else:
            for tensor in held:
                tensor.copy_(guided)
        copies = len(self.calls[-1])
        return self.formed(join([guided] * copies))

    def held(self) -> list[Tensor] | None:
        """The output of an earlier call of this step, or None if the pipeline has made something else from it."""
        held = [tensor for handed in self.handed if (tensor := handed()) is not None]
        kept = not self.handed or (len(held) == len(self.handed) and not self.run.adapter.early)
        return held if kept else None

    def given(self) -> Tensor | None:
        """The tensor that was returned for cond; None for 0."""
        return self.predictions[COND]

    def formed(self, prediction: Tensor) -> Any:
        """A prediction in the form that the denoiser returns."""
        assert self.form is not None
        return self.form(prediction)

    def predict(self, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> None:
        """Compute each branch that starts from the rows of this call."""
        plan = self.strategy.plan(self, sources)
        if plan.branches:
            self.take(plan, self.run.compute(self.name, plain, arguments, sources, plan, self.strategy.blocks.ends))

    def take(self, plan: Plan, output: Any) -> None:
        """Store the predictions of a plan's branches."""
        self.form = functools.partial(with_prediction, output)
        predictions = prediction_in(output).chunk(len(plan.branches))
        self.predictions |= zip([branch.name for branch in plan.branches], predictions, strict=True)

    def hand_out(self) -> Any:
        """Return a tensor that the last call fills with g: the pipeline calls again before it combines."""
        given = self.predictions[COND].clone()
        self.handed.append(weakref.ref(given))
        return self.formed(given)


def branches_of(weighed: Collection[str]) -> frozenset[str]:
    """The branches that are needed, given those that have a weight: the CFG result needs two."""
    return frozenset(weighed) - {GUIDED} | ({COND, UNCOND} if GUIDED in weighed else frozenset())


def plan_for(
    guidance: Guidance,
    sources: Sequence[str],
    weighed: Collection[str],
    layout: Layout,
    mine: Collection[str] | None = None,
) -> Plan:
    """The plan of a call of the denoiser on these rows, for all of these branches or some of them."""
    branches = branches_for(guidance, sources, weighed, layout.marks)
    some = [branch for branch in branches if mine is None or branch.name in mine]
    return make_plan(some, layout.depth, full=layout.blocks.full)


def projection(guidance: Guidance, names: Sequence[str]) -> Projection | None:
    """The projection of a guidance formula, with branches as numbers."""
    lost = None if guidance.formula is None else guidance.formula.lost(guidance, names)
    if lost is None:
        return None
    return Projection(names.index(lost.of), tuple(lost.along.get(name, 0.0) for name in names), lost.left)
