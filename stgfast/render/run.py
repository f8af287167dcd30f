"""A run: jobs are checked and taken up, rendered, and what became of them is recorded, until nothing waits."""

from __future__ import annotations

import dataclasses
import gc
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stgfast.errors import wrong
from stgfast.extras import require
from stgfast.queue.readers import over
from stgfast.queue.state import CANCELLED, CLAIMED, DONE, FAILED, PENDING, PUBLISHING, StoreError
from stgfast.queue.store import RETRIES, Store
from stgfast.ranks.wire import device_of
from stgfast.recipes import Recipe, taken
from stgfast.render import together
from stgfast.render.crew import Crew, Setup
from stgfast.render.events import Events, Listener
from stgfast.render.files import Form
from stgfast.render.limits import Limits
from stgfast.render.loading import TEXT, Loading
from stgfast.render.models import Model, described
from stgfast.render.planning import BadJobs, Jobs, Part, Parts, Planning, identity_in
from stgfast.render.process import OwnProcess
from stgfast.render.rendering import Rendering

__all__ = ["BadJobs", "Report", "render"]


@dataclass(frozen=True)
class Report:
    """How a run ended. The counts are of all jobs that it was about, whoever rendered them."""

    done: int
    failed: int
    waiting: int
    bad: int
    rendered: int  # by this run
    seconds: float
    interrupted: bool = False
    cancelled: int = 0

    @classmethod
    def of(cls, counts: Mapping[str, int], bad: int, rendered: int, seconds: float, *, interrupted: bool) -> Report:
        """From how many jobs stand where."""
        waiting = counts[PENDING] + counts[CLAIMED] + counts[PUBLISHING]
        return cls(
            done=counts[DONE],
            failed=counts[FAILED],
            waiting=waiting,
            bad=bad,
            rendered=rendered,
            seconds=round(seconds, 3),
            interrupted=interrupted,
            cancelled=counts[CANCELLED],
        )

    @property
    def code(self) -> int:
        """For the shell: 0 all is done, 1 something failed or was left out, 130 interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failed or self.bad or self.waiting else 0


def render(
    model: Any,
    jobs: Jobs,
    out: str | Path,
    *,
    format: str = "mp4",
    fps: float | None = None,
    crf: int = 18,
    defaults: Mapping[str, Any] | None = None,
    max_batch: int = 8,
    skip_bad: bool = False,
    retry_failed: bool = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    wait: bool = False,
    verify: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    compile: bool = False,
    attention: str | None = None,
    recipe: Recipe | str | Path | None = None,
    trust: str | None = None,
    ray: str | None = None,
    actors: int | None = None,
    gpus_per_clip: int | None = None,
    same_process: bool = False,
    bars: bool = True,
    listener: Listener | None = None,
    plan_only: bool = False,
    like: str | Path | None = None,
) -> Report:
    """Render jobs into a folder; what is there already is not rendered again.

    model         a pipeline, guided or not; or the folder or hub name of one; None where every job names its own
    jobs          a file (.jsonl, .csv, .yaml, .txt), or jobs themselves, as `Job` or as mappings; None for those alone
                  that were added to the folder
    defaults      what every job has that does not say otherwise
    max_batch     how many clips are rendered at once where memory is not known to hold fewer
    skip_bad      go on without jobs that are wrong, in place of raising `BadJobs`
    retry_failed  try those again that failed in an earlier run
    retries       how often a job is tried again that a process died of
    timeout       seconds that a clip may take; left out, many times what others of its shape took
    wait          stay when all is done, for jobs that are added
    verify        read clips that are done whole, and render those again that are not
    dtype         of the weights; bfloat16 where left out, on a CPU float32
    device        cuda where there is one and this is left out, else cpu
    offload       what is on the device only while it computes: "text", the text encoders; "model", every model of the
                  pipeline; "group", every layer
    vae_tiling    decode in tiles, for memory: not quite the same pixels
    compile       compile the model's blocks
    attention     "auto": every layer attends by what is fastest for its shape
    recipe        by which clips are made that have no other, or its file: an approximation
    trust         the name of the model, for one that brings code of its own
    ray           render on every GPU of a Ray cluster: its host:port, "auto" for the one that this machine is part of,
                  or "local" for one of this machine alone, unless this process is part of one already; the model is a
                  folder or a name then, and every node sees the same folders
    actors        how many of its devices to ask for; all its GPUs where left out, or one CPU where it has none
    gpus_per_clip over how many GPUs every clip is divided, with ray; started by torchrun, over all of its processes,
                  of which the first one alone reports
    same_process  render in this process, and not in one of its own, which is replaced where it hangs or dies; so does a
                  pipeline that was handed over
    bars          the process that loads the model may show how that goes
    listener      is told of everything that happens
    plan_only     check and list the jobs, and neither render nor keep anything
    like          another folder, by whose clips a plan says how long these will take

    In float32 a clip is the same, but for roundings, whatever it is rendered with, in whatever order, after whatever
    restart.
    In bfloat16 another batch size rounds differently: there, `max_batch=1` gives the same clip every time.
    """
    require("render")
    _check(max_batch, retries, timeout)
    form = Form(kind=format, fps=24.0 if fps is None else fps, crf=crf)
    known = None if model is None else described(model, trust=None if trust != str(model) else trust)
    if known is None and wait:
        raise wrong("model", None, "one to wait with")
    ranks = together.check(gpus_per_clip, ray, known)
    _check_ray(known, ray, actors)
    started = ranks > 1 and ray is None
    device = device_of(device) if started else device
    loading = Loading(dtype, device, offload, vae_tiling, compile, attention, ranks)
    if known is not None and known.pipe is not None:
        loading.check_handed_over()
    others = together.Started(device) if started else None
    if others is not None and not others.first:
        others.follow()
        return Report(done=0, failed=0, waiting=0, bad=0, rendered=0, seconds=0.0)
    by = taken(recipe)
    events = Events(listener, by if by is not None or known is None else known.recipe)
    formed = form.told(with_fps=fps is not None)
    parts = Parts(None if known is None else Part(known, loading, form), _maker(known, loading, form, trust))
    usual = over({} if by is None else {"recipe": by.to_dict()}, defaults or {})
    planning = Planning(parts, usual, formed, events.tell)
    began = time.monotonic()

    def report(counts: Mapping[str, int], rendered: int = 0, *, interrupted: bool = False) -> Report:
        told = Report.of(counts, planning.bad, rendered, time.monotonic() - began, interrupted=interrupted)
        events.tell("ended", **dataclasses.asdict(told), code=told.code)
        return told

    try:
        with Store(Path(out), retries=retries, adopt=identity_in) as store:
            rendering = Rendering(
                store,
                planning,
                Limits(timeout, events.tell),
                events,
                max_batch=max_batch,
                ahead=256 if offload == TEXT else 0,
                footprint=loading.footprint,
                stays=wait,
            )
            rendering.recover()
            counts = planning.plan(store, jobs, skip_bad=skip_bad, keep=not plan_only, like=like)
            parts.check_trust(trust)
            if plan_only:
                return report(counts)
            planning.take_in(store)
            if retry_failed:
                store.retry_failed()
            if verify:
                planning.verify(store)
            if store.waiting() or store.elsewhere() or wait:
                crews = Crews(store, parts, events.tell, loading, form, fps is None, bars, same_process, others)
                rendering.work(lambda name: crews.of(name, ray, actors), next(iter(parts.models)))
            rendering.page()
            return report(store.counts(), rendering.rendered, interrupted=rendering.interrupts > 0)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"output folder {out}: {type(error).__name__}: {error}; what is done is kept") from error
    finally:
        if others is not None:
            others.end()


@dataclass(frozen=True)
class Crews:
    """Who renders a run's jobs: one crew after another, each for one model."""

    store: Store
    parts: Parts
    tell: Callable[..., None]
    loading: Loading
    form: Form
    own_fps: bool
    bars: bool
    same_process: bool
    others: together.Started | None

    def of(self, name: str, ray: str | None, actors: int | None) -> Crew:
        """That of a model, on a cluster or here."""
        gc.collect()  # what there is of a model before this one
        model = self.parts.of(name).model
        setup = Setup(model, self.form, self.own_fps, self.loading)
        if ray is not None:
            from stgfast.render.actors import Actors

            return Actors(setup, self.store.scratch, ray, actors, self.tell)
        self.tell("loading", model=model.name)
        if model.pipe is None and not self.same_process and self.others is None:
            return OwnProcess(setup, self.store, self.tell, bars=self.bars)
        self.store.renders_within()
        if self.others is not None:
            return self.others.worker(setup, self.store.scratch)
        return setup.worker(self.store.scratch)


def _maker(known: Model | None, loading: Loading, form: Form, trust: str | None) -> Callable[[str], Part]:
    """What makes the part of a model that a job names."""

    def make(name: str) -> Part:
        if known is not None and known.pipe is not None:
            raise wrong("model", name, "none: a pipeline was handed over")
        return Part(described(name, trust=trust if trust == name else None), loading, form)

    return make


def _check_ray(model: Model | None, ray: str | None, actors: int | None) -> None:
    if ray is not None or actors is not None:
        from stgfast.render.actors import check

        check(model, ray, actors)


def _check(max_batch: object, retries: object, timeout: object) -> None:
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise wrong("max_batch", max_batch, "a number of clips, 1 or more")
    if isinstance(retries, bool) or not isinstance(retries, int) or not 1 <= retries <= 100:
        raise wrong("retries", retries, "a number from 1 to 100")
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise wrong("timeout", timeout, "seconds, more than 0")
