"""The jobs of a run: checked against their models and added to the folder, including those that are added later."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError, UnsupportedPipelineError, wrong
from stgfast.queue.desk import Desk
from stgfast.queue.forecast import forecast
from stgfast.queue.job import Job
from stgfast.queue.pack import is_archive, read_packed
from stgfast.queue.readers import Bad, Line, checked, read
from stgfast.queue.state import DONE, PACKED
from stgfast.queue.store import WAITS, Store
from stgfast.queue.taking import Staged, trusted
from stgfast.render.checks import check
from stgfast.render.files import Form, metadata_of, read_frames
from stgfast.render.loading import Loading, execution_of
from stgfast.render.models import Model

SHOWN = 1000  # bad lines in the report; the listener receives all


class BadJobs(SettingsError):
    """Lines of a job file that cannot be rendered. Nothing was added."""

    def __init__(self, lines: list[Bad], count: int):
        self.lines, self.count = lines, count
        first = "; ".join(f"line {line.number}: {line.why}" for line in lines[:3])
        super().__init__(f"jobs: got {count} bad line{'s' * (count > 1)}, expected none ({first})")


class Part:
    """One model of a run: its jobs are checked, and completed with everything that decides their clips.

    Attributes:
        made: what decides clips beside the model's name.
    """

    def __init__(self, model: Model, loading: Loading, form: Form):
        self.model, self.form, self.made = model, form, model.made(loading)
        self.compiled = loading.compile or (model.pipe is not None and execution_of(model.pipe).compilation is not None)

    def staged(self, job: Job, line: int) -> Staged:
        """A job as it is rendered; raises if this model cannot do it."""
        check(self.model, job)
        if job.loras and self.compiled:
            raise wrong("loras", len(job.loras), "none with compiled blocks: these do not change")
        job = self.model.settled(job).named(self.model.name, self.made)
        return job, self.form.file(job.name), line, self.model.images, self.model.name, self.made


class Parts:
    """The models of a run: the given one, and those that jobs name."""

    def __init__(self, first: Part | None, make: Callable[[str], Part]):
        self.first, self.make = first, make
        self.named: dict[str, Part] = {} if first is None else {first.model.name: first}
        self.wrong: dict[str, str] = {}

    def of(self, name: str) -> Part:
        """The part of a job's model; "" for the run's own."""
        if not name:
            if self.first is None:
                raise wrong("model", None, "one for this job, or --model for all that name none")
            return self.first
        if name not in self.named and name not in self.wrong:
            try:
                part = self.make(name)
                self.named[name] = self.named.setdefault(part.model.name, part)
            except (SettingsError, UnsupportedPipelineError) as error:
                self.wrong[name] = str(error)
        if name in self.wrong:
            raise SettingsError(self.wrong[name])
        return self.named[name]

    def check_trust(self, trust: str | None) -> None:
        """Raise if the model that may contain code is not one of these."""
        if trust is not None and not any(part.model.trusted for part in self.named.values()):
            raise wrong("trust", trust, f"the name of the model, such as {', '.join(self.models)!r}, or none")

    @property
    def models(self) -> dict[str, Mapping[str, Any]]:
        """Their names, and what else decides their clips."""
        return {part.model.name: part.made for part in self.named.values()}


class Planning:
    """The jobs of a run.

    Attributes:
        defaults: fields of all jobs that do not set them.
        formed: the format of clips, in words.
    """

    def __init__(self, parts: Parts, defaults: Mapping[str, Any], formed: str, tell: Callable[..., None]):
        self.parts, self.defaults, self.formed, self.tell = parts, defaults, formed, tell
        self.bad = 0

    def plan(
        self, store: Store, jobs: Jobs, *, skip_bad: bool, keep: bool = True, like: str | Path | None = None
    ) -> dict[str, int]:
        """Check all lines, then add all of them or none. Returns the number of jobs by status.

        A plan that is not kept is listed, with an estimate of its time from the clips of this folder or another one.
        """
        kept: list[Bad] = []
        staged = self._staged(store, lines_of(jobs, self.defaults, store.home / PACKED))
        with store.taking_up(staged, keep=keep) as wrong_lines:
            for line in wrong_lines:
                self.bad += 1
                if len(kept) < SHOWN:
                    kept.append(line)
                self.tell("bad", line=line.number, error=line.why)
            if kept and not skip_bad:
                raise BadJobs(kept, self.bad)
            counts = store.counts()
            for row in store.rows() if not keep else ():
                self.tell("listed", file=row.file, status=row.status, job=row.job.to_dict())
            if not keep:
                self._forecast(store, like)
            other = store.of_another_form(self.formed)
        self.tell("planned", **counts, bad=self.bad)
        if other:
            self.tell("kept", clips=other, form=self.formed)
        return counts

    def _forecast(self, store: Store, like: str | Path | None) -> None:
        free = shutil.disk_usage(store.out).free
        if like is None:
            found = forecast(store, WAITS, store)
        else:
            with Desk(Path(like)) as desk:
                found = forecast(store, WAITS, desk)
        self.tell("forecast", **found.to_dict(), free=free)

    def _staged(self, store: Store, lines: Iterable[Line | Bad]) -> Iterator[Bad]:
        for line in lines:
            if isinstance(line, Bad):
                yield line
                continue
            for job in line.jobs:
                try:
                    store.stage(*self.parts.of(job.model).staged(job, line.number))
                except SettingsError as error:
                    yield Bad(line.number, str(error))
                    break

    def take_in(self, store: Store) -> None:
        """Take jobs that were added since."""
        for name in store.models_added():
            with contextlib.suppress(SettingsError):  # reported for each of its jobs
                self.parts.of(name)  # now, not while the folder is locked: it may need the hub

        def staged(entry: str, number: int) -> Staged:
            line = checked(number, json.loads(entry), base=Path(), defaults=self.defaults)
            if isinstance(line, Bad):
                raise SettingsError(line.why)
            (job,) = line.jobs
            return self.parts.of(job.model).staged(job, number)

        new, refused = store.take_in(self.parts.models, staged)
        if new:
            self.tell("added", jobs=new)
        for line, why in refused:
            self.tell("refused", line=line, error=why)

    def verify(self, store: Store) -> None:
        """Render finished clips again that cannot be decoded."""
        for row in store.rows(status=DONE):
            try:
                frames = read_frames(store.out / row.file)
                why = "" if len(frames) else "no frames"
            except Exception as error:  # a decoder of broken bytes may raise anything
                why = f"{type(error).__name__}: {error}"
            if why:
                store.lose(row.file)
                self.tell("broken", file=row.file, why=why)


Jobs = str | Path | Iterable[Job | Mapping[str, Any]] | None


def lines_of(jobs: Jobs, defaults: Mapping[str, Any], packed: Path) -> Iterator[Line | Bad]:
    """Jobs from any source. The files of an archive are extracted into `packed`."""
    if jobs is None:
        return
    if isinstance(jobs, (str, Path)) and is_archive(Path(jobs)):
        yield from read_packed(Path(jobs), packed, defaults=defaults)
        return
    if isinstance(jobs, (str, Path)):
        yield from read(Path(jobs), defaults=defaults)
        return
    given: Iterable[object] = jobs
    for number, job in enumerate(given, 1):
        if isinstance(job, Job):
            recipe = defaults.get("recipe") if job.recipe is None else job.recipe
            yield Line(number, (dataclasses.replace(job, recipe=recipe),))
        elif isinstance(job, Mapping):
            yield checked(number, job, base=Path(), defaults=defaults)
        else:
            yield Bad(number, str(wrong("job", type(job).__name__, "a Job, or a mapping with its fields")))


def identity_in(clip: Path) -> str | None:
    """The `Job.identity` from which a clip says it was made; None if it does not say."""
    try:
        metadata = metadata_of(clip)
        made = {name: metadata[name] for name in ("dtype", "revision") if metadata.get(name)}
        return trusted(json.dumps(metadata["job"])).identity(metadata["model"], made)
    except (SettingsError, KeyError, TypeError, AttributeError):  # a file of this name may contain anything
        return None


def jobs_of(model: Model, prompts: Sequence[str], clips: int, seed: int, defaults: Mapping[str, Any]) -> Iterator[Job]:
    """One job for each clip, with prompts in turn. Raises if the model cannot do one of them."""
    for number in range(clips):
        given = {"prompt": prompts[number % len(prompts)], "seed": seed + number // len(prompts)}
        line = checked(number + 1, given, base=Path(), defaults=defaults)
        if isinstance(line, Bad):
            raise SettingsError(line.why)
        for job in line.jobs:
            check(model, job)
            yield model.settled(job)
