"""What a call would compute, said before it runs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stgfast.announced import plan_of
from stgfast.batching.plan import Plan
from stgfast.batching.stack import Layout
from stgfast.call import check, settings_of, settle
from stgfast.engine import plan_for
from stgfast.guidance import Guidance, Moment, Schedule
from stgfast.install import installed_on
from stgfast.integrations.spec import Adapter, CallArguments


@dataclass(frozen=True)
class Phase:
    """Steps in which the same branches are computed in the same way."""

    first: int
    last: int
    weights: dict[str, float]  # at the first step of the phase; empty where the pipeline is left alone
    rescale: float  # likewise
    varies: bool  # whether later steps of the phase weigh the same branches differently
    plans: tuple[Plan, ...]  # one for every call of the denoiser that computes anything
    announced: bool = False  # the pipeline asks for these branches, and combines them, itself

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that every block computes in a step, for one prompt."""
        return tuple(sum(rows) for rows in zip(*(plan.computed for plan in self.plans), strict=True))

    @property
    def branches(self) -> int:
        return sum(len(plan.branches) for plan in self.plans)


@dataclass(frozen=True)
class Explanation:
    """The plan of a call. Block-rows are counted for one prompt: a block that runs on one sample is one."""

    pipeline: str
    protocol: str
    depth: int
    cfg: float | None
    guidance: Guidance
    max_rows: int | None
    phases: tuple[Phase, ...]

    @property
    def block_rows(self) -> int:
        """What the call computes."""
        return sum(phase.steps * sum(phase.rows) for phase in self.phases)

    @property
    def unshared(self) -> int:
        """What it would compute with every branch run through every block."""
        return sum(phase.steps * phase.branches * self.depth for phase in self.phases)

    @property
    def cfg_alone(self) -> int:
        """What the pipeline computes without stgfast."""
        if any(phase.announced for phase in self.phases):
            return self.unshared
        return sum(phase.steps for phase in self.phases) * self.depth * (1 if self.cfg is None else 2)

    def __str__(self) -> str:
        scale = ", without CFG" if self.cfg is None else f", CFG scale {self.cfg:g}"
        scale = "" if any(phase.announced for phase in self.phases) else scale
        lines = [f"{self.pipeline}: {self.depth} blocks, {self.protocol}{scale}", *self._settings()]
        total = sum(phase.steps for phase in self.phases)
        for phase in self.phases:
            lines.append(f"steps {phase.first} to {phase.last} of {total}: {_formula(phase)}")
            if phase.weights or phase.announced:
                lines += [f"  {line}" for line in _blocks(phase.rows)]
        lines.append(
            f"block-rows per prompt: {self.block_rows}; {self.unshared} without sharing "
            f"({1 - self.block_rows / self.unshared:.1%} saved); {self.cfg_alone} without stgfast"
        )
        return "\n".join(lines)

    def _settings(self) -> list[str]:
        lines = [
            f"{name}: {part.of} with {part.kind} at {_plural('layer', part.layers)}, scale {_short(part.scale)}, "
            f"held against {part.base}"
            for name, part in zip(self.guidance.names, self.guidance.perturbations, strict=True)
        ]
        if self.guidance.rescale != 0.0:
            lines.append(f"rescale: {_short(self.guidance.rescale)}")
        if self.guidance.cfg is not None:
            lines.append(f"CFG scale in place of the pipeline's: {_short(self.guidance.cfg)}")
        if self.max_rows is not None:
            lines.append(f"at most {self.max_rows} rows in a block at once")
        return lines


