"""How the cost of a guided step grows: with tokens, prompts and perturbed branches, and with the first perturbed
layer.

All points of one question take turns, after each result was found equal to that of separate passes. A curve is fitted
to the times: a + b n + c n^2 in tokens, lines otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from stgfast.bench.measure import agreeing, fitted, result, rounds_of, significant
from stgfast.bench.models import DTYPES, MODELS
from stgfast.bench.steps import ALLOWED
from stgfast.bench.variants import Bench
from stgfast.errors import wrong
from stgfast.guidance import Guidance
from stgfast.perturbation import Perturbation

TIMES = (1, 2, 3, 4, 6, 8)  # factors of tokens, and numbers of prompts
BRANCHES = (1, 2, 3, 4, 5)
PLACES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the skipped layer, from the first to the last
# The degree of the curve, by what changes.
AXES = {"tokens": 2, "prompts": 1, "branches": 1, "layer": 1}


def points(bench: Bench, axis: str) -> dict[int, Bench]:
    """The points of a question, by the value that changes."""
    last = bench.layout.layers - 1
    if axis == "tokens":
        height, width, frames = bench.frames
        latent = (frames - 1) // bench.model.frames + 1
        clips = {n: (height, width, (latent * n - 1) * bench.model.frames + 1) for n in TIMES}
        return {n: bench.at(clip=clip) for n, clip in clips.items()}
    if axis == "prompts":
        return {n: bench.at(prompts=n) for n in TIMES}
    if axis == "branches":  # they fork one after another, in the second half
        parts = [Perturbation([last // 2 + n * (last - last // 2) // max(BRANCHES)]) for n in BRANCHES]
        return {n: bench.at(guidance=Guidance(parts[:n])) for n in BRANCHES}
    layers = [round(place * last) for place in PLACES]
    return {layer: bench.at(guidance=Guidance(Perturbation([layer]))) for layer in layers}


def grown(
    name: str,
    *,
    size: str = "tiny",
    device: str = "cpu",
    steps: int | None = 3,
    rounds: int = 5,
    axes: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """One row for each question, and one for time by block-rows in those where nothing else changes."""
    bench = Bench(MODELS[name], size, device, steps)
    if bench.guidance is None:
        raise wrong("a model whose cost grows", name, "one that does not guide itself")
    about = {"model": name, "size": size, "steps": bench.arguments()["num_inference_steps"], "rounds": rounds}
    by_rows: list[dict[str, Any]] = []
    for axis in axes or AXES:
        measured = [{axis: value, **point} for value, point in _timed(points(bench, axis), axis, size, rounds)]
        yield _row(about, axis, axis, measured, AXES[axis], device)
        by_rows += measured if axis in ("branches", "layer") else []
    if by_rows:
        by_rows.sort(key=lambda point: int(point["block_rows"]))
        yield _row(about, "block-rows", "block_rows", by_rows, 1, device)


def _row(
    about: Mapping[str, Any], axis: str, by: str, measured: Sequence[Mapping[str, Any]], degree: int, device: str
) -> dict[str, Any]:
    x = [point[by] for point in measured]
    fits = {
        what: fitted(x, [point[what] for point in measured], degree)._asdict() for what in ("seconds", "arithmetic")
    }
    return result("growth", device, **about, axis=axis, by=by, points=measured, fit=fits)


def _timed(benches: Mapping[int, Bench], axis: str, size: str, rounds: int) -> Iterator[tuple[int, dict[str, Any]]]:
    distances = {}
    for value, bench in benches.items():
        both = {"stgfast": bench.stgfast(), "passes": bench.passes()}  # also the warm-up
        distances[value] = agreeing(f"{axis} {value}", both, "passes", ALLOWED[DTYPES[size]])["stgfast"]
    taken = rounds_of({value: partial(bench.timed, "stgfast") for value, bench in benches.items()}, rounds)
    for value, bench in benches.items():
        times = [each.step for each in taken[value]]
        yield (
            value,
            {
                "seconds": significant(statistics.median(times)),
                "spread": [significant(min(times)), significant(max(times))],
                "block_rows": sum(bench.block_rows("stgfast")) * bench.prompts,
                "arithmetic": bench.arithmetic("stgfast").total,
                "clip": bench.frames,
                "distance": distances[value],
            },
        )
