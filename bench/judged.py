"""Whether clips made by a recipe are worse than exact ones, by the judge of the model in the package.

Both have the same prompts, which were not used to choose anything, and the same noise. The result is the difference,
clip by clip, with its 95% interval.

    python bench/judged.py --out DIR --save bench/results/judged.json
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import front

import stgfast
from stgfast import Recipe, toy
from stgfast.bench.measure import result
from stgfast.evaluate.judged import measure
from stgfast.evaluate.measures import Measure
from stgfast.evaluate.run import Setting, clips_of, differences, measured
from stgfast.evaluate.study import EARLY, SEEDS
from stgfast.integrations import ADAPTERS
from stgfast.queue.job import Job
from stgfast.recipes import model_of
from stgfast.spacing import spaced, thinning
from stgfast.toy import videos

SEED = 505  # of prompts and of noise
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One way to make all clips."""

    name: str
    steps: int
    recipe: Recipe | None = None


def sides() -> tuple[Side, ...]:
    """Exact Euler steps, and the recipes that the front found as near to the converged clip at the lowest cost."""
    pipe = toy.pipeline()
    model = model_of(pipe, ADAPTERS[type(pipe).__name__])
    steps = thinning(20, 4, 0.1)
    named = Recipe(model=model, steps=20, solver="unipc", reuse=steps, reuse_cfg=steps, reuse_order=1)
    every = Recipe(model=model, steps=24, solver="unipc", reuse=2, reuse_cfg=2, reuse_order=2)
    blocks = Recipe(model=model, steps=24, solver="unipc", reuse_blocks=spaced(24, 5, 3), reuse_order=1)
    return Side("exact", front.BASE.steps), *(Side(str(each), each.steps, each) for each in (named, every, blocks))


def made(side: Side, clips: int, out: Path, judged: Measure) -> Setting:
    """The clips of one side, measured. Existing clips are not made again."""
    size = {name: toy.CALL[name] for name in ("width", "height", "num_frames")}
    scale = {"guidance_scale": toy.CALL["guidance_scale"]}
    jobs = [
        Job(
            prompt=str(videos.plan(SEED, number // SEEDS).scene),
            seed=SEED * 1_000_000 + number,
            steps=side.steps,
            guidance=EARLY,
            pipeline=scale,
            **size,
        )
        for number in range(clips)
    ]
    pipe = stgfast.accelerate(toy.pipeline(), EARLY, recipe=side.recipe)
    report = stgfast.render(pipe, jobs, out, format="npz", max_batch=16)
    if report.done < len(jobs):
        raise RuntimeError(f"{out}: got {report.done} clips, expected {len(jobs)}; start it again")
    (setting,) = measured(out, clips_of(out)[0], judged).values()
    return setting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where clips are put")
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--save", type=Path, help="a file for what was found")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    judged = measure()
    base, *others = sides()
    exact = made(base, options.clips, options.out / "exact", judged)
    found: dict[str, Any] = {}
    for number, side in enumerate(others):
        there = made(side, options.clips, options.out / f"recipe-{number}", judged)
        found[side.name] = {
            name: {"value": float(each.value), "half": float(each.half)}
            for name, each in differences(there, exact, judged.real).items()
        }
        log.info("%s, less exact %d Euler steps:", side.name, base.steps)
        for name, each in found[side.name].items():
            log.info("  %-10s %+.4f +- %.4f", name, each["value"], each["half"])
    if options.save:
        row = result(
            "judged", "cpu", guidance=str(EARLY), clips=options.clips, than=f"Euler, {base.steps}", found=found
        )
        options.save.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
