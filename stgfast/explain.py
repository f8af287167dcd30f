"""Say what a call would compute, before it runs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from stgfast.announced import memory_for, plan_of
from stgfast.batching.execution import AUTO
from stgfast.batching.fastest import quickened
from stgfast.batching.layout import Layout
from stgfast.batching.plan import passing
from stgfast.batching.ways import ways
from stgfast.call import settings_of
from stgfast.combining import branches_of, plan_for
from stgfast.errors import wrong
from stgfast.explained import Explanation, Phase
from stgfast.forecast import KeptBlocks
from stgfast.guidance import Guidance
from stgfast.installed import bound_call, installed_on, settled
from stgfast.integrations.spec import Adapter, Announced, Fitted
from stgfast.integrations.steps import CallArguments, scheduled, steps_back
from stgfast.reuse import KeptDifferences
from stgfast.schedules import Moment

QUICK = "attending rows with the fastest attention for their shape, with key counts instead of masks"


def explain(pipe: Any, *, ranks: int | None = None, **arguments: Any) -> Explanation:
    """Say what a call would compute, without running it.

    Args:
        pipe: an accelerated pipeline.
        ranks: the number of processes over which branches are divided. Default: as given to `accelerate`.
        **arguments: the arguments of the call. Those left out have the pipeline's defaults.

    Returns:
        An explanation to print. It has the weights and branches of each step, the rows that each block computes,
        block-rows in total with and without sharing, and the rows held in memory.

    Example:
        >>> explanation = stgfast.explain(stgfast.accelerate(pipe), num_inference_steps=30)
        >>> print(explanation)
        LTXPipeline: 6 blocks, stacked, CFG scale 3
        perturbed0: cond with residual at layer 1, scale 1, base cond
        steps 0 to 29 of 30: g = -2 uncond +4 cond -1 perturbed0
          blocks 0 to 1: 2 rows
          blocks 2 to 5: 3 rows
        block-rows per prompt: 480; 540 without sharing (11.1% saved); 360 without stgfast
        memory, in rows per prompt: 2 in a block at once, 3 kept between blocks; 2 in the pipeline's own calls
    """
    installed = installed_on(pipe)
    if ranks is None:
        ranks = installed.execution.ranks.size if installed.execution.ranks is not None else 1
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise wrong("ranks", ranks, "a number of processes, 1 or more")
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
    notice = adapter.notice(call) or ("the steps of one part of a longer clip" if adapter.windowed else "")
    explained = Explanation(*about, installed.recipe, installed.execution.max_rows, phases, notice)
    quick = quickened(layout) if installed.execution.attention == AUTO else frozenset()
    attention = _attention(pipe, layout, explained, quick)
    return replace(explained, attention=attention, ranks=ranks, full=layout.blocks.full)


def _attention(pipe: Any, layout: Layout, explained: Explanation, quick: frozenset[Any]) -> dict[str, list[int]]:
    """Which blocks' attention goes which way, for attention with identity rows or with a faster kernel."""
    device = getattr(pipe, "_execution_device", None) or next(layout.denoiser.parameters()).device
    kind = str(device).split(":")[0]
    found: dict[str, list[int]] = {}
    for plan in explained.plans:
        for block, way, unfit in ways(layout, plan, explained.rows_at_once, kind):
            blocks = found.setdefault(f"{way.value}, as {unfit}" if unfit else way.value, [])
            if block not in blocks:
                blocks.append(block)
    if quick:
        every = enumerate(layout.units)
        found[QUICK] = [number for number, unit in every if not quick.isdisjoint(unit.module.modules())]
    return {way: sorted(blocks) for way, blocks in found.items()}


def _weighed(pipe: Any, adapter: Adapter, guidance: Guidance, call: CallArguments, layout: Layout) -> tuple[Phase, ...]:
    """The phases, if the engine combines."""
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
    """The phases, if the pipeline asks for perturbed branches and combines them itself."""
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


def _kept_apart(
    pipe: Any, adapter: Adapter, guidance: Guidance, call: CallArguments, steps: int
) -> tuple[Sequence[str], Collection[int]]:
    """The denoiser of each step, if there are two, and the steps before which stored values are dropped."""
    two = guidance.reuses and adapter.second_below(pipe) is not None
    restarts = guidance.reuses and hasattr(getattr(pipe, "scheduler", None), "restarts")
    models = _ahead(pipe, adapter, call, steps, adapter.called) if two else [""] * steps
    return models, _ahead(pipe, adapter, call, steps, steps_back) if restarts else ()


def _ahead(pipe: Any, adapter: Adapter, call: CallArguments, steps: int, known: Callable[[Any, int], Any]) -> Any:
    """A copy of the pipeline whose scheduler has the timesteps that it will have."""
    ahead = copy.copy(pipe)
    vars(ahead)["scheduler"] = scheduled(pipe, adapter.schedule(pipe, call))
    return known(ahead, steps)