def explain(pipe: Any, **arguments: Any) -> Explanation:
    """The plan of `pipe(**arguments)`, without running it; arguments left out have the pipeline's defaults."""
    installed = installed_on(pipe)
    adapter = installed.adapter
    given = {name: arguments.pop(name) for name in settings_of(installed.original) if name in arguments}
    bound = inspect.signature(installed.original.__call__).bind_partial(pipe, **arguments)
    bound.apply_defaults()
    call = bound.arguments
    announced = adapter.announces(pipe)
    guidance = settle(installed.guidance(pipe), None if announced else adapter.own_rescale(call), given)
    check(pipe, adapter, guidance, call)
    layout = next(iter(adapter.layouts(pipe).values()))
    if announced:
        cfg, phases = None, _announced(pipe, adapter, guidance, call, layout)
    else:
        cfg, phases = adapter.requested(call), _weighed(adapter, guidance, call, layout)
    return Explanation(adapter.pipeline, adapter.protocol, layout.depth, cfg, guidance, installed.max_rows, phases)


def _weighed(adapter: Adapter, guidance: Guidance, call: CallArguments, layout: Layout) -> tuple[Phase, ...]:
    """Where the engine combines."""
    cfg = adapter.requested(call)
    calls = adapter.calls(cfg is not None)
    every = frozenset(source for sources in calls for source in sources)
    steps = adapter.steps_asked(call)

    def phase(step: int) -> tuple[dict[str, float], float, frozenset[str]]:
        moment = Moment(step, steps)
        if not guidance.acts(moment):
            return {}, 0.0, every
        weights = guidance.weights(moment, cfg)
        return weights, guidance.phi(moment), frozenset(weights)

    phases = []
    for (_, weighed), same in itertools.groupby(range(steps), key=lambda step: (bool(phase(step)[0]), phase(step)[2])):
        run = list(same)
        weights, rescale, _ = phase(run[0])
        varies = any(phase(step) != phase(run[0]) for step in run)
        plans = tuple(plan_for(guidance, sources, weighed, layout) for sources in calls)
        phases.append(Phase(run[0], run[-1], weights, rescale, varies, plans))
    return tuple(phases)


def _announced(
    pipe: Any, adapter: Adapter, guidance: Guidance, call: CallArguments, layout: Layout
) -> tuple[Phase, ...]:
    """Where the pipeline asks for its weak branches, and combines, itself."""
    assert adapter.passes is not None
    assert adapter.preview is not None
    steps, seen = adapter.steps_asked(call), copy.copy(pipe)
    passes = []
    for step in range(steps):
        moment = Moment(step, steps)
        adapter.preview(seen, call, moment)
        passes.append(adapter.passes(seen, call, guidance, moment, next(iter(adapter.layouts(pipe)))))
    phases = []
    for _, same in itertools.groupby(range(steps), key=lambda step: passes[step]):
        run = list(same)
        one = passes[run[0]]
        plans = tuple(plan_of(one, asked, layout) for asked in one.turns if not set(asked) <= one.weak.keys())
        phases.append(Phase(run[0], run[-1], {}, 0.0, False, plans, announced=True))
    return tuple(phases)


def _formula(phase: Phase) -> str:
    if phase.announced:
        branches = [branch.name for plan in phase.plans for branch in plan.branches]
        return f"the pipeline asks for {', '.join(branches)} and combines them itself"
    if not phase.weights:
        return "the pipeline's own"
    terms = " ".join(f"{weight:+g} {branch}" for branch, weight in phase.weights.items())
    rescaled = f", rescaled by {phase.rescale:g}" if phase.rescale else ""
    return f"g = {terms}{rescaled}" + (f" at step {phase.first}, then by schedule" if phase.varies else "")


def _blocks(rows: Sequence[int]) -> list[str]:
    lines, first = [], 0
    for count, same in itertools.groupby(rows):
        last = first + len(list(same)) - 1
        lines.append(f"block{'s' if last > first else ''} {first}{f' to {last}' if last > first else ''}: {count} rows")
        first = last + 1
    return lines


def _plural(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _short(schedule: Schedule) -> str:
    if callable(schedule):
        return "a function of progress"
    return f"{schedule:g}" if isinstance(schedule, float) else f"one of {len(schedule)} numbers in every step"
