"""What our own Python takes: for every call of a block, for a step, and for a call of the pipeline.

The model's blocks hand on what they are given and do nothing else, so that an accelerated clip takes longer than the
stock one by our own work, and by what the model does for the weak branch outside of its blocks: it is no less than our
own. Clips of few steps and of many tell a step's from a call's.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from stgfast.batching.layout import Unit
from stgfast.bench.measure import in_turns, medians, result, seconds, significant
from stgfast.bench.models import MODELS
from stgfast.bench.variants import Bench

STEPS = (2, 12)


def overhead(name: str, *, size: str = "small", device: str = "cpu", rounds: int = 9) -> dict[str, Any]:
    bench = Bench(MODELS[name], size, device, STEPS[0])
    bench.stgfast()
    real = statistics.median(seconds(bench.stgfast, device) for _ in range(3)) / STEPS[0]
    ours: list[float] = []
    with _nothing_in_blocks(bench):
        for bench.steps in STEPS:
            calls: dict[str, Callable[[], Any]] = {each: partial(bench.make, each) for each in ("stock", "stgfast")}
            in_turns(calls, 1, device)
            taken = medians(in_turns(calls, rounds, device))
            ours.append(taken["stgfast"] - taken["stock"])
    few, many = STEPS
    step = (ours[1] - ours[0]) / (many - few)
    return result(
        "overhead",
        device,
        model=name,
        size=size,
        rounds=rounds,
        microseconds={
            "of a block's call": significant(1e6 * step / bench.layout.depth, 3),
            "of a step": significant(1e6 * step, 3),
            "of a call of the pipeline": significant(1e6 * (ours[0] - few * step), 3),
        },
        step_seconds=significant(real),
        share_of_a_step=significant(step / real, 3),
    )


@contextmanager
def _nothing_in_blocks(bench: Bench) -> Iterator[None]:
    with ExitStack() as stack:
        for unit in bench.layout.units:
            stack.enter_context(mock.patch.object(unit.module, "forward", _handing_on(bench, unit)))
        yield


def _handing_on(bench: Bench, unit: Unit) -> Callable[..., Any]:
    signature, state = inspect.signature(unit.module.forward), unit.state or bench.layout.state

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        outputs = tuple(given.get(name) for name in state)
        return outputs if unit.wrapped or len(outputs) > 1 else outputs[0]

    return hand_on
