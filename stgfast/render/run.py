"""A run: jobs are checked and taken up, batches rendered, and what became of them is recorded, until nothing waits."""

from __future__ import annotations

import dataclasses
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from stgfast.errors import DeviceError, SettingsError, wrong
from stgfast.extras import require
from stgfast.ranks.wire import device_of
from stgfast.recipes import Recipe, taken
from stgfast.render import together
from stgfast.render.batches import shape_of
from stgfast.render.crew import Crew, Setup
from stgfast.render.files import Form
from stgfast.render.gallery import NAME, write_gallery
from stgfast.render.jobs import Bad, Job, Line, checked, read
from stgfast.render.loading import TEXT, Loading
from stgfast.render.models import Model, described
from stgfast.render.store import DONE, FAILED, PENDING, Store, StoreError
from stgfast.render.worker import Again, Died, Failed, Outcome, Written

Event = dict[str, Any]
Listener = Callable[[Event], None]
SHOWN = 1000  # bad lines that are kept for the report; all are told to the listener
PAGE = 60.0  # seconds between new versions of the page about the folder
POLL = 0.5  # seconds between looks at what other runners do
ENDING = 5.0  # seconds that batches have to put themselves down when a run stops at once


class BadJobs(SettingsError):
    """Lines of a job file that cannot be rendered. Nothing was taken up."""

    def __init__(self, lines: list[Bad], count: int):
        self.lines, self.count = lines, count
        first = "; ".join(f"line {line.number}: {line.why}" for line in lines[:3])
        super().__init__(f"jobs: got {count} bad line{'s' * (count > 1)}, expected none ({first})")


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

    @property
    def code(self) -> int:
        """For the shell: 0 all is done, 1 something failed or was left out, 130 interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failed or self.bad or self.waiting else 0


def render(
    model: Any,
    jobs: str | Path | Iterable[Job | Mapping[str, Any]],
    out: str | Path,
    *,
    format: str = "mp4",
    fps: float | None = None,
    crf: int = 18,
    defaults: Mapping[str, Any] | None = None,
    max_batch: int = 8,
    skip_bad: bool = False,
    retry_failed: bool = False,
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
    listener: Listener | None = None,
    plan_only: bool = False,
) -> Report:
    """Render jobs into a folder; what is there already is not rendered again.

    model         a pipeline, guided or not; or the folder or hub name of one
    jobs          a file (.jsonl, .csv, .yaml, .txt), or jobs themselves, as `Job` or as mappings
    defaults      what every job has that does not say otherwise
    max_batch     how many clips are rendered at once where memory is not known to hold fewer
    skip_bad      go on without jobs that are wrong, in place of raising `BadJobs`
    retry_failed  try those again that failed in an earlier run
    dtype         of the weights; bfloat16 where left out, on a CPU float32
    device        cuda where there is one and this is left out, else cpu
    offload       what is on the device only while it computes: "text", the text encoders; "model", every model of the
                  pipeline; "group", every layer
    vae_tiling    decode in tiles, for memory: not quite the same pixels
    compile       compile the model's blocks
    attention     "auto": every layer attends by what is fastest for its shape
    recipe        by which all clips are made, or its file: an approximation
    trust         the name of the model, for one that brings code of its own
    ray           render on every GPU of a Ray cluster: its host:port, "auto" for the one that this machine is part of,
                  or "local" for one of this machine alone, unless this process is part of one already; the model is a
                  folder or a name then, and every node sees the same folders
    actors        how many of its devices to ask for; all its GPUs where left out, or one CPU where it has none
    gpus_per_clip over how many GPUs every clip is divided, with ray; started by torchrun, over all of its processes,
                  of which the first one alone reports
    listener      is told of everything that happens
    plan_only     check and take up the jobs, and render nothing

    In float32 a clip is the same, but for roundings, whatever it is rendered with, in whatever order, after whatever
    restart.
    In bfloat16 another batch size rounds differently: there, `max_batch=1` gives the same clip every time.
    """
    require("render")
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise wrong("max_batch", max_batch, "a number of clips, 1 or more")
    form = Form(kind=format, fps=24.0 if fps is None else fps, crf=crf)
    known = described(model, trust=trust)
    ranks = together.check(gpus_per_clip, ray, known)
    if ray is not None or actors is not None:
        from stgfast.render.actors import Actors, check

        check(known, ray, actors)
    started = ranks > 1 and ray is None
    device = device_of(device) if started else device
    loading = Loading(dtype, device, offload, vae_tiling, compile, taken(recipe), attention, ranks)
    if known.pipe is not None:
        loading.check_handed_over()
    setup = Setup(known, form, fps is None, loading)
    others = together.Started(device) if started else None
    if others is not None and not others.first:
        others.follow(setup)
        return Report(done=0, failed=0, waiting=0, bad=0, rendered=0, seconds=0.0)
    run = Run(known, Path(out), form, loading, listener or (lambda event: None))
    began = time.monotonic()
    try:
        with Store(run.out) as store:
            run.store = store
            run.recover()
            run.plan(lines_of(jobs, {**known.defaults_with(run.recipe), **(defaults or {})}), skip_bad)
            if retry_failed:
                store.retry_failed()
            if not plan_only and (store.counts()[PENDING] or store.elsewhere()):
                if ray is None:
                    run.tell("loading", model=known.name)
                    scratch = store.scratch
                    crew: Crew = setup.worker(scratch) if others is None else others.worker(setup, scratch)
                else:
                    crew = Actors(setup, store.scratch, ray, actors, run.tell)
                run.work(crew, max_batch, ahead=256 if offload == TEXT else 0)
            if not plan_only:
                run.page()
            return run.report(time.monotonic() - began)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"output folder {out}: {type(error).__name__}: {error}; what is done is kept") from error
    finally:
        if others is not None:
            others.end()


def lines_of(
    jobs: str | Path | Iterable[Job | Mapping[str, Any]], defaults: Mapping[str, Any] | None
) -> Iterator[Line | Bad]:
    if isinstance(jobs, (str, Path)):
        yield from read(Path(jobs), defaults=defaults)
        return
    given: Iterable[object] = jobs
    for number, job in enumerate(given, 1):
        if isinstance(job, Job):
            yield Line(number, (job,))
        elif isinstance(job, Mapping):
            yield checked(number, job, base=Path(), defaults=defaults)
        else:
            yield Bad(number, str(wrong("job", type(job).__name__, "a Job, or a mapping with its fields")))


def _nobody(event: Event) -> None:
    pass


class Run:
    """One process in charge of one folder, and of who renders for it."""

    store: Store

    def __init__(self, model: Model, out: Path, form: Form, loading: Loading, listener: Listener):
        self.model, self.out, self.form, self.loading, self.listener = model, out, form, loading, listener
        self.made, self.recipe = model.made(loading), model.recipe_of(loading)
        self.where: dict[int, Event] = {}  # jobs in hand
        self.fits: set[str] = set()  # shapes that clips were rendered of
        # For the page.
        self.note = "" if self.recipe is None else f"Made by a recipe, approximately: {self.recipe}."
        self.bad = self.rendered = self.interrupts = 0
        self.signal = ""  # that came, and was not told of yet
        self.fault: BaseException | None = None
        self.paged = time.monotonic()

    def tell(self, event: str, **more: Any) -> None:
        try:
            self.listener({"event": event, **more})
        except BrokenPipeError:  # whoever read what is printed went away, as `| head` does: the night goes on
            self.listener = _nobody
            self.note = f"{self.note} Nobody reads the output of the run any more; it went on.".strip()

    def recover(self) -> None:
        recovered = self.store.recover()
        if recovered:
            self.tell("recovered", jobs=recovered)

    # Planning

    def plan(self, lines: Iterable[Line | Bad], skip_bad: bool) -> None:
        """Check every line; then take all of them up, or none."""
        kept: list[Bad] = []
        with self.store.taking_up(self.model.name, self._staged(lines), self.made) as wrong_lines:
            for line in wrong_lines:
                self.bad += 1
                if len(kept) < SHOWN:
                    kept.append(line)
                self.tell("bad", line=line.number, error=line.why)
            if kept and not skip_bad:
                raise BadJobs(kept, self.bad)
        self.tell("planned", **self.store.counts(), bad=self.bad)

    def _staged(self, lines: Iterable[Line | Bad]) -> Iterator[Bad]:
        for line in lines:
            if isinstance(line, Bad):
                yield line
                continue
            for job in line.jobs:
                try:
                    self.model.check(job)
                    named = self.model.settled(job, self.recipe).named(self.model.name, self.made)
                except SettingsError as error:
                    yield Bad(line.number, str(error))
                    break
                self.store.stage(named, self.form.file(named.name), line.number, self.model.images)

    # Rendering

    def work(self, crew: Crew, max_batch: int, ahead: int) -> None:
        """Until nothing waits that this run may render; then until other runners have done theirs, or died."""
        try:
            with self._interruptible(crew):
                while not crew.aborting:
                    self._tell_of_signal()
                    self._hand_out(crew, max_batch, ahead)
                    if crew.busy or (not crew.stopping and self.store.counts()[PENDING]):
                        self._settle(crew.outcome(0.1), crew)  # in time for a look at whether the run is to stop
                    elif crew.stopping or not self.store.elsewhere():
                        break
                    else:
                        self._settle(crew.outcome(POLL), crew)
                        self.recover()
                    if time.monotonic() - self.paged > PAGE:
                        self.page()
                self._tell_of_signal()
        except BaseException:
            crew.abort()
            raise
        finally:
            crew.close(ENDING)
        if isinstance(self.fault, (OSError, SettingsError, DeviceError)):
            raise self.fault
        if self.fault is not None:
            said = f"{type(self.fault).__name__}: {self.fault}"
            raise DeviceError(
                f"the device, or the worker on it, gave out ({said}); what is done is kept"
            ) from self.fault

    def _hand_out(self, crew: Crew, max_batch: int, ahead: int) -> None:
        while not crew.stopping and (seat := crew.free()) is not None:
            batch = self.store.claim(max_batch, seat.device_name + self.loading.footprint)
            if batch is None:
                return
            self.where.update({task.id: seat.where for task in batch.tasks})
            self.tell("claimed", files=[task.file for task in batch.tasks], **seat.where)
            seat.start(batch, self.store.waiting_prompts(ahead) if ahead else ())

    def _settle(self, outcome: Outcome | None, crew: Crew) -> None:
        """Record what became of jobs."""
        if outcome is None:
            return
        store = self.store
        tasks = (outcome.task,) if isinstance(outcome, (Written, Failed)) else outcome.tasks
        where: Event = {}
        for task in tasks:
            where = self.where.pop(task.id, {})
        if isinstance(outcome, Written):
            task = outcome.task
            if store.finish(task, outcome.path, outcome.seconds):
                self.rendered += 1
                self.fits.add(shape_of(task.job))
                self.tell("done", file=task.file, seconds=outcome.seconds, **where, **self._progress())
            else:
                self.tell("failed", file=task.file, error="its name was taken meanwhile", **self._progress())
        elif isinstance(outcome, Failed):
            store.fail(outcome.task, outcome.error, outcome.seconds)
            more = {"error": outcome.error, "trace": outcome.trace, **where}
            self.tell("failed", file=outcome.task.file, **more, **self._progress())
            self._fail_alike(outcome, crew)
        elif isinstance(outcome, Again):
            if outcome.rows:
                store.bound(outcome.shape, outcome.rows)
            store.give_back(tasks, apart=outcome.apart, error=outcome.why)
            files = [task.file for task in tasks]
            self.tell("again", files=files, why=outcome.why, rows=outcome.rows, apart=outcome.apart, **where)
        elif isinstance(outcome, Died):
            failed = store.died(tasks, outcome.why)
            self.tell("died", files=[task.file for task in tasks], why=outcome.why, **where)
            for task, error in failed:
                self.tell("failed", file=task.file, error=error, **where, **self._progress())
        else:
            store.give_back(tasks)
            if outcome.error is not None and self.fault is None:
                self.fault = outcome.error
                crew.stop()
                self.tell("stopping", why=f"{type(outcome.error).__name__}: {outcome.error}")

    def _fail_alike(self, failed: Failed, crew: Crew) -> None:
        """Where there is no memory for a job, no night is spent on others of its shape, of which none was rendered."""
        shape = shape_of(failed.task.job)
        if not failed.memory or not crew.alike or shape in self.fits:
            return
        error = f"not tried: as large as {failed.task.file}, which there is no memory for"
        files = self.store.fail_waiting(shape, error)
        progress = self._progress()
        for file in files:
            self.tell("failed", file=file, error=error, **progress)

    def _progress(self) -> Event:
        counts = self.store.counts()
        return {"total": sum(counts.values()), "finished": counts[DONE] + counts[FAILED]}

    @contextmanager
    def _interruptible(self, crew: Crew) -> Iterator[None]:
        """Within the block, the first signal to end lets batches in hand finish, and the second one does not."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupts += 1
            if self.interrupts == 1:
                self.signal = signal.Signals(number).name
                crew.stop()
            else:
                crew.abort()

        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell_of_signal(self) -> None:
        """Not within the signal: what that interrupts may be the listener, which would be called within itself."""
        name, self.signal = self.signal, ""
        if name:
            self.tell("stopping", why=name)

    def page(self) -> None:
        """The page about the folder, as it stands. Clips that are done are done without it."""
        try:
            write_gallery(self.out, self.store.rows(every=True), self.store.scratch / NAME, note=self.note)
        except OSError as error:
            self.tell("page", error=str(error))
        self.paged = time.monotonic()

    def report(self, seconds: float) -> Report:
        counts = self.store.counts()
        waiting = sum(counts.values()) - counts[DONE] - counts[FAILED]
        report = Report(
            done=counts[DONE],
            failed=counts[FAILED],
            waiting=waiting,
            bad=self.bad,
            rendered=self.rendered,
            seconds=round(seconds, 3),
            interrupted=self.interrupts > 0,
        )
        self.tell("ended", **dataclasses.asdict(report))
        return report
