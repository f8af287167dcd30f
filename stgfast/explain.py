"""What a call would compute, said before it runs."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stgfast.announced import memory_for, plan_of
from stgfast.batching.layout import Layout
from stgfast.batching.plan import Plan, passing
from stgfast.batching.room import ALL, Rows
from stgfast.call import settings_of
from stgfast.combining import branches_of, plan_for
from stgfast.forecast import KeptBlocks
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.installed import bound_call, installed_on, settled
from stgfast.integrations.spec import Adapter, Announced, Fitted
from stgfast.integrations.steps import CallArguments, scheduled, steps_back
from stgfast.perturbation import Perturbation
from stgfast.recipes import Recipe
from stgfast.reuse import KeptDifferences
from stgfast.schedules import Moment, in_words
from stgfast.spacing import EVERY, when


@dataclass(frozen=True)
class Phase:
    """Steps in which the same branches are computed in the same way."""

    first: int
    last: int
    weights: dict[str, float]  # at the first step of the phase; empty where the pipeline is left alone
    rescale: float  # likewise
    varies: bool  # whether later steps of the phase weigh the same branches differently
    # In how many steps the blocks run by which plans, one for every call of the denoiser that computes anything; there
    # are several kinds of steps where some take branches from others.
    kinds: tuple[tuple[int, tuple[Plan, ...]], ...]
    branches: tuple[str, ...]  # all that have to be known
    announced: bool = False  # the pipeline asks for these branches, and combines them, itself

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that every block computes in a step, the first of the phase, for one prompt."""
        return _rows(self.kinds[0][1])

    @property
    def block_rows(self) -> int:
        return sum(steps * sum(_rows(plans)) for steps, plans in self.kinds)


@dataclass(frozen=True)
class Explanation:
    """The plan of a call. Block-rows are counted for one prompt: a block that runs on one sample is one."""

    pipeline: str
    protocol: str
    depth: int
    cfg: float | None
    guidance: Guidance
    recipe: Recipe | None
    max_rows: Rows
    phases: tuple[Phase, ...]

    @property
    def block_rows(self) -> int:
        """What the call computes."""
        return sum(phase.block_rows for phase in self.phases)

    @property
    def unshared(self) -> int:
        """What it would compute with every branch run through every block."""
        return sum(phase.steps * len(phase.branches) * self.depth for phase in self.phases)

    @property
    def cfg_alone(self) -> int:
        """What the pipeline computes without stgfast."""
        if any(phase.announced for phase in self.phases):
            return self.unshared
        return sum(phase.steps for phase in self.phases) * self.depth * (1 if self.cfg is None else 2)

    @property
    def rows_held(self) -> int:
        """The most rows of one prompt between two blocks, which is what memory goes by."""
        return max(max(step.before, len(step.order)) for plan in self._plans for step in plan.steps)

    @property
    def rows_of_pipeline(self) -> int:
        """The most rows of one prompt in a call of the pipeline's own."""
        return max(len({branch.source for branch in plan.branches}) for plan in self._plans)

    @property
    def rows_at_once(self) -> int:
        """The most rows of one prompt that a block computes at once, unless a GPU is found to have room for more."""
        most = max(max(plan.computed) for plan in self._plans)
        bound = self.rows_of_pipeline if self.max_rows is None else most if self.max_rows == ALL else int(self.max_rows)
        return min(most, bound)

    @property
    def _plans(self) -> list[Plan]:
        return [plan for phase in self.phases for _, plans in phase.kinds for plan in plans if plan.branches]

    def __str__(self) -> str:
        scale = ", without CFG" if self.cfg is None else f", CFG scale {self.cfg:g}"
        scale = "" if any(phase.announced for phase in self.phases) else scale
        lines = [f"{self.pipeline}: {self.depth} blocks, {self.protocol}{scale}", *self._settings()]
        total = sum(phase.steps for phase in self.phases)
        for phase in self.phases:
            lines.append(f"steps {phase.first} to {phase.last} of {total}: {_formula(phase)}")
            if phase.weights or phase.announced:
                for steps, plans in phase.kinds:
                    lines += [f"  in {steps} of them:"] if len(phase.kinds) > 1 else []
                    lines += [f"  {line}" for line in _blocks(_rows(plans))]
        lines.append(
            f"block-rows per prompt: {self.block_rows}; {self.unshared} without sharing "
            f"({1 - self.block_rows / self.unshared:.1%} saved); {self.cfg_alone} without stgfast"
        )
        lines.append(
            f"memory, in rows per prompt: {self.rows_at_once} in a block at once, {self.rows_held} held between "
            f"blocks; {self.rows_of_pipeline} in the pipeline's own calls"
        )
        return "\n".join(lines)

    def _settings(self) -> list[str]:
        lines = [
            f"{name}: {part.of} with {_kind(part)} at {_plural('layer', part.layers)}, scale {in_words(part.scale)}, "
            f"held against {part.base}"
            for name, part in zip(self.guidance.names, self.guidance.perturbations, strict=True)
        ]
        if self.guidance.rescale != 0.0:
            lines.append(f"rescale: {in_words(self.guidance.rescale)}")
        if self.guidance.cfg is not None:
            lines.append(f"CFG scale in place of the pipeline's: {in_words(self.guidance.cfg)}")
        if self.guidance.formula is not None:
            eta = f", of which {self.guidance.eta:g} is left" if self.guidance.eta else ""
            lines.append(f"projection: {self.guidance.formula.words}{eta}")
        lines += [f"approximately, by a recipe: {self.recipe}"] if self.recipe is not None else []
        lines += _reused(self.guidance, {name for phase in self.phases for name in phase.branches})
        return lines


