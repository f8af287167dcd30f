"""One prompt, guided at several layers and scales: what to look at before choosing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stgfast.guidance import RESIDUAL, Guidance, Perturbation
from stgfast.render.jobs import Job


def sweep(
    prompt: str,
    layers: Sequence[Sequence[int]],
    scales: Sequence[float],
    *,
    kind: str = RESIDUAL,
    seeds: Sequence[int] = (0,),
    **fields: Any,
) -> Iterator[Job]:
    """For every seed a job with CFG alone, and one for each of these lists of layers at each of these scales.

    `fields` are further ones of a `Job`, for all of them. The page about the output folder shows them as a grid.
    """
    for seed in seeds:
        yield Job(prompt=prompt, seed=seed, guidance=Guidance(), name=f"seed-{seed}-cfg-alone", **fields)
        for chosen in layers:
            for scale in scales:
                guidance = Guidance(Perturbation(chosen, kind=kind, scale=scale))
                numbers = "-".join(map(str, guidance.perturbations[0].layers))
                name = f"seed-{seed}-{kind}-{numbers}-scale-{scale:g}"
                yield Job(prompt=prompt, seed=seed, guidance=guidance, name=name, **fields)
