"""Many jobs on one device: `stgfast.render` compared with a plain loop of `pipe(prompt)` calls.

    python bench/render.py --jobs 24

Each line adds one cause to the line before. Its clips are checked against those of the loop first:

    loop      one call after another, STG as in the authors' code: each row through each block
    sharing   the same loop, accelerated
    text      `render`, one clip at a time, one stage after another: each distinct prompt is encoded once
    overlap   decoding and writing while the next clip denoises
    batching  clips that fit together in one call

The model is the one in the package, small enough for a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import stgfast
from stgfast import toy
from stgfast.bench.measure import result, saved
from stgfast.render import worker
from stgfast.render.files import Form, read_frames, write
from stgfast.render.run import render

CFG = toy.CALL["guidance_scale"]
(PERTURBED,) = toy.GUIDANCE.perturbations
(LAYER,) = PERTURBED.layers


def jobs_of(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": toy.PROMPTS[n % len(toy.PROMPTS)],
            "seed": n,
            "name": f"clip-{n:03}",
            "width": (64, 96)[n % 2],
            "height": 64,
            "num_frames": toy.CALL["num_frames"],
            "steps": toy.CALL["num_inference_steps"],
            "pipeline": {"guidance_scale": CFG},
        }
        for n in range(count)
    ]


def loop(pipe: Any, jobs: list[dict[str, Any]], out: Path) -> None:
    """The loop that a user would write."""
    for job in jobs:
        clip = pipe(
            job["prompt"],
            width=job["width"],
            height=job["height"],
            num_frames=job["num_frames"],
            num_inference_steps=job["steps"],
            generator=torch.Generator().manual_seed(job["seed"]),
            output_type="np",
            **job["pipeline"],
        ).frames[0]
        write(out / job["name"], (clip * 255).round().astype(np.uint8), Form(kind="png"), {})


def as_the_paper(pipe: Any) -> Any:
    """Guidance without sharing: the perturbed branch is a pass through all blocks but one."""
    forward, block = pipe.transformer.forward, pipe.transformer.transformer_blocks[LAYER]

    def skipping(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def stacked(**kwargs: Any) -> Any:
        rows = len(kwargs["hidden_states"])
        uncond, cond = forward(**kwargs)[0].chunk(2)
        half = {k: v[rows // 2 :] if isinstance(v, torch.Tensor) and len(v) == rows else v for k, v in kwargs.items()}
        own, block.forward = block.forward, skipping
        try:
            perturbed = forward(**half)[0]
        finally:
            block.forward = own
        guided = uncond + CFG * (cond - uncond) + PERTURBED.scale * (cond - perturbed)
        return (torch.cat([guided, guided]),)

    pipe.transformer.forward = stacked
    return pipe


def guided() -> Any:
    return stgfast.accelerate(toy.pipeline(), toy.GUIDANCE)


def variants(max_batch: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any, list[dict[str, Any]], Path], Any]]]:
    def rendered(batch: int, *, in_turn: bool = False) -> Callable[[Any, list[dict[str, Any]], Path], Any]:
        def work(pipe: Any, jobs: list[dict[str, Any]], out: Path) -> None:
            # Where models move to and fro, one stage waits for another.
            with mock.patch.object(worker, "moves", return_value=True) if in_turn else nullcontext():
                report = render(pipe, jobs, out, format="png", max_batch=batch)
            if report.done < len(jobs):
                raise RuntimeError(f"{report.done} clips of {len(jobs)} were rendered: no number")

        return work

    return {
        "loop": (lambda: as_the_paper(toy.pipeline()), loop),
        "sharing": (guided, loop),
        "text": (guided, rendered(1, in_turn=True)),
        "overlap": (guided, rendered(1)),
        "batching": (guided, rendered(max_batch)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="each variant's best counts")
    parser.add_argument("--save", type=Path, help="a file to add the result to, as a line of JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    jobs, seconds = jobs_of(arguments.jobs), {}
    folder = Path(tempfile.mkdtemp())
    try:
        every = variants(arguments.max_batch)
        for number in range(arguments.rounds):
            for name, (build, work) in every.items():
                out = folder / f"{name}-{number}"
                out.mkdir()
                pipe = build()
                started = time.perf_counter()
                work(pipe, jobs, out)
                seconds[name] = min(time.perf_counter() - started, seconds.get(name, float("inf")))
        for name in every:
            for job in jobs:
                one, other = (read_frames(folder / f"{side}-0" / job["name"]).astype(int) for side in ("loop", name))
                if np.abs(one - other).max() > 1:
                    print(f"{name}: {job['name']} differs from the loop's by {np.abs(one - other).max()}: no number")
                    return 1
        ratios = {name: round(seconds["loop"] / taken, 3) for name, taken in seconds.items()}
        row = result("render", "cpu", clock="wall", jobs=len(jobs), seconds=seconds, **{"loop over": ratios})
        print(saved(row, arguments.save))
        return 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