def explain(pipe: Any, **arguments: Any) -> Explanation:
    """The plan of `pipe(**arguments)`, without running it; arguments left out have the pipeline's defaults."""
    installed = installed_on(pipe)
    adapter = installed.adapter
    given = {name: arguments.pop(name) for name in settings_of(installed.original) if name in arguments}
    bind = inspect.signature(installed.original.__call__).bind_partial
    call = bound_call(installed, bind, pipe, **arguments).arguments
    fitted, guidance = settled(pipe, installed, call, given)
    name, layout = next(iter(fitted.layouts.items()))
    if adapter.announces(pipe) and adapter.announced is not None:
        cfg, phases = None, _announced(fitted, adapter.announced, guidance, call, name)
    else:
        cfg, phases = adapter.requested(call), _weighed(pipe, adapter, guidance, call, layout)
    about = adapter.pipeline, adapter.protocol, layout.depth, cfg, guidance
    return Explanation(*about, installed.recipe, installed.max_rows, phases)


def _weighed(pipe: Any, adapter: Adapter, guidance: Guidance, call: CallArguments, layout: Layout) -> tuple[Phase, ...]:
    """Where the engine combines."""
    cfg = adapter.requested(call)
    calls = adapter.calls(cfg is not None)
    every = frozenset(source for sources in calls for source in sources)
    steps = adapter.steps_of_run(pipe, call)
    sigmas = _ahead(pipe, adapter, call, steps, adapter.sigmas) if guidance.by_sigma else [None] * steps
    memory, blocks = KeptDifferences(guidance, guidance.bases), KeptBlocks(guidance)
    models, noisier = _kept_apart(pipe, adapter, guidance, call, steps)

    def computed(needed: frozenset[str], step: int) -> tuple[frozenset[str], bool]:
        if step in noisier:
            memory.forget()
            blocks.forget()
        left = needed - memory.recalled(needed, step, models[step])
        return left, blocks.skips(left, step, models[step])

    def phase(step: int) -> tuple[dict[str, float], float, frozenset[str]]:
        moment = Moment(step, steps, sigmas[step])
        if not guidance.acts(moment):
            return {}, 0.0, every
        weights = guidance.weights(moment, cfg)
        return weights, guidance.phi(moment), frozenset(weights)

    phases = []
    for (_, weighed), same in itertools.groupby(range(steps), key=lambda step: (bool(phase(step)[0]), phase(step)[2])):
        run = list(same)
        weights, rescale, _ = phase(run[0])
        varies = any(phase(step) != phase(run[0]) for step in run)
        needed = branches_of(weighed)
        counts = Counter(computed(needed, step) if weights else (needed, False) for step in run)
        kinds = tuple(
            (count, tuple(passing(plan_for(guidance, sources, branches, layout), skips) for sources in calls))
            for (branches, skips), count in counts.items()
        )
        phases.append(Phase(run[0], run[-1], weights, rescale, varies, kinds, tuple(sorted(needed))))
    return tuple(phases)


