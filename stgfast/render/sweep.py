"""Prompts at several layers and scales, to look at and measure before choosing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stgfast.guidance import Guidance
from stgfast.kinds import RESIDUAL
from stgfast.perturbation import Perturbation
from stgfast.queue.job import Job


def sweep(
    prompts: str | Sequence[str],
    layers: Sequence[Sequence[int]],
    scales: Sequence[float],
    *,
    kind: str = RESIDUAL,
    seeds: Sequence[int] = (0,),
    cfg: Sequence[float] = (),
    **fields: Any,
) -> Iterator[Job]:
    """For each prompt, seed and CFG scale, one job with CFG alone, and one for each list of layers and scale.

    `cfg` defaults to the pipeline's own scale. `fields` are further fields of all jobs. The page about the output
    folder shows them as a grid.
    """
    many = [prompts] if isinstance(prompts, str) else list(prompts)
    guided = [Guidance(Perturbation(chosen, kind=kind, scale=scale)) for chosen in layers for scale in scales]
    for number, prompt in enumerate(many, 1):
        for seed in seeds:
            for strength in cfg or (None,):
                words = [f"prompt-{number}"] if len(many) > 1 else []
                words += [f"seed-{seed}"] + ([] if strength is None else [f"cfg-{strength:g}"])
                own = dict(fields)
                if strength is not None:
                    own["pipeline"] = {**fields.get("pipeline", {}), "guidance_scale": strength}
                for guidance in (Guidance(), *guided):
                    name = "-".join([*words, *_named(guidance)])
                    yield Job(prompt=prompt, seed=seed, guidance=guidance, name=name, **own)


def _named(guidance: Guidance) -> list[str]:
    if not guidance.perturbations:
        return ["cfg-alone"]
    (part,) = guidance.perturbations
    return [part.kind, *map(str, part.layers), f"scale-{part.scale:g}"]
