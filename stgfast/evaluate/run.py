"""Measure the clips of an output folder, and compare each setting with CFG alone, by prompt and seed.

A setting is everything in a job except prompt, image, seed and name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stgfast.errors import wrong
from stgfast.evaluate.measures import PLAIN, Measure, Measured
from stgfast.evaluate.statistics import Array, Chosen, Cloud, Estimate, diversity, estimated, mean
from stgfast.extras import require
from stgfast.guidance import Guidance
from stgfast.pages import halves, safe
from stgfast.queue.job import Job
from stgfast.queue.state import DONE, FOLDER, StoreError
from stgfast.queue.store import Row, Store
from stgfast.render.files import Frames, read_frames

Clip = tuple[str, int]  # prompt with image, and seed
APART = ("prompt", "negative_prompt", "image", "image_sha256", "seed", "name")  # what differs within a setting


@dataclass(frozen=True)
class Setting:
    """Clips with the same setting."""

    job: Mapping[str, Any]  # their common fields, as data
    clips: dict[Clip, Measured] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    name: str = ""  # set if no job made it

    @property
    def guidance(self) -> Guidance | None:
        given = self.job.get("guidance")
        return None if given is None else Guidance.from_dict(given)

    @property
    def base(self) -> str:
        """The key of the same setting with CFG alone."""
        return _key({**self.job, "guidance": Guidance().to_dict()})


@dataclass(frozen=True)
class Summary:
    """The statistics of one setting."""

    name: str
    job: Mapping[str, Any]
    clips: int
    seconds: float  # of a clip, in all stages
    estimates: Mapping[str, Estimate]
    base: str = ""  # the name of the same with CFG alone
    differences: Mapping[str, Estimate] = field(default_factory=dict)  # from that one, over the clips of both


@dataclass(frozen=True)
class Evaluation:
    summaries: tuple[Summary, ...]
    left_out: int  # jobs without a clip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with None for what is not known."""
        settings = [_plain(dataclasses.asdict(summary)) for summary in self.summaries]
        return {"left_out": self.left_out, "settings": settings}

    def page(self) -> str:
        """The evaluation as one static page."""
        before, after = halves("stgfast.evaluate", "page.html")
        return f"{before}{safe(json.dumps(self.to_dict(), allow_nan=False))}{after}"

    def table(self, names: Sequence[str] = ()) -> str:
        """The evaluation in markdown. A number that differs significantly from CFG alone has the sign of the
        difference.
        """
        known = list(dict.fromkeys(name for summary in self.summaries for name in summary.estimates))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise wrong("columns", unknown, f"some of {', '.join(known)}")
        columns = list(names) or known
        lines = [["setting", "clips", *columns], ["---"] * (len(columns) + 2)]
        for summary in self.summaries:
            lines.append([summary.name, str(summary.clips), *(_cell(summary, name) for name in columns)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(summary: Summary, name: str) -> str:
    if name not in summary.estimates:
        return ""
    difference = summary.differences.get(name)
    return f"{summary.estimates[name]}{difference.sign if difference else ''}"


def evaluate(
    out: str | Path,
    *,
    measure: Measure | None = None,
    progress: Callable[[int], None] | None = None,
    told: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure the clips of a folder that `stgfast render` or `stgfast sweep` made.

    Args:
        out: the folder.
        measure: what is measured of a clip. Default: the measure of the model, or measures that suit any clip.
        progress: called with the number of clips measured so far.
        told: deprecated name of `progress`.

    Returns:
        The evaluation: measures by setting, and the number of jobs that have no clip.

    Example:
        >>> evaluation = stgfast.evaluate("clips")  # doctest: +SKIP
    """
    require("render")
    if told is not None:
        warnings.warn("told: use progress", DeprecationWarning, stacklevel=2)
        progress = told
    done, left_out = clips_of(Path(out))
    measure = measure or measure_for({row.model for row in done})
    return Evaluation(summed_up(measured(Path(out), done, measure, progress), measure.real), left_out)


def clips_of(out: Path) -> tuple[list[Row], int]:
    """The jobs whose clips exist, and the number of others."""
    if not (out / FOLDER / "jobs.db").is_file():
        raise wrong("folder", str(out), "an output folder of stgfast render or stgfast sweep")
    with Store(out) as store:
        rows = list(store.rows(every=True))
    done = [row for row in rows if row.status == DONE]
    if not done:
        raise wrong("folder", f"{out}, with no clip that is done", "clips to measure")
    return done, len(rows) - len(done)


def measured(
    out: Path, done: Iterable[Row], measure: Measure, progress: Callable[[int], None] | None = None
) -> dict[str, Setting]:
    """The measured clips by setting."""
    settings: dict[str, Setting] = {}
    for count, row in enumerate(done, 1):
        data = {name: value for name, value in row.job.to_dict().items() if name not in APART}
        setting = settings.setdefault(_key(data), Setting(data))
        setting.clips[_clip(row.job)] = measure.of(_frames(out / row.file), row.job.prompt)
        setting.seconds.append(sum(row.seconds.values()))
        if progress is not None:
            progress(count)
    return settings


def measure_for(models: Iterable[str]) -> Measure:
    """The measure of a model, if it has one. Clips of several models have the plain measure in common."""
    if set(models) == {"toy"}:
        from stgfast.evaluate.judged import measure

        return measure()
    return PLAIN


def summed_up(settings: Mapping[str, Setting], real: Cloud | None) -> tuple[Summary, ...]:
    """The summaries by setting; those with CFG alone are the base of the others."""
    names = _names(settings)
    summaries = []
    for key, setting in settings.items():
        of, units = _statistics(setting.clips, real)
        base = settings.get(setting.base)
        against = {} if base is None or base is setting else differences(setting, base, real)
        summaries.append(
            Summary(
                names[key],
                setting.job,
                len(setting.clips),
                round(float(np.mean(setting.seconds)), 4) if setting.seconds else math.nan,
                {name: estimated(statistic, units) for name, statistic in of.items()},
                names[setting.base] if against else "",
                against,
            )
        )
    return tuple(summaries)


Statistics = dict[str, Callable[[Chosen], float]]


def _statistics(clips: Mapping[Clip, Measured], real: Cloud | None) -> tuple[Statistics, NDArray[np.int64]]:
    """Each number as a function of a set of clips, and the units that stay together: prompts, or seeds if there are
    more of those.
    """
    prompts, seeds = (np.unique([clip[n] for clip in clips], return_inverse=True)[1] for n in range(2))
    units = prompts if prompts.max() >= seeds.max() else seeds
    measured = list(clips.values())
    features: Array = np.stack([each.features for each in measured])
    found: Statistics = {}
    for name in measured[0].values:
        values = np.array([each.values[name] for each in measured])
        found[name] = functools.partial(_mean_of, values)
    if len(measured) > prompts.max() + 1:  # a prompt has several seeds
        found["diversity"] = lambda chosen: diversity(features[chosen], prompts[chosen])
    if real is not None:
        found["Fréchet"] = lambda chosen: real.distance(features[chosen])
    return found, units


def _mean_of(values: Array, chosen: Chosen) -> float:
    return mean(values[chosen])


def differences(setting: Setting, base: Setting, real: Cloud | None) -> dict[str, Estimate]:
    both = [clip for clip in setting.clips if clip in base.clips]
    if not both:
        return {}
    of, units = _statistics({clip: setting.clips[clip] for clip in both}, real)
    than, _ = _statistics({clip: base.clips[clip] for clip in both}, real)
    return {name: estimated(functools.partial(_less, of[name], than[name]), units) for name in of}


def _less(of: Callable[[Chosen], float], than: Callable[[Chosen], float], chosen: Chosen) -> float:
    return of(chosen) - than(chosen)


def _names(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Settings in words: their guidance, and the fields in which they differ."""
    flat = {key: _flat(setting.job) for key, setting in settings.items() if not setting.name}
    every = {name for given in flat.values() for name in given}
    varied = sorted(name for name in every if len({json.dumps(given.get(name)) for given in flat.values()}) > 1)
    names = {}
    for key, setting in settings.items():
        if setting.name:
            names[key] = setting.name
            continue
        guidance = setting.guidance
        words = ["the model's own guidance" if guidance is None else str(guidance)]
        words += [f"{name} {flat[key][name]}" for name in varied if name in flat[key]]
        names[key] = "; ".join(words)
    return names


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job and the arguments of its pipeline, without guidance."""
    return {
        **{name: value for name, value in job.items() if name not in ("guidance", "pipeline")},
        **job.get("pipeline", {}),
    }


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _plain(value) for name, value in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _key(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def _clip(job: Job) -> Clip:
    return json.dumps([job.prompt, job.negative_prompt, job.image_sha256]), job.seed


def _frames(path: Path) -> Frames:
    try:
        return read_frames(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: {error}; a clip that was rendered cannot be read any more") from error
