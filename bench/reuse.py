"""What does `reuse` cost in likeness, and what does it save? On the model in the package, at several intervals.

For every setting a row: how far the final latents are from the exact ones, over clips (median, and the 95th percentile;
relative norms), the same beside how far CFG alone is from them, which is all that guidance does, and the block-rows
that are not computed. An early layer is weakened, since of what is shared there is nothing to leave out.

    python bench/reuse.py --save bench/results/reuse.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stgfast
from stgfast import Guidance, toy
from stgfast.bench.measure import result, saved, significant
from stgfast.demo import counted
from stgfast.evaluate.study import EARLY
from stgfast.toy import videos

SEED = 303  # of prompts and of noise
STEPS = 24
TOGETHER = 16
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"reuse": every} for every in (2, 3, 4, 6, 12)),
    *({"reuse_cfg": every} for every in (2, 3, 4)),
    {"reuse": 2, "reuse_cfg": 2},
)


def latents(pipe: Any, count: int, **call: Any) -> Tensor:
    made = []
    for first in range(0, count, TOGETHER):
        numbers = range(first, min(first + TOGETHER, count))
        prompts = [str(videos.plan(SEED, number).scene) for number in numbers]
        generator = [torch.Generator().manual_seed(SEED + number) for number in numbers]
        own = {**toy.CALL, "num_inference_steps": STEPS, "output_type": "latent", **call}
        made.append(pipe(prompts, generator=generator, **own).frames)
    return torch.cat(made).double()


def far(clips: Tensor, exact: Tensor) -> Tensor:
    """Of every clip by itself."""
    return (clips - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def rows(count: int, guidance: Guidance) -> Iterator[dict[str, Any]]:
    pipe = stgfast.accelerate(toy.pipeline(), guidance)
    call = {**toy.CALL, "num_inference_steps": STEPS}
    exact, all_of_them = latents(pipe, count), stgfast.explain(pipe, **call).block_rows
    alone = far(latents(pipe, count, stg_scale=0.0), exact)
    for settings in SETTINGS:
        approximate = replace(guidance, **settings)
        with counted(list(pipe.transformer.transformer_blocks)) as computed:
            clips = latents(pipe, count, stg=approximate)
        block_rows = sum(computed)
        distance = far(clips, exact)
        figures = {
            "model": "toy",
            "guidance": str(approximate),
            **settings,
            "clips": count,
            "steps": STEPS,
            "distance": significant(float(distance.median())),
            "distance, 95%": significant(float(distance.quantile(0.95))),
            "distance / what guidance does": significant(float((distance / alone).median())),
            "block-rows": round(block_rows / count, 1),
            "block-rows saved": significant(1 - block_rows / count / all_of_them),
        }
        yield result("reuse", "cpu", **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    for row in rows(options.clips, EARLY):
        print(saved(row, options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
