"""Search for the cheapest recipe: make clips by each candidate, and compare with converged ones. A stopped search
continues.

Clips are made prompt by prompt, by each recipe that was not dropped, so that at any time all recipes are equally known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stgfast.errors import SettingsError, wrong
from stgfast.explain import explain
from stgfast.extras import require
from stgfast.formulas import COND, UNCOND
from stgfast.install import accelerate
from stgfast.installed import installed_on
from stgfast.queue.job import Job
from stgfast.recipes import Recipe, model_of
from stgfast.render.calls import arguments_of
from stgfast.render.loading import Loading, given_to
from stgfast.render.models import Model, described
from stgfast.render.planning import jobs_of
from stgfast.render.run import render
from stgfast.solvers import check_solver
from stgfast.tune.page import write_page
from stgfast.tune.search import Aim, Trial, candidates, front, given_up
from stgfast.tune.search import described as measured
from stgfast.version import __version__

STATE, RECIPE, PAGE, CLIPS = "tune.jsonl", "recipe.json", "index.html", "clips"
# Steps of a converged clip over the usual ones: by a solver of higher order, or by the pipeline's own.
MORE, MUCH_MORE = 3, 6
SHOWN = 3  # number of prompts on the page
Event = dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The result of a search."""

    aim: Aim
    usual: Trial
    trials: tuple[Trial, ...]  # including the usual clip
    chosen: Trial | None
    out: Path

    def table(self) -> str:
        """The recipes by cost, with a star if no other is both cheaper and nearer."""
        best = front(self.trials)
        lines = ["  cost  seconds  distance  clips"]
        for trial in sorted(self.trials, key=lambda trial: (trial.cost, trial.distance)):
            mark = "*" if any(trial is other for other in best) else " "
            words = f"{trial.recipe}{' (the usual clip)' if trial is self.usual else ''}"
            figures = f"{trial.cost:6.3f} {trial.times(self.usual):8.2f} {trial.distance:9.4f} {len(trial.distances):6}"
            lines.append(f"{mark}{figures[1:]}  {words}")
        return "\n".join(lines) + "\n"


def tune(
    model: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    distance: float | None = None,
    cost: float | None = None,
    clips: int = 8,
    minutes: float | None = None,
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str | None = None,
    trust: str | None = None,
    listener: Callable[[Event], None] | None = None,
) -> Tuned:
    """Find the cheapest recipe for a model, and write it into a folder with a page about it.

    The usual clip is what the pipeline makes without a recipe, guidance included. A search that was stopped continues.

    Args:
        model: a pipeline, or the folder or hub name of one.
        prompts: prompts like those to be rendered. The first `clips` are used; if there are fewer, several seeds of
            each.
        out: the folder.
        distance: the largest distance from the converged clip that is accepted (the relative norm of the difference of
            latents, the median over clips). Default, if `cost` is not given either: the distance of the usual clip.
        cost: the highest cost that is accepted, as a fraction of the usual clip's block-rows.
        clips: the number of clips by which a recipe is judged.
        minutes: no further clip starts after this time.
        seed: the seed of the first clip.
        defaults: settings of all clips, as for `render`: steps, sizes, guidance.
        dtype, device, offload, trust: as for `render`.
        listener: called with each event.

    Returns:
        The recipe that was found and all measurements.

    Example:
        >>> tuned = stgfast.tune(pipe, ["a prompt"], "tuned", minutes=60)  # doctest: +SKIP
        >>> pipe = stgfast.accelerate(pipe, recipe="tuned/recipe.json")  # doctest: +SKIP
    """
    require("render")
    aim = Aim(distance, cost)
    if isinstance(clips, bool) or not isinstance(clips, int) or clips < 1:
        raise wrong("clips", clips, "a number of clips, 1 or more")
    if minutes is not None and not minutes > 0:
        raise wrong("minutes", minutes, "a number above 0")
    if isinstance(prompts, str) or not prompts:
        raise wrong("prompts", prompts, "a list of prompts, one at least")
    known = described(model, trust=trust)
    if known.recipe is not None:
        raise SettingsError("model: got a pipeline with a recipe, expected one without")
    jobs = list(jobs_of(known, prompts, clips, seed, defaults or {}))
    loading = Loading(dtype, device, offload)
    if known.pipe is not None:
        loading.check_handed_over()
    search = Search(known, jobs, Path(out), loading, listener or (lambda event: None))
    return search.run(aim, None if minutes is None else time.monotonic() + 60 * minutes)


