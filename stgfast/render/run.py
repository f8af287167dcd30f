"""A run: check jobs, add them to the folder, render them and record the results, until nothing waits."""

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
    """The result of a run. Counts are for all its jobs, whichever run rendered them."""

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
        """A report from numbers of jobs by status."""
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
        """The exit code: 0 all is done, 1 something failed or was skipped, 130 interrupted."""
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
    """Render jobs into a folder. Clips that are there already are not rendered again.

    In float32 a clip is the same up to rounding, whatever batch, order or restart it was rendered in.

    Args:
        model: a pipeline, guided or not, or the folder or hub name of one. None: each job names its model.
        jobs: a file (.jsonl, .csv, .yaml, .txt), or a list of `Job` or mappings. None: only jobs that were added to the
            folder.
        out: the folder.
        format: `"mp4"`, `"gif"`, `"png"` or `"npz"`.
        fps: frames per second. Default: those of the model.
        crf: the quality of MP4; lower is better.
        defaults: settings of all jobs that do not have their own.
        max_batch: the number of clips in one batch, if it is not known whether memory holds more.
        skip_bad: skip invalid jobs. Default: raise `BadJobs`.
        retry_failed: retry jobs that failed in an earlier run.
        retries: how often to retry a job whose worker process died.
        timeout: the seconds that a clip may take. Default: a multiple of what clips of this shape took.
        wait: keep running when all jobs are done, for jobs that are added.
        verify: decode all finished clips, and render damaged ones again.
        dtype: the type of the weights. Default: bfloat16, or float32 on a CPU.
        device: default: CUDA if there is a GPU, else CPU.
        offload: what is on the device only while it computes: `"text"` (text encoders), `"model"` (each model of the
            pipeline) or `"group"` (each layer).
        vae_tiling: decode in tiles, which needs less memory. Pixels differ slightly.
        compile: compile the model's blocks.
        attention: `"auto"`, as for `accelerate`.
        recipe: the recipe for jobs that have none, or its path. An approximation.
        trust: the name of the model, if it has code of its own that may run.
        ray: render on all GPUs of a Ray cluster: its `host:port`, `"auto"` (the cluster of this machine) or `"local"`
            (a new one on this machine). The model must be a folder or a name, and all nodes must see the same folders.
        actors: the number of Ray actors. Default: one for each GPU, or one if there are only CPUs.
        gpus_per_clip: the number of GPUs that share one clip, with `ray` or under torchrun.
        same_process: render in this process. Default: in a child process, which is replaced if it hangs or dies. A
            pipeline object is always rendered in this process.
        bars: whether the process that loads the model may show progress bars.
        listener: called with each event.
        plan_only: check and list the jobs only. Nothing is written.
        like: another folder: the plan estimates times by its clips.

    Returns:
        A report: the number of jobs done, skipped and failed, and the exit code.

    Raises:
        SettingsError: a setting is wrong. It is raised before anything is rendered.
        BadJobs: jobs are invalid, with all of them listed.

    Example:
        >>> jobs = [{"prompt": "a red kite", "seed": seed} for seed in range(4)]
        >>> report = stgfast.render(pipe, jobs, "clips")  # doctest: +SKIP
        >>> report.done  # doctest: +SKIP
        4
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
    formed = form.in_words(with_fps=fps is not None)
    parts = Parts(None if known is None else Part(known, loading, form), _maker(known, loading, form, trust))
    usual = over({} if by is None else {"recipe": by.to_dict()}, defaults or {})
    planning = Planning(parts, usual, formed, events.tell)
    began = time.monotonic()

    def report(counts: Mapping[str, int], rendered: int = 0, *, interrupted: bool = False) -> Report:
        outcome = Report.of(counts, planning.bad, rendered, time.monotonic() - began, interrupted=interrupted)
        events.tell("ended", **dataclasses.asdict(outcome), code=outcome.code)
        return outcome

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
        raise StoreError(f"output folder {out}: {type(error).__name__}: {error}; finished clips are kept") from error
    finally:
        if others is not None:
            others.end()


@dataclass(frozen=True)
class Crews:
    """The crews of a run, one after another, each for one model."""

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
        """The crew for a model, on a cluster or here."""
        model = self.parts.of(name).model
        setup = Setup(model, self.form, self.own_fps, self.loading)
        if ray is not None:
            from stgfast.render.actors import Actors

            return Actors(setup, self.store.scratch, ray, actors, self.tell)
        self.tell("loading", model=model.name)
        if model.pipe is None and not self.same_process and self.others is None:
            return OwnProcess(setup, self.store, self.tell, bars=self.bars)
        self.store.renders_within()
        if model.pipe is None:
            gc.collect()  # this process loads a model: release the previous one first
        if self.others is not None:
            return self.others.worker(setup, self.store.scratch)
        return setup.worker(self.store.scratch)


def _maker(known: Model | None, loading: Loading, form: Form, trust: str | None) -> Callable[[str], Part]:
    """A function that makes the part of a model that a job names."""

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
