"""One result for each model: its variants agree, and are then timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
from stgfast.bench.variants import FEWEST, OTHER_RESULT, Bench

# The allowed relative difference of variants; in bfloat16 rounding makes them differ.
# The allowed distance of results by dtype: rounding is about 1e-6 in float32, a wrong row 1e-2 or more.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
UNIQUE = ("stgfast", "split", "auto", "compiled", "graphs", "fastest")  # these compute each row once
COUNTED = ("stock", "paper", "stgfast")
COMPARED = ("paper", "stgfast")
WITHIN = 0.05  # relative difference from the prediction in a check
PATIENCE = 4  # the largest factor of rounds in a check


def measured(
    name: str,
    *,
    size: str = "small",
    device: str = "cpu",
    steps: int | None = 3,
    rounds: int = 5,
    variants: Sequence[str] = ("stock", "paper", "stgfast", "reuse"),
    backend: str = "inductor",
    reference: Path | None = None,
) -> dict[str, Any]:
    """One row of results; raises if variants disagree.

    Its figures are for one step, the mean of all but the first. Without `steps` they are for a whole clip with the
    pipeline's default number.
    """
    bench = Bench(MODELS[name], size, device, steps, backend=backend, reference=reference)
    distances, memory = agreed(bench, name, variants)
    whole, count = steps is None, bench.arguments()["num_inference_steps"]
    part, of = ("clip", count) if whole else ("step", 1)  # what the figures describe, and its steps
    rows = {each: bench.block_rows(each) for each in distances}
    costs, tokens = bench.costs()
    turns = rounds_of({each: partial(bench.timed, each) for each in distances}, rounds)
    taken = {each: [getattr(seconds, part) for seconds in turns[each]] for each in distances}
    seconds = medians(taken)
    counts = {each: bench.arithmetic(each) for each in distances if each in COUNTED}
    can, unique = rates(device, DTYPES[size]), counts["stgfast"].total * of
    total = sum(rows["stgfast"])
    return result(
        "steps",
        device,
        **about(bench, name),
        tokens=tokens,
        steps=count,
        whole=whole,
        rounds=rounds,
        distance=distances,
        seconds={each: significant(value) for each, value in seconds.items()},
        spread={each: [significant(min(values)), significant(max(values))] for each, values in taken.items()},
        over={each: _ratio(values, taken["stgfast"]) for each, values in taken.items()},
        block_rows={each: significant(sum(counted) * of) for each, counted in rows.items()},
        rows_over={each: significant(sum(counted) / total) for each, counted in rows.items()},
        predicted=predictions(rows, costs),
        arithmetic={each: counted.total * of for each, counted in counts.items()},
        attention=significant(counts["stgfast"].attention / counts["stgfast"].total),
        matrix_rate=significant(can.matrix),
        copy_rate=significant(can.copy),
        matrix_share={each: significant(unique / seconds[each] / can.matrix) for each in distances if each in UNIQUE},
        limit=limits(bench, unique, of, can),
        **({"peak_memory": memory} if memory else {}),
        **({"attention_backend": bench.attention} if "fastest" in distances else {}),
    )


def checked(
    name: str, *, size: str, device: str, steps: int | None, rounds: int, variants: Sequence[str]
) -> dict[str, Any]:
    """One row on whether the paper's scheme over stgfast takes as long as the blocks predict; raises if variants
    disagree. While it does not, more rounds follow: noise falls with more rounds.
    """
    # Uncompiled code has the same result, and needs no time for compiling.
    bench = Bench(MODELS[name], size, device, steps, backend="eager")
    distances, _ = agreed(bench.at(steps=FEWEST), name, variants)
    rows, (costs, tokens) = {each: bench.block_rows(each) for each in COMPARED}, bench.costs()
    predicted = predictions(rows, costs)
    taken: dict[str, list[list[float]]] = {each: [] for each in COMPARED}
    seconds, over, turns = dict[str, float](), dict[str, float](), 0
    while turns < PATIENCE * rounds:
        for each, parts in rounds_of({each: partial(bench.parts, each) for each in COMPARED}, rounds).items():
            taken[each] += [step for clip in parts for step in clip]
        turns += rounds
        seconds = {each: significant(undisturbed(parts)) for each, parts in taken.items()}
        over = {each: significant(value / seconds["stgfast"]) for each, value in seconds.items()}
        if as_predicted(over, predicted):
            break
    return result(
        "check",
        device,
        **about(bench, name),
        tokens=tokens,
        steps=steps,
        rounds=turns,
        distance=distances,
        seconds=seconds,
        over=over,
        predicted=predicted,
        right=as_predicted(over, predicted),
    )


def agreed(bench: Bench, name: str, variants: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """The distances of this model's variants and their memory on a GPU. Also warms them up."""
    torch.compiler.reset()
    there = [each for each in bench.variants() if each in {*variants, "stgfast"}]
    made = {each: peak_memory(partial(bench.make, each), bench.device) for each in there}
    clips = {each: clip for each, (clip, _) in made.items()}
    distances = agreeing(name, clips, "stgfast", ALLOWED[DTYPES[bench.size]], OTHER_RESULT)
    return distances, {each: most for each, (_, most) in made.items() if most}


def about(bench: Bench, name: str) -> dict[str, Any]:
    """The description of what is measured."""
    model, size = bench.model, bench.size
    return {
        "model": name,
        "pipeline": model.pipeline,
        "configuration": model.source if size not in model.narrow else f"narrow, {model.source}",
        "parameters": sum(parameter.numel() for parameter in bench.denoiser.parameters()),
        "size": size,
        "dtype": str(DTYPES[size]).removeprefix("torch."),
        "clip": bench.frames,
        "guidance": bench.guidance.to_dict() if bench.guidance is not None else model.given(model.layer(size)),
        "cfg": model.cfg,
    }


def undisturbed(steps: Sequence[Sequence[float]]) -> float:
    """The time of a step in which each part is as fast as it ever was.

    Other processes slow down parts of each step, but rarely the same parts in all of them.
    """
    fastest: list[float] = [min(parts) for parts in zip(*steps, strict=True)]
    return sum(fastest)


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median ratio of measurements that are neighbors in time."""
    return significant(statistics.median(a / b for a, b in zip(one, other, strict=True)))


def predictions(rows: dict[str, list[float]], costs: Sequence[int]) -> dict[str, float]:
    """The predicted times over stgfast, from block-rows weighted by what each block computes.

    The blocks of most models compute the same; those of a UNet do not.
    """
    weighed = {each: sum(a * b for a, b in zip(counted, costs, strict=True)) for each, counted in rows.items()}
    return {each: significant(value / weighed["stgfast"]) for each, value in weighed.items()}


def limits(bench: Bench, unique: int, steps: int, can: Rates) -> dict[str, float]:
    """The seconds that the device needs at least, for the arithmetic, and for reading the weights in each pass."""
    weights = steps * bench.passes_of_a_step() * sum(parameter.nbytes for parameter in bench.denoiser.parameters())
    return {"arithmetic": significant(unique / can.matrix), "weights": significant(weights / can.copy)}


def as_predicted(over: Mapping[str, float], predicted: Mapping[str, float]) -> bool:
    """Whether the time of the paper's scheme is what the blocks predict."""
    return abs(over["paper"] / predicted["paper"] - 1) <= WITHIN
