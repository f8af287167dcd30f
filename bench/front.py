"""Error and cost of a clip by solver, steps, `reuse` and caches of other libraries, on the model in the package.

Each way to make a clip is compared with a converged run of 128 UniPC steps with all branches. An approximation is worth
its saving only if fewer steps, or a better solver, are further from the converged run at the same cost. Prompts and
noise were not used to choose anything. Costs are block-rows, counted by the arithmetic that ran in the blocks, and
processor time. The ways take turns: a round is one batch of clips by each way. Both costs are fractions of 48 exact
Euler steps.

    pip install cache-dit==1.5.3
    python bench/front.py --save bench/results/front.jsonl
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor

import stgfast
from stgfast import Guidance, toy
from stgfast.bench.measure import result, saved, significant
from stgfast.evaluate.study import EARLY
from stgfast.solvers import own_solver
from stgfast.spacing import Spacing, eased, in_words, spaced, thinning
from stgfast.toy import videos

log = logging.getLogger(__name__)

SEED = 303  # of prompts and of noise
UNMEASURED = 100_000  # the first of clips that are not measured
TOGETHER = 16
CONVERGED = 128  # UniPC steps
SOLVERS = {"Euler": "", "UniPC": "unipc", "DPM++": "dpm++"}  # of `stgfast.solver`; nothing: the pipeline's own


class Way(NamedTuple):
    """One way to make a clip."""

    solver: str
    steps: int
    reuse: Spacing = 1  # in which steps the perturbed branch is computed, and cond - uncond
    order: int | None = None
    blocks: Spacing = 1  # in which steps the model's blocks run
    peer: str = ""  # which cache of another library, with passes made one after another

    def __str__(self) -> str:
        reused = {"reuse": self.reuse, "reuse_blocks": self.blocks}
        how = "".join(f", {name} {in_words(each)} by order {self.order}" for name, each in reused.items() if each != 1)
        return f"{self.solver}, {self.steps} steps{how}{f', {self.peer}' if self.peer else ''}"

    def guidance(self, exact: Guidance) -> Guidance:
        reused = {"reuse": self.reuse, "reuse_cfg": self.reuse, "reuse_blocks": self.blocks}
        return replace(exact, **reused, reuse_order=self.order)


BASE = Way("Euler", 48)
SPACED = (
    *((16, 5, 2), (20, 5, 2), (20, 5, 3), (24, 5, 2), (24, 5, 3), (30, 5, 3), (30, 6, 2), (36, 6, 2), (36, 6, 3)),
    *((48, 7, 2), (48, 7, 3), (48, 7, 4), (64, 9, 3)),
)
# The caches that came nearest with Euler steps, to be seen with a better solver.
WITH_A_SOLVER = (
    *(f"cache-dit with TaylorSeer, {threshold}" for threshold in (0.04, 0.08, 0.16)),
    *("TaylorSeer, every 2, order 1", "TaylorSeer, every 3, order 1"),
    *("SeaCache, 0.1", "SeaCache, 0.25", "block forecasts, every 2, order 1"),
)
WAYS = (
    *(Way("Euler", steps) for steps in (8, 12, 16, 24, 36, 48, 64, 96)),
    *(Way("UniPC", steps) for steps in (8, 12, 16, 20, 24, 30, 36, 48)),
    *(Way("DPM++", steps) for steps in (12, 16, 20, 24, 30, 36, 48)),
    *(Way("Euler", 48, every, order) for every in (2, 3) for order in (0, 1, 2)),
    *(Way("UniPC", steps, 2, order) for steps in (16, 20, 24, 30, 36, 48) for order in (0, 1, 2)),
    *(Way("UniPC", steps, 3, order) for steps in (30, 48) for order in (1, 2)),
    *(
        Way("UniPC", steps, thinning(steps, 4, growth), 1)
        for steps in (18, 20, 22, 24, 30)
        for growth in (0.0, 0.1, 0.2)
    ),
    *(Way("UniPC", steps, blocks=spaced(steps, first, gap), order=1) for steps, first, gap in SPACED),
    *(Way("UniPC", steps, blocks=eased(steps, first, 3), order=1) for steps, first in ((24, 5), (30, 5), (36, 6))),
    *(Way("Euler", 48, blocks=spaced(48, 7, gap), order=1) for gap in (3, 4)),
    *(Way("Euler", 48, peer=peer) for peer in (*peers.PEERS, *peers.MAG)),
    *(Way("UniPC", 30, peer=peer) for peer in WITH_A_SOLVER),
)


def latents(pipe: Any, way: Way, exact: Guidance, numbers: Sequence[int]) -> Tensor:
    if SOLVERS[way.solver]:
        stgfast.solver(pipe, SOLVERS[way.solver])
    else:
        own_solver(pipe)
    prompts = [str(videos.plan(SEED, number).scene) for number in numbers]
    generator = [torch.Generator().manual_seed(SEED + number) for number in numbers]
    own = {**toy.CALL, "num_inference_steps": way.steps, "output_type": "latent"}
    stg = {} if way.peer else {"stg": way.guidance(exact)}
    return pipe(prompts, generator=generator, **stg, **own).frames.double()


class Front:
    """Two pipelines with the same model: an accelerated one, and one that makes its passes one after another."""

    def __init__(self, exact: Guidance):
        self.exact, self.plain = exact, toy.pipeline()
        self.pipe = stgfast.accelerate(toy.pipeline(), exact)
        for pipe in (self.plain, self.pipe):
            pipe.set_progress_bar_config(disable=True)
        self.ratios: dict[tuple[str, int], list[float]] = {}

    def made(self, way: Way, numbers: Sequence[int]) -> tuple[Tensor, float, float]:
        """The clips, and their cost: block-rows, and seconds of the processor."""
        with self._ready(way) as (pipe, models), peers.counted(models) as computed:
            begun = time.process_time()
            clips = latents(pipe, way, self.exact, numbers)
            return clips, computed(), time.process_time() - begun

    @contextmanager
    def _ready(self, way: Way) -> Iterator[tuple[Any, list[torch.nn.Module]]]:
        if not way.peer:
            yield self.pipe, [self.pipe.transformer]
            return
        put = peers.PEERS.get(way.peer) or functools.partial(peers.MAG[way.peer], ratios={way.steps: self._ratios(way)})
        with peers.pass_by_pass(self.plain, self.exact, put, way.steps) as models:
            yield self.plain, list(models.values())

    def _ratios(self, way: Way) -> list[float]:
        """The calibration that MagCache needs for a model, from clips that are not measured."""
        known = way.solver, way.steps
        if known not in self.ratios:
            with peers.pass_by_pass(self.plain, self.exact, peers.calibrated, way.steps) as models:
                latents(self.plain, way, self.exact, range(UNMEASURED, UNMEASURED + TOGETHER))
                self.ratios[known] = peers.ratios_of(models[peers.COND])
        return self.ratios[known]


def distances(clips: Tensor, from_these: Tensor) -> Tensor:
    """The distance of each clip."""
    return (clips - from_these).flatten(1).norm(dim=1) / from_these.flatten(1).norm(dim=1)


def rows(clips: int, exact: Guidance, ways: Sequence[Way]) -> Iterator[dict[str, Any]]:
    front = Front(exact)
    ways = list(dict.fromkeys((BASE, *ways)))
    off: dict[Way, list[Tensor]] = {way: [] for way in ways}
    computed: dict[Way, float] = dict.fromkeys(ways, 0.0)
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for number, first in enumerate(range(0, clips, TOGETHER)):
        numbers = range(first, min(first + TOGETHER, clips))
        converged, _, _ = front.made(Way("UniPC", CONVERGED), numbers)
        for way in ways[:: -1 if number % 2 else 1]:
            made, block_rows, took = front.made(way, numbers)
            off[way].append(distances(made, converged))
            computed[way] += block_rows
            seconds[way].append(took)
        log.info("%d of %d clips", numbers[-1] + 1, clips)
    for way in ways:
        far = torch.cat(off[way])
        turns = zip(seconds[way], seconds[BASE], strict=True)
        figures = {
            **{"model": "toy", "guidance": str(exact), "way": str(way), **way._asdict(), "clips": clips},
            "distance": significant(float(far.median())),
            "distance, 95%": significant(float(far.quantile(0.95))),
            "block-rows": round(computed[way] / clips, 1),
            "cost": significant(computed[way] / computed[BASE]),
            "seconds": significant(statistics.median(took / base for took, base in turns)),
        }
        yield result("front", "cpu", **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--save", type=Path, help="a file to put the results in, one line of JSON each")
    parser.add_argument("--only", default=".*", metavar="PATTERN", help="measure those ways anew whose names match")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    made = list(rows(options.clips, EARLY, [way for way in WAYS if re.fullmatch(options.only, str(way))]))
    if options.save:
        anew = {row["way"] for row in made}
        there = options.save.read_text(encoding="utf-8").splitlines() if options.only != ".*" else []
        kept = [line for line in there if json.loads(line)["way"] not in anew]
        options.save.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    for row in made:
        saved(row, options.save)
        print(f"{row['way']:64} cost {row['cost']:<7} seconds {row['seconds']:<7} distance {row['distance']:<8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
