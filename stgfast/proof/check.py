"""Compare accelerated guidance with the plain method, for one call of one pipeline.

1. How the pipeline combines, measured without its model, with what the adapter says: for all steps.
2. One step of each denoiser: each branch alone through the whole model, with the engine's prediction; and what the
   scheduler receives, with what it would receive for the plain method's result.
3. At scale 0, the scheduler receives what the pipeline itself would send.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from stgfast.announced import Answering
from stgfast.batching.arguments import Arguments
from stgfast.batching.execution import AS_IT_IS, Execution
from stgfast.batching.seam import Call
from stgfast.combining import Combining
from stgfast.engine import Run, Strategy
from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, Fitted
from stgfast.integrations.steps import CallArguments
from stgfast.kinds import RESIDUAL
from stgfast.proof.claims import claims_of, end_of_parts
from stgfast.proof.engine_step import EngineStep
from stgfast.proof.measure import LINEAR, Stand, measured
from stgfast.proof.plain import KINDS
from stgfast.proof.plain_step import PlainStep, allowed, apart, epsilon
from stgfast.proof.suspects import suspects
from stgfast.proof.verdict import Line, Verdict
from stgfast.proof.watch import Watch
from stgfast.schedules import Moment


class Accelerated(NamedTuple):
    """An accelerated pipeline and one call of it.

    Attributes:
        cls: the pipeline's own class.
    """

    fitted: Fitted
    cls: type[Any]
    guidance: Guidance
    call: Mapping[str, Any]
    execution: Execution = AS_IT_IS


def check(given: Accelerated) -> Verdict:
    """Compare accelerated guidance with the plain method. The pipeline is not changed."""
    checking = Checking(given)
    with torch.no_grad():
        try:
            if given.fitted.adapter.announces(given.fitted.pipe):
                checking.announced()
            else:
                checking.combining()
        except Exception as error:  # whatever wrong facts lead to
            checking.wrong.append(f"it cannot be run, {type(error).__name__}: {error}")
    return Verdict(
        given.cls.__name__, tuple(checking.lines), tuple(checking.wrong), tuple(checking.notes), checking.instead
    )


class Checking:
    """The state of one check."""

    def __init__(self, given: Accelerated):
        self.given = given
        self.adapter: Adapter = given.fitted.adapter
        self.lines: list[Line] = []
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.instead: Adapter | None = None
        self.engine: EngineStep | Exception | None = None  # what ran last
        self.guidance = self._plain(given.guidance)
        denoisers = {name: layout.denoiser for name, layout in given.fitted.layouts.items()}
        self.watch = Watch(given.fitted.pipe, given.cls, given.call, denoisers, self.adapter.sample)
        self.stand = Stand(self.watch)

    def _plain(self, guidance: Guidance) -> Guidance:
        """The part of a guidance that the plain method has. Reuse is an approximation, and a projection does not
        depend on facts.
        """
        other = {part.kind for part in guidance.perturbations if part.kind not in KINDS}
        for kind in sorted(other):
            self.notes.append(
                f"The plain method has no kind {kind!r}: residual, in the same layers, was checked instead."
            )
        parts: Any = [
            replace(part, kind=RESIDUAL, axis="", sigma=None) if part.kind in other else part
            for part in guidance.perturbations
        ]
        return replace(guidance.exact, perturbations=parts, project="", eta=0.0)

    # Pipelines that combine

    def combining(self) -> None:
        with torch.compiler.set_stance("force_eager"):
            self.combined = measured(self.watch, self.stand)
            self.claimed = claims_of(self.watch, self.stub(), self.adapter)
        self.steps, made = self.claimed[0].steps, len(self.claimed)
        expected = end_of_parts([claimed.steps for claimed in self.claimed]) if self.adapter.windowed else self.steps
        if made != expected:
            self.wrong.append(f"steps: the adapter says {self.steps}, the pipeline makes {made}")
        for step, (combined, claimed) in enumerate(zip(self.combined, self.claimed, strict=False)):
            mistaken = "" if self.wrong else claimed.mistaken(step, combined, self.adapter)
            if mistaken:
                self.wrong.append(mistaken)
        # Weights that the adapter claims, and that agree, are more exact than those measured under a rescale.
        pairs = zip(self.combined, self.claimed, strict=False)
        self.combined = [one._replace(weights=claimed.weights) if one.off > LINEAR else one for one, claimed in pairs]
        for name in () if self.wrong else self.given.fitted.layouts:
            self._step(name)

    def _step(self, name: str) -> None:
        """One step of one denoiser, by the plain method and by the engine."""
        step = self._step_of(name)
        if step is None:
            self.notes.append(f"pipe.{name} was not checked: no step of this call that is guided calls it.")
            return
        layout, combined, moment = self.given.fitted.layouts[name], self.combined[step], self._moment(step)
        plain = PlainStep(self.watch, self.stub(), layout, self.guidance, combined, moment)
        self.notes += plain.notes
        if plain.links.mistaken:
            self.wrong.append(plain.links.mistaken)
        where = f"step {step + 1} of {self.steps}, pipe.{name}"
        if combined.off > LINEAR:
            phi = self.adapter.own_rescale(self.given.call) or 0.0
            error = apart(plain.own_by_formula(phi), plain.own)
            words = f"the pipeline's own step, by the formula with rescale {phi:g}"
            self.lines.append(Line(f"{where}: {words}", error, plain.budget * plain.grown))
        made = self._against(plain, self.adapter, where)
        if not any(math.isinf(line.error) for line in made):
            self._count(plain, where)
        own = self._engine(step, Guidance(), self.adapter)
        if isinstance(own, EngineStep):
            exact = self.given.execution == AS_IT_IS
            error, budget = apart(own.seen.combined, plain.own), 0.0 if exact else plain.budget * plain.grown
            made.append(Line(f"{where}: equal at scale 0", error, budget))
        self.lines += made
        if not self.wrong and not all(line.ok for line in made):
            self._suspect(plain, where)

    def _against(self, plain: PlainStep, adapter: Adapter, where: str) -> list[Line]:
        """Compare a step by the engine, with the facts of an adapter, with the plain method."""
        engine = self._engine(plain.moment.step, plain.guidance, adapter)
        self.engine = engine
        if not isinstance(engine, EngineStep):
            return [Line(f"{where}: the engine fails, {type(engine).__name__}: {engine}", math.inf, plain.budget)]
        errors = {
            branch: apart([engine.predictions[branch]], [prediction])
            for branch, prediction in plain.predictions.items()
            if branch in engine.predictions
        }
        made = []
        for branch, error in errors.items():
            words, budget = self._in_words(branch, plain.guidance), plain.distinguishable(branch, errors[COND])
            if budget is None and adapter is self.adapter:
                self.notes.append(f"{where}: rounding hides whether {words} changes anything.")
            made.append(Line(f"{where}: {words}", error, plain.budget if budget is None else budget))
        error = apart(engine.seen.combined, plain.sent)
        return [*made, Line(f"{where}: the prediction passed to the scheduler", error, plain.budget * plain.grown)]

    def _count(self, plain: PlainStep, where: str) -> None:
        """Compare the rows that blocks ran on with the plan."""
        assert isinstance(self.engine, EngineStep)
        if not self.engine.rows:
            return
        ran, branches = plain.block_rows(self.engine.rows), len(plain.predictions)
        planned = sum(sum(plan.computed) for plan in self.engine.plans)
        if round(ran, 3) != planned:
            self.wrong.append(f"{where}: the plan has {planned} block-rows, {ran:g} ran")
        whole = branches * plain.layout.depth
        self.notes.append(f"{where}: {ran:g} block-rows ran, {whole} without sharing.")

    def _suspect(self, plain: PlainStep, where: str) -> None:
        """The facts with which the step would be right, and the layers at which it is wrong."""
        for words, adapter in suspects(self.adapter, plain.links, self.combined[0].rows):
            if all(line.ok for line in self._against(plain, adapter, where)):
                self.wrong.append(f"{words} gives the right result")
                self.instead = self.instead or adapter
        if self.wrong or any(math.isinf(line.error) for line in self.lines):
            return
        several = [part for part in plain.guidance.perturbations if len(part.layers) > 1]
        for one in [replace(part, layers=[layer]) for part in several for layer in part.layers]:
            guidance = Guidance(one)
            alone = PlainStep(self.watch, self.stub(), plain.layout, guidance, plain.combined, plain.moment)
            if not all(line.ok for line in self._against(alone, self.adapter, where)):
                self.wrong.append(f"{where}: {one.kind} at layer {one.layers[0]} is wrong")

    def _step_of(self, name: str) -> int | None:
        """The step of a denoiser with the most branches."""
        best, most = None, 0
        for step, (combined, claimed) in enumerate(zip(self.combined, self.claimed, strict=False)):
            if step >= self.steps or combined.names[0] != name or not self.guidance.acts(self._moment(step)):
                continue
            weighed = len(self.guidance.weights(self._moment(step), claimed.scale))
            if weighed > most:
                best, most = step, weighed
        return best

    def _moment(self, step: int) -> Moment:
        if not self.guidance.by_sigma:
            return Moment(step, self.steps)
        return Moment(step, self.steps, self.adapter.sigmas(self.watch.copy, self.steps)[step])

    def _in_words(self, branch: str, guidance: Guidance) -> str:
        parts = dict(zip(guidance.names, guidance.perturbations, strict=True))
        return str(Guidance(replace(parts[branch], scale=1.0))) if branch in parts else branch

    # Pipelines that ask for their perturbed branches themselves

    def announced(self) -> None:
        """Check a pipeline that asks for its branches: each must be the model's own output."""
        if not self.guidance.inert:
            self.notes.append("Checked with the perturbed passes of the pipeline, not with those of the guidance.")

        def own(step: int, turn: int, name: str, plain: Call, arguments: Arguments) -> Any:
            return arguments.given_to(plain)

        with torch.compiler.set_stance("force_eager"):
            stock = self.watch.run(own, steps=1)[0]
        engine = self._engine(0, Guidance(), self.adapter)
        if isinstance(engine, Exception):
            self.wrong.append(f"the engine fails, {type(engine).__name__}: {engine}")
        else:
            depth = max(layout.depth for layout in self.given.fitted.layouts.values())
            budget = allowed(depth * epsilon(dtype := stock.sent[0].dtype), dtype)
            self.lines.append(
                Line("step 1: the prediction passed to the scheduler", apart(engine.seen.sent, stock.sent), budget)
            )

    # Both

    def stub(self) -> Any:
        """Outputs for the steps that are not compared."""
        rows = self.combined[0].rows
        return self.stand.answer(lambda shape, group: torch.ones(shape), rows, own=True)

    def _engine(self, step: int, guidance: Guidance, adapter: Adapter) -> EngineStep | Exception:
        """A step by the engine, or its error, which is part of the verdict: wrong facts may lead to any."""
        given = self.given

        def make(pipe: Any, call: CallArguments) -> Run:
            announced = adapter.announced if adapter.announces(pipe) else None
            strategy: Strategy = Combining(guidance) if announced is None else Answering(announced, guidance)
            fitted = adapter.on(pipe)
            return Run(fitted, guidance, call, strategy, given.execution)

        try:
            return EngineStep(self.watch, None if step == 0 else self.stub(), step, make)
        except Exception as error:
            return error
