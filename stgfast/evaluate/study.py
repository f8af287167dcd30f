"""Study whether STG does what its paper says: CFG at several scales with and without STG, judged on the toy model.

    python -m stgfast.evaluate.study tuning --out DIR      many layers and kinds, few clips: to choose layers
    python -m stgfast.evaluate.study scales --out DIR      CFG scales with and without STG, few clips: to choose scales
    python -m stgfast.evaluate.study reported --out DIR    the chosen layers, 1,024 clips each, on other prompts
    python -m stgfast.evaluate.study best --out DIR        CFG with and without STG, on other prompts again

Clips are rendered like any folder of jobs, so a study continues where it was stopped. At the end it prints a table and
writes all numbers. The table also has drawn clips for the same prompts, directly and through the model's VAE: the best
that the model could do.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stgfast import toy
from stgfast.evaluate.command import add_outputs, write_outputs
from stgfast.evaluate.judged import measure
from stgfast.evaluate.measures import Measure
from stgfast.evaluate.run import Clip, Evaluation, Setting, clips_of, measured, summed_up
from stgfast.guidance import Guidance
from stgfast.install import accelerate
from stgfast.kinds import ATTENTION, RESIDUAL
from stgfast.perturbation import Perturbation
from stgfast.queue.job import Job
from stgfast.render.files import pixels
from stgfast.render.run import render
from stgfast.toy import videos

log = logging.getLogger(__name__)

CFG = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
COLUMNS = ("Fréchet", "right", "shape", "motion", "diversity", "speed", "jerk", "flicker")
SEEDS = 4  # for each prompt


@dataclass(frozen=True)
class Study:
    """The clips and settings of a study: CFG scales, each with its guidance."""

    seed: int  # of prompts, and of noise
    prompts: int
    settings: Sequence[tuple[float, Guidance]]

    def jobs(self) -> Iterator[Job]:
        size = {name: toy.CALL[name] for name in ("width", "height", "num_frames")}
        for number in range(self.prompts):
            prompt = str(videos.plan(self.seed, number).scene)
            for seed in range(SEEDS):
                for place, (cfg, guidance) in enumerate(self.settings):
                    yield Job(
                        prompt=prompt,
                        seed=self.seed * 1_000_000 + number * SEEDS + seed,
                        steps=toy.CALL["num_inference_steps"],
                        guidance=guidance,
                        pipeline={"guidance_scale": cfg},
                        name=f"{place:03}-{number:04}-{seed}",
                        **size,
                    )


def perturbed(kind: str, layer: int, scale: float, **settings: Any) -> Guidance:
    return Guidance(Perturbation([layer], kind=kind, scale=scale), **settings)


EARLY, LATER = perturbed(RESIDUAL, 4, 1.0), perturbed(RESIDUAL, 8, 1.0)


def tuning() -> Study:
    """Each second layer, of both kinds, at a good CFG scale, and some of them without CFG."""
    grid = [
        (cfg, perturbed(kind, layer, scale))
        for cfg, kinds, layers, scales in (
            (toy.CALL["guidance_scale"], (RESIDUAL, ATTENTION), (2, 4, 6, 8, 10), (0.2, 0.5, 1.0)),
            (1.0, (RESIDUAL,), (4, 6, 8), (0.5, 1.0)),
        )
        for kind in kinds
        for layer in layers
        for scale in scales
    ]
    return Study(seed=101, prompts=32, settings=[*((cfg, Guidance()) for cfg in CFG), *grid])


def reported() -> Study:
    """The settings that the README reports: those chosen by the tuning study, and those that it found to be weak or
    harmful.
    """
    usual = toy.CALL["guidance_scale"]
    return Study(
        seed=202,
        prompts=256,
        settings=[
            (1.0, Guidance()),
            (usual, Guidance()),
            (4.0, Guidance()),
            (usual, toy.GUIDANCE),
            (usual, replace(toy.GUIDANCE, rescale=0.7)),
            (1.0, toy.GUIDANCE),
            (usual, EARLY),
            (usual, replace(EARLY, reuse=2, reuse_order=0)),
            (1.0, EARLY),
            (usual, LATER),
            (usual, perturbed(ATTENTION, 6, 1.0)),
        ],
    )


def scales() -> Study:
    """CFG scales with and without STG, on the prompts of the tuning study."""
    parts = [Guidance(), *(perturbed(RESIDUAL, layer, scale) for layer in (4, 10) for scale in (0.5, 1.0))]
    return replace(tuning(), settings=[(cfg, part) for cfg in (2.0, 3.0, 4.0, 6.0) for part in parts])


def best() -> Study:
    """CFG alone beside CFG with STG, on prompts and seeds that no setting was chosen on. In the study `scales`, CFG 6
    alone and CFG 2 with STG had the most prompts right, CFG 4 alone and CFG 3 with STG the smallest Fréchet distance.
    """
    strong, half = toy.GUIDANCE, perturbed(RESIDUAL, 10, 0.5)
    pairs = ((2.0, strong), (3.0, half), (4.0, strong), (6.0, strong))
    return Study(seed=303, prompts=128, settings=[(cfg, part) for cfg, stg in pairs for part in (Guidance(), stg)])


STUDIES = {"tuning": tuning, "scales": scales, "reported": reported, "best": best}


def run(study: Study, out: Path) -> Evaluation:
    jobs = list(study.jobs())
    pipe = accelerate(toy.pipeline(), toy.GUIDANCE)
    report = render(pipe, jobs, out, format="npz", max_batch=16, listener=_log)
    if report.done < len(jobs):
        raise RuntimeError(f"the study in {out}: got {report.done} clips, expected {len(jobs)}; start it again")
    judged = measure()
    rows, left_out = clips_of(out)
    settings = measured(out, rows, judged, _counted)
    clips = list(next(iter(settings.values())).clips)
    made = {setting.name: setting for setting in as_drawn(study, clips, judged, pipe.vae)}
    return Evaluation(summed_up({**made, **settings}, judged.real), left_out)


def as_drawn(study: Study, clips: Sequence[Clip], judged: Measure, vae: Any) -> tuple[Setting, Setting]:
    """Drawn clips for the same prompts, directly and through the VAE."""
    drawn, through = Setting({}, name="as drawn"), Setting({}, name="as drawn, through the VAE")
    for number, clip in enumerate(clips):
        prompt = json.loads(clip[0])[0]
        frames = videos.clips(study.seed + 1, [number], [videos.Scene.parse(prompt)]).frames
        drawn.clips[clip] = judged.of(pixels(frames[0].permute(0, 2, 3, 1)), prompt)
        with torch.no_grad():
            latents = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mean
            back = vae.decode(latents).sample.transpose(1, 2) / 2 + 0.5
        through.clips[clip] = judged.of(pixels(back[0].permute(0, 2, 3, 1)), prompt)
    return drawn, through


def _log(event: dict[str, Any]) -> None:
    if event["event"] in ("done", "failed") and event["finished"] % 100 == 0:
        log.info("%d of %d clips", event["finished"], event["total"])


def _counted(count: int) -> None:
    if count % 1000 == 0:
        log.info("%d clips measured", count)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where clips are put")
    add_outputs(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluation = run(STUDIES[arguments.study](), arguments.out)
    write_outputs(evaluation, arguments)
    log.info("%s", evaluation.table(COLUMNS))


if __name__ == "__main__":
    main()