class Search:
    """One model, its clips, and the folder with the measurements."""

    def __init__(
        self, model: Model, jobs: Sequence[Job], out: Path, loading: Loading, listener: Callable[[Event], None]
    ):
        self.jobs, self.out, self.listener = jobs, out, listener
        listener({"event": "loading", "model": model.name})
        self.pipe = model.load(loading)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapter = installed_on(self.pipe).adapter
        self.given = given_to(self.pipe)
        self.usual = Trial(Recipe(model=model_of(self.pipe, self.adapter), steps=self._steps()), 1.0)
        self.solvers = ["", *(name for name in ("unipc", "dpm++") if self._takes(name))]
        better = "unipc" if "unipc" in self.solvers else ""
        times = MORE if better else MUCH_MORE
        self.converged = replace(self.usual.recipe, solver=better, steps=times * self.usual.recipe.steps)
        self.about = {"converged": str(self.converged), "guidance": str(jobs[0].guidance), "version": __version__}
        plain = self._explained(self.usual.recipe)
        self.block_rows = plain.block_rows
        branches = {name for phase in plain.phases for name in phase.branches}
        whole = any(layout.blocks.full for layout in self.adapter.layouts(self.pipe).values())
        self.carried = {"perturbed": bool(branches - {COND, UNCOND}), "cfg": UNCOND in branches, "blocks": not whole}
        self.known = Kept(out, {"model": self.usual.recipe.model, "jobs": [job.to_dict() for job in jobs]})

    def _steps(self) -> int:
        """The number of steps of a usual clip."""
        return sum(phase.steps for phase in explain(self.pipe, **self._call(self.jobs[0])).phases)

    def _takes(self, solver: str) -> bool:
        try:
            check_solver(self.pipe, solver)
        except SettingsError:
            return False
        return True

    def run(self, aim: Aim, until: float | None) -> Tuned:
        trials = [self.usual, *self._candidates(aim)]
        for number in range(len(self.jobs)):
            lost = given_up(trials)
            alive = [trial for trial in trials if trial is self.usual or not any(trial is other for other in lost)]
            for place, trial in enumerate(alive):
                if until is not None and time.monotonic() > until and self.usual.distances:
                    break
                self._make(trial, number)
                event = {
                    "event": "made",
                    "clip": number,
                    "of": len(self.jobs),
                    "recipes": len(alive),
                    "made": place + 1,
                }
                self.listener(event)
        known = tuple(trial for trial in trials if trial.distances)
        chosen = aim.choose(known, self.usual)
        tuned = Tuned(aim, self.usual, known, chosen, self.out)
        if chosen is not None:
            measured(chosen, self.usual, self.about).save(self.out / RECIPE)
        self._show(tuned)
        return tuned

    def _candidates(self, aim: Aim) -> Iterator[Trial]:
        for recipe in candidates(self.usual.recipe, self.solvers, **self.carried):
            cost = self._explained(recipe).block_rows / self.block_rows
            if cost <= (1.0 if aim.cost is None else aim.cost):
                yield Trial(recipe, cost)

    def _explained(self, recipe: Recipe) -> Any:
        accelerate(self.pipe, self.given, recipe=recipe)
        return explain(self.pipe, **self._call(self.jobs[0], recipe))

    def _call(self, job: Job, recipe: Recipe | None = None) -> dict[str, Any]:
        job = job if recipe is None else replace(job, steps=recipe.steps)
        return {**arguments_of(self.pipe, [job]), "output_type": "latent"}

    def _make(self, trial: Trial, number: int) -> None:
        key = str(trial.recipe), number
        if key not in self.known.rows:
            converged = self._converged(number)
            made, seconds = self._latents(trial.recipe, number)
            off = float((made - converged).norm() / converged.norm())
            self.known.add(*key, off, seconds)
        trial.distances[number], trial.seconds[number] = self.known.rows[key]

    def _converged(self, number: int) -> Tensor:
        kept = self.out / "converged" / f"{number:04}.npy"
        if not kept.exists():
            self.listener({"event": "converging", "clip": number, "of": len(self.jobs)})
            made, _ = self._latents(self.converged, number)
            kept.parent.mkdir(exist_ok=True)
            aside = kept.with_suffix(".part.npy")
            np.save(aside, made.numpy())
            aside.replace(kept)
        return torch.from_numpy(np.load(kept))

    def _latents(self, recipe: Recipe, number: int) -> tuple[Tensor, float]:
        accelerate(self.pipe, self.given, recipe=recipe)
        begun = time.monotonic()
        with torch.no_grad():
            made = self.pipe(**self._call(self.jobs[number], recipe)).to_tuple()
        latents = [part.double().cpu().flatten() for part in made if isinstance(part, Tensor)]  # including sound
        if not isinstance(made[0], Tensor):
            raise SettingsError(
                f"latents of {self.adapter.pipeline}: got {type(made[0]).__name__}, expected a tensor, which "
                f"output_type='latent' gives of other pipelines"
            )
        return torch.cat(latents), time.monotonic() - begun

    def _show(self, tuned: Tuned) -> None:
        """Write the page, with clips of the first prompts: usual, by the recipe, and converged."""
        sides = {"usual": self.usual.recipe, "converged": self.converged}
        if tuned.chosen is not None:
            sides["recipe"] = tuned.chosen.recipe
        for name, recipe in sides.items():
            accelerate(self.pipe, self.given, recipe=recipe)
            jobs = [replace(job, steps=recipe.steps, name=f"{n}") for n, job in enumerate(self.jobs[:SHOWN])]
            self.listener({"event": "showing", "side": name})
            report = render(self.pipe, jobs, self.out / CLIPS / _named(name, recipe), max_batch=1)
            if report.code:
                raise SettingsError(
                    f"clips for the page, {name}: got {report.failed} that failed; see {self.out / CLIPS}"
                )
        shown = {name: f"{CLIPS}/{_named(name, recipe)}" for name, recipe in sides.items()}
        prompts = [job.prompt for job in self.jobs[:SHOWN]]
        write_page(self.out / PAGE, tuned, {**self.about, "prompts": prompts, "shown": shown})


def _named(side: str, recipe: Recipe) -> str:
    """The name of the folder for a recipe's clips, which no other recipe has."""
    words = "".join(letter if letter.isalnum() else "-" for letter in str(recipe))
    return f"{side}-{words}"[:120]


class Kept:
    """The measurements of clips, in a file of the output folder: the first line describes them, then one line for
    each clip.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]):
        self.rows: dict[tuple[str, int], tuple[float, float]] = {}
        self.file = out / STATE
        out.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps({**about, "version": __version__}))
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        if lines and _read(lines[0]) != about:
            raise SettingsError(f"folder: got {out}, where another model or other clips were tuned, expected a new one")
        whole = [json.dumps(about)]
        for line in lines[1:]:
            row = _read(line)
            if row is not None:  # the last line may be incomplete
                self.rows[row["recipe"], row["clip"]] = row["distance"], row["seconds"]
                whole.append(line)
        aside = self.file.with_suffix(".part")
        aside.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        aside.replace(self.file)

    def add(self, recipe: str, clip: int, distance: float, seconds: float) -> None:
        self.rows[recipe, clip] = distance, seconds
        row = {"recipe": recipe, "clip": clip, "distance": distance, "seconds": round(seconds, 4)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
