"""The cost of our own Python code: per block, per step, and per call of the pipeline.

The model's blocks return their inputs, so an accelerated clip takes longer than the stock one by our own work, and by
what the model does outside its blocks for the perturbed branch. The measured value is an upper limit for our own part.
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
from stgfast.bench.measure import result, rounds_of, significant
from stgfast.bench.models import MODELS
from stgfast.bench.variants import Bench

STEPS = 9


def overhead(name: str, *, size: str = "small", device: str = "cpu", rounds: int = 9) -> dict[str, Any]:
    bench = Bench(MODELS[name], size, device)
    bench.stgfast()
    real = statistics.median(bench.timed("stgfast").step for _ in range(3))
    bench.steps = STEPS
    with _nothing_in_blocks(bench):
        calls = {each: partial(bench.timed, each) for each in ("stock", "stgfast")}
        rounds_of(calls, 1)
        taken = rounds_of(calls, rounds)

    def more(of: str) -> float:
        medians = {each: statistics.median(getattr(one, of) for one in times) for each, times in taken.items()}
        return float(medians["stgfast"] - medians["stock"])

    step = more("step")
    return result(
        "overhead",
        device,
        model=name,
        size=size,
        rounds=rounds,
        microseconds={
            "of a block's call": significant(1e6 * step / bench.layout.depth, 3),
            "of a step": significant(1e6 * step, 3),
            "of a call of the pipeline": significant(1e6 * (more("clip") - STEPS * step), 3),
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
    signature, state = inspect.signature(unit.module.forward), unit.state or bench.layout.blocks.state

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        outputs = tuple(given.get(name) for name in state)
        return outputs if unit.wrapped or len(outputs) > 1 else outputs[0]

    return hand_on