def _announced(
    fitted: Fitted, announced: Announced, guidance: Guidance, call: CallArguments, name: str
) -> tuple[Phase, ...]:
    """Where the pipeline asks for its weak branches, and combines, itself."""
    steps, seen, layout = fitted.adapter.steps_of_run(fitted.pipe, call), copy.copy(fitted.pipe), fitted.layouts[name]
    memory, blocks = memory_for(announced, guidance), KeptBlocks(guidance)
    models, noisier = _kept_apart(fitted.pipe, fitted.adapter, guidance, call, steps)
    passes, recalled, phases = [], [], []
    for step in range(steps):
        moment = Moment(step, steps)
        announced.preview(seen, call, moment)
        passes.append(announced.passes(seen, call, guidance, moment, name))
        if step in noisier:
            memory.forget()
            blocks.forget()
        kept = memory.recalled(passes[step].differing, step, models[step])
        recalled.append((kept, blocks.skips(passes[step].branches, step, models[step])))
    for _, same in itertools.groupby(range(steps), key=lambda step: passes[step]):
        run = list(same)
        one = passes[run[0]]
        kinds = tuple(
            (count, tuple(plan_of(one, asked, *kept, layout) for asked in one.turns if one.computed_in(asked, kept[0])))
            for kept, count in Counter(recalled[step] for step in run).items()
        )
        phases.append(Phase(run[0], run[-1], {}, 0.0, False, kinds, tuple(itertools.chain(*one.turns)), announced=True))
    return tuple(phases)


def _formula(phase: Phase) -> str:
    if phase.announced:
        return f"the pipeline asks for {', '.join(phase.branches)} and combines them itself"
    if not phase.weights:
        return "the pipeline's own"
    terms = " ".join(f"{weight:+g} {branch}" for branch, weight in phase.weights.items())
    rescaled = f", rescaled by {phase.rescale:g}" if phase.rescale else ""
    return f"g = {terms}{rescaled}" + (f" at step {phase.first}, then by schedule" if phase.varies else "")


def _kept_apart(
    pipe: Any, adapter: Adapter, guidance: Guidance, call: CallArguments, steps: int
) -> tuple[Sequence[str], Collection[int]]:
    """The denoiser of every step, if there are two, and the steps before which all that is kept is forgotten."""
    two = guidance.reuses and adapter.second_below(pipe) is not None
    restarts = guidance.reuses and hasattr(getattr(pipe, "scheduler", None), "restarts")
    models = _ahead(pipe, adapter, call, steps, adapter.called) if two else [""] * steps
    return models, _ahead(pipe, adapter, call, steps, steps_back) if restarts else ()


def _ahead(pipe: Any, adapter: Adapter, call: CallArguments, steps: int, known: Callable[[Any, int], Any]) -> Any:
    """What is known of a pipeline whose scheduler has the timesteps that it will have."""
    ahead = copy.copy(pipe)
    vars(ahead)["scheduler"] = scheduled(pipe, adapter.schedule(pipe, call))
    return known(ahead, steps)


def _rows(plans: Sequence[Plan]) -> tuple[int, ...]:
    return tuple(sum(rows) for rows in zip(*(plan.computed for plan in plans), strict=True))


def _reused(guidance: Guidance, branches: Collection[str]) -> list[str]:
    """What is carried on from step to step, and how much is kept for it."""
    weak, values = len({*branches} - {COND, UNCOND}), (guidance.reuse_order or 0) + 1
    reused = {
        "base - perturbed": (guidance.reuse, f"{weak * values} of every prompt's predictions" if weak else ""),
        "cond - uncond": (guidance.reuse_cfg, f"{values} of every prompt's predictions"),
        "what the blocks add": (guidance.reuse_blocks, f"{len(branches) * values} of every prompt's hidden states"),
    }
    how = ("held", "carried on by a line", "carried on by a parabola")[guidance.reuse_order or 0]
    return [
        f"approximately: {what} computed in {when(spacing)}, {how} in the others; kept for it: {kept}"
        for what, (spacing, kept) in reused.items()
        if spacing != EVERY and kept
    ]


def _blocks(rows: Sequence[int]) -> list[str]:
    lines, first = [], 0
    for count, same in itertools.groupby(rows):
        last = first + len(list(same)) - 1
        where = f"blocks {first} to {last}" if last > first else f"block {first}"
        lines.append(f"{where}: {count} row{'s' if count != 1 else ''}")
        first = last + 1
    return lines


def _kind(part: Perturbation) -> str:
    if part.sigma is None:
        return part.kind
    return f"{part.kind} of {'infinite sigma' if math.isinf(part.sigma) else f'sigma {part.sigma:g}'}"


def _plural(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
