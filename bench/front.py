"""What is a clip's error, and what does it cost? Solvers, steps and `reuse`, on the model in the package.

Every way of making a clip is held against a converged run, of 128 UniPC steps with every branch computed: by that scale
an approximation is worth what it saves only where fewer steps, or a better solver, are further off at the same cost.
Prompts and noise took no part in choosing anything. Costs are block-rows, counted on the real blocks.

    python bench/front.py --save bench/results/front.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stgfast
from stgfast import Guidance, toy
from stgfast.bench.measure import result, saved, significant
from stgfast.demo import counted
from stgfast.evaluate.study import EARLY
from stgfast.solvers import own_solver
from stgfast.toy import videos

SEED = 303  # of prompts and of noise
TOGETHER = 16
CONVERGED = 128  # UniPC steps
SOLVERS = {"Euler": "", "UniPC": "unipc"}  # of `stgfast.solver`; nothing: the pipeline's own


class Way(NamedTuple):
    """One way to make a clip."""

    solver: str
    steps: int
    reuse: int = 1  # every how many steps the weak branch is computed, and cond - uncond
    order: int | None = None

    def __str__(self) -> str:
        how = f", reuse {self.reuse} by order {self.order}" if self.reuse > 1 else ""
        return f"{self.solver}, {self.steps} steps{how}"

    def guidance(self, exact: Guidance) -> Guidance:
        return replace(exact, reuse=self.reuse, reuse_cfg=self.reuse, reuse_order=self.order)


BASE = Way("Euler", 48)
WAYS = (
    *(Way("Euler", steps) for steps in (12, 24, 36, 48, 96)),
    *(Way("UniPC", steps) for steps in (12, 16, 20, 24, 30, 36)),
    *(Way("Euler", 48, 2, order) for order in (0, 1, 2)),
    *(Way("UniPC", steps, 2, order) for steps in (20, 24, 30) for order in (0, 1, 2)),
    *(Way("UniPC", 30, 3, order) for order in (1, 2)),
)


def latents(pipe: Any, way: Way, exact: Guidance, clips: int) -> Tensor:
    made = []
    if SOLVERS[way.solver]:
        stgfast.solver(pipe, SOLVERS[way.solver])
    else:
        own_solver(pipe)
    for first in range(0, clips, TOGETHER):
        numbers = range(first, min(first + TOGETHER, clips))
        prompts = [str(videos.plan(SEED, number).scene) for number in numbers]
        generator = [torch.Generator().manual_seed(SEED + number) for number in numbers]
        own = {**toy.CALL, "num_inference_steps": way.steps, "output_type": "latent"}
        made.append(pipe(prompts, generator=generator, stg=way.guidance(exact), **own).frames)
    return torch.cat(made).double()


def distances(clips: Tensor, from_these: Tensor) -> Tensor:
    """Of every clip by itself."""
    return (clips - from_these).flatten(1).norm(dim=1) / from_these.flatten(1).norm(dim=1)


def rows(clips: int, exact: Guidance) -> Iterator[dict[str, Any]]:
    pipe = stgfast.accelerate(toy.pipeline(), exact)
    pipe.set_progress_bar_config(disable=True)
    blocks = list(pipe.transformer.transformer_blocks)
    converged = latents(pipe, Way("UniPC", CONVERGED), exact, clips)
    costs: dict[Way, float] = {}
    for way in sorted(WAYS, key=lambda way: way != BASE):
        with counted(blocks) as computed:
            made = latents(pipe, way, exact, clips)
        costs[way] = sum(computed) / clips
        off = distances(made, converged)
        figures = {
            **{"model": "toy", "guidance": str(exact), "way": str(way), **way._asdict(), "clips": clips},
            "distance": significant(float(off.median())),
            "distance, 95%": significant(float(off.quantile(0.95))),
            "block-rows": round(costs[way], 1),
            "cost": significant(costs[way] / costs[BASE]),
        }
        yield result("front", "cpu", **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    for row in rows(options.clips, EARLY):
        saved(row, options.save)
        print(
            f"{row['way']:44} cost {row['cost']:<6} distance {row['distance']:<8} 95%: {row['distance, 95%']}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
