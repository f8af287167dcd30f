"""One result for every model: its variants, found to agree and then timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stgfast.bench.measure import (
    Rates,
    agreeing,
    medians,
    peak_memory,
    rates,
    result,
    rounds_of,
    significant,
)
from stgfast.bench.models import DTYPES, MODELS
from stgfast.bench.variants import OTHER_RESULT, Bench

# By how much variants may differ, relatively; those of bfloat16 are told apart by rounding.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
UNIQUE = ("stgfast", "split", "compiled", "graphs", "fastest")  # these compute every row once
COUNTED = ("stock", "paper", "stgfast")
WITHIN = 0.05  # of what the blocks predict, where that is checked
PATIENCE = 3  # times the rounds, at most, until it is: what a CPU has beside it can make some percents of a time


def measured(
    name: str,
    *,
    size: str = "small",
    device: str = "cpu",
    steps: int | None = 3,
    rounds: int = 5,
    variants: Sequence[str] = ("stock", "paper", "stgfast", "reuse"),
    timed: Sequence[str] | None = None,
    backend: str = "inductor",
    reference: Path | None = None,
    checked: bool = False,
) -> dict[str, Any]:
    """One row of results, of all `variants` or of those that are `timed`; raises where variants disagree.

    Its figures are of one step, the mean of all but the first; for no `steps` they are of a whole clip, which has as
    many as the pipeline's default says. Where the time of the paper's scheme is `checked`, rounds go on while it is off
    what the blocks predict.
    """
    torch.compiler.reset()
    bench = Bench(MODELS[name], size, device, steps, backend=backend, reference=reference)
    variants = [each for each in bench.variants() if each in {*variants, "stgfast"}]
    timed = [each for each in variants if timed is None or each in {*timed, "stgfast"}]
    calls: dict[str, Callable[[], Tensor]] = {each: partial(bench.make, each) for each in variants}
    made = {each: peak_memory(call, device) for each, call in calls.items()}  # and the warm-up
    far = agreeing(
        name, {each: clip for each, (clip, _) in made.items()}, "stgfast", ALLOWED[DTYPES[size]], OTHER_RESULT
    )
    memory = {each: most for each, (_, most) in made.items() if most}
    del made
    whole, count = steps is None, bench.arguments()["num_inference_steps"]
    part, of = ("clip", count) if whole else ("step", 1)  # that the figures are about, and its steps
    rows = {each: bench.block_rows(each) for each in variants}
    costs, tokens = bench.costs()
    predicted = predictions(rows, costs)
    taken: dict[str, list[float]] = {each: [] for each in timed}
    over: dict[str, float] = {}
    for _ in range(PATIENCE):
        for each, seconds_taken in rounds_of({each: partial(bench.timed, each) for each in timed}, rounds).items():
            taken[each] += [getattr(seconds, part) for seconds in seconds_taken]
        over = {each: _ratio(taken[each], taken["stgfast"]) for each in timed}
        if not checked or abs(off_prediction(over, predicted)) <= WITHIN:
            break
    seconds = medians(taken)
    counts = {each: bench.arithmetic(each) for each in timed if each in COUNTED}
    can, unique = rates(device, DTYPES[size]), counts["stgfast"].total * of
    total = sum(rows["stgfast"])
    return result(
        "steps",
        device,
        model=name,
        pipeline=bench.model.pipeline,
        configuration=bench.model.source if size not in bench.model.narrow else f"narrow, {bench.model.source}",
        parameters=sum(parameter.numel() for parameter in bench.denoiser.parameters()),
        size=size,
        dtype=str(DTYPES[size]).removeprefix("torch."),
        clip=bench.frames,
        tokens=tokens,
        steps=count,
        whole=whole,
        guidance=bench.guidance.to_dict() if bench.guidance is not None else bench.model.given(bench.model.layer(size)),
        cfg=bench.model.cfg,
        rounds=len(taken["stgfast"]),
        distance=far,
        seconds={each: significant(value) for each, value in seconds.items()},
        spread={each: [significant(min(values)), significant(max(values))] for each, values in taken.items()},
        over=over,
        block_rows={each: significant(sum(counted) * of) for each, counted in rows.items()},
        rows_over={each: significant(sum(counted) / total) for each, counted in rows.items()},
        predicted=predicted,
        arithmetic={each: counted.total * of for each, counted in counts.items()},
        attention=significant(counts["stgfast"].attention / counts["stgfast"].total),
        matrix_rate=significant(can.matrix),
        copy_rate=significant(can.copy),
        matrix_share={each: significant(unique / seconds[each] / can.matrix) for each in timed if each in UNIQUE},
        limit=limits(bench, unique, of, can),
        **({"peak_memory": memory} if memory else {}),
        **({"attention_backend": bench.attention} if "fastest" in timed else {}),
    )


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of what neighbours in time say."""
    return significant(statistics.median(a / b for a, b in zip(one, other, strict=True)))


def predictions(rows: dict[str, list[float]], costs: Sequence[int]) -> dict[str, float]:
    """Over stgfast, what block-rows say where one of a block counts as much as the block computes.

    The blocks of most models compute the same; those of a UNet do not.
    """
    weighed = {each: sum(a * b for a, b in zip(counted, costs, strict=True)) for each, counted in rows.items()}
    return {each: significant(value / weighed["stgfast"]) for each, value in weighed.items()}


def limits(bench: Bench, unique: int, steps: int, can: Rates) -> dict[str, float]:
    """Seconds that the device needs at least: for the arithmetic, and to read the weights in every pass."""
    weights = steps * bench.passes_of_a_step() * sum(parameter.nbytes for parameter in bench.denoiser.parameters())
    return {"arithmetic": significant(unique / can.matrix), "weights": significant(weights / can.copy)}


def off_prediction(over: Mapping[str, float], predicted: Mapping[str, float]) -> float:
    """How far the time of the paper's scheme is from what the blocks predict for it, relatively."""
    return over["paper"] / predicted["paper"] - 1
