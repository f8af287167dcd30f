"""The work of a run: hand out batches and record results, until nothing waits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stgfast.errors import DeviceError, SettingsError, UnsupportedPipelineError, one_line
from stgfast.queue.batches import Task, shape_of
from stgfast.queue.state import CANCELLED, DONE, FAILED, PAUSED
from stgfast.queue.store import Store
from stgfast.render.crew import Crew, Seat
from stgfast.render.events import Event, Events
from stgfast.render.gallery import NAME, write_gallery
from stgfast.render.limits import Limits
from stgfast.render.outcomes import Again, Died, Expired, Failed, Outcome, Written, tasks_of
from stgfast.render.planning import Planning

PAGE = 60.0  # seconds between new versions of the page about the folder
POLL = 0.5  # seconds between checks of other runners
LOOK = 1.0  # seconds between checks of requests and progress
ENDING = 5.0  # seconds for batches to abort when a run stops at once


class Rendering:
    """One run, responsible for what it has claimed in a folder.

    Attributes:
        ahead: the number of later prompts that are encoded with those of a batch.
        footprint: a key for how many clips fit into memory, beside the device and their shape.
        stays: keep running when all is done, for jobs that are added.
    """

    def __init__(
        self,
        store: Store,
        planning: Planning,
        limits: Limits,
        events: Events,
        *,
        max_batch: int,
        ahead: int,
        footprint: str,
        stays: bool,
    ):
        self.store, self.planning, self.limits, self.events = store, planning, limits, events
        self.tell = events.tell
        self.max_batch, self.ahead, self.footprint, self.stays = max_batch, ahead, footprint, stays
        self.where: dict[int, Event] = {}  # claimed jobs
        self.fits: set[tuple[str, str]] = set()  # models and shapes of rendered clips
        self.model = ""  # that is loaded
        self.claimed = self.ending = False  # a batch was claimed; no further model is loaded
        self.rendered = self.interrupts = 0
        self.signal = ""  # a signal that was not reported yet
        self.paused = False
        self.fault: BaseException | None = None
        self.paged = time.monotonic()
        self.looked = 0.0
        self.since = 0.0  # when the last clip was finished, or the first batch claimed

    def recover(self) -> None:
        recovered = self.store.recover()
        if recovered:
            self.tell("recovered", jobs=recovered)

    def work(self, crew_for: Callable[[str], Crew], first: str) -> None:
        """Render one model after another until nothing waits that this run may render, and other runners have
        finished theirs or died.

        `first` is the model to load if no job waits for one.
        """
        while not self.ending and (self.store.waiting() or self.stays or self.store.elsewhere()):
            self.model, self.claimed = self.store.next_model() or first, False
            self.store.begin(self.model)
            try:
                self._work(crew_for(self.model))
            except (SettingsError, UnsupportedPipelineError, DeviceError) as error:
                if self.claimed or self.interrupts or not self._give_up_model(str(error)):
                    raise
                self.fault, self.ending = None, False

    def _give_up_model(self, error: str) -> bool:
        """Fail all jobs of a model that cannot be loaded, unless it is the run's only one."""
        files = [] if len(self.planning.parts.models) < 2 else self.store.fail_waiting(self.model, error)
        for file in files:
            self.tell("failed", file=file, error=error, **self._progress())
        return bool(files)

    def _work(self, crew: Crew) -> None:
        """Render until no job waits for the loaded model."""
        try:
            with self._interruptible(crew):
                while not crew.aborting:
                    self._tell_of_signal()
                    self._look(crew)
                    self._hand_out(crew)
                    if not self._goes_on(crew):
                        break
                    if time.monotonic() - self.paged > PAGE:
                        self.page()
                self._tell_of_signal()
        except BaseException:
            crew.abort()
            raise
        finally:
            crew.close(ENDING)
        self.ending = crew.stopping
        if isinstance(self.fault, (OSError, SettingsError, UnsupportedPipelineError, DeviceError)):
            raise self.fault
        if self.fault is not None:
            why = one_line(self.fault)
            raise DeviceError(f"the device or its worker failed ({why}); finished clips are kept") from self.fault

    def _goes_on(self, crew: Crew) -> bool:
        """Wait a moment for an outcome. Returns whether this crew has anything to do."""
        if crew.busy or (not crew.stopping and self.store.waiting(self.model)):
            self._settle(crew.outcome(0.1), crew)  # short, so that requests to stop are noticed
            return True
        if crew.stopping or self.store.waiting():  # for another model
            return False
        if self.stays or self.store.elsewhere():
            self._settle(crew.outcome(POLL), crew)
            self.recover()
            return True
        self.planning.take_in(self.store)  # jobs added since the last check
        return self.store.waiting() > 0

    def _hand_out(self, crew: Crew) -> None:
        while not (crew.stopping or self.paused) and any(
            self._claim(seat, others=crew.places > 1) for seat in crew.free()
        ):
            pass

    def _claim(self, seat: Seat, *, others: bool) -> bool:
        """Claim a batch for a seat. Returns whether there was one."""
        device = seat.device_name + self.footprint
        batch = self.store.claim(
            self.max_batch, device, model=self.model, idle=seat.idle, place=seat.place, others=others
        )
        if batch is None:
            return False
        self.claimed = True
        batch = self.limits.on(batch, self.store)
        if not self.where:
            self.since = time.monotonic()
        self.where.update({task.id: seat.where for task in batch.tasks})
        self.tell("claimed", files=[task.file for task in batch.tasks], **seat.where)
        seat.start(batch, self.store.waiting_prompts(self.ahead, self.model) if self.ahead else ())
        return True

    def _look(self, crew: Crew) -> None:
        """Once per second: read what was asked of the folder, and record the progress of batches."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        self.planning.take_in(self.store)
        paused = bool(self.store.setting(PAUSED))
        if paused != self.paused:
            self.paused = paused
            self.tell("paused" if paused else "resumed")
        progress = crew.progress()
        self.store.record(
            (task.id, each.stage, each.step, each.steps, round(each.seconds, 1), self.where[task.id].get("device", ""))
            for each in progress
            for task in each.batch.tasks
            if task.id in self.where
        )
        self.limits.enforce(crew, progress, self.store.cancelled(self.where))

    def _settle(self, outcome: Outcome | None, crew: Crew) -> None:
        """Record the results of jobs."""
        if outcome is None:
            return
        store = self.store
        tasks = tasks_of(outcome)
        where: Event = {}
        for task in tasks:
            where = self.where.pop(task.id, {})
            self.limits.settled(task)
        if isinstance(outcome, Written):
            self._written(outcome, where)
        elif isinstance(outcome, Failed):
            self._failed(outcome.task, outcome.error, outcome.seconds, trace=outcome.trace, **where)
            self._fail_alike(outcome, crew)
        elif isinstance(outcome, Again):
            self._again(outcome, where)
        elif isinstance(outcome, Expired):
            if len(tasks) == 1:
                self._failed(tasks[0], outcome.why, {}, **where)
            else:  # one of them may be the cause
                self._again(Again(tasks, outcome.why, apart=True), where)
        elif isinstance(outcome, Died):
            failed = store.died(tasks, outcome.why, outcome.place)
            self.tell("died", files=[task.file for task in tasks], why=outcome.why, **where)
            for task, error in failed:
                self.tell("failed", file=task.file, error=error, **where, **self._progress())
        else:
            store.give_back(tasks)
            if outcome.error is not None and self.fault is None:
                self.fault = outcome.error
                crew.stop()
                self.tell("stopping", why=f"{type(outcome.error).__name__}: {outcome.error}")

    def _written(self, outcome: Written, where: Event) -> None:
        task, seconds = outcome.task, outcome.seconds
        now = time.monotonic()
        more = {"form": self.planning.formed, "remark": outcome.remark}
        status, why = self.store.finish(task, outcome.path, seconds, wall=now - self.since, **more)
        self.since = now
        if status == DONE:
            self.rendered += 1
            self.fits.add((task.model, shape_of(task.job)))
            self.tell("done", file=task.file, seconds=seconds, **where, **self._progress())
            if outcome.remark:
                self.tell("strange", file=task.file, remark=outcome.remark)
        elif status == CANCELLED:
            self.tell("cancelled", file=task.file, **where, **self._progress())
        else:
            self.tell("failed", file=task.file, error=why, **self._progress())

    def _again(self, outcome: Again, where: Event) -> None:
        if outcome.rows:
            self.store.bound(outcome.shape, outcome.rows)
        self.store.give_back(outcome.tasks, apart=outcome.apart, error=outcome.why)
        files = [task.file for task in outcome.tasks]
        self.tell("again", files=files, why=outcome.why, rows=outcome.rows, apart=outcome.apart, **where)

    def _failed(self, task: Task, error: str, seconds: Mapping[str, float], **more: Any) -> None:
        if self.store.fail(task, error, seconds):
            self.tell("failed", file=task.file, error=error, **more, **self._progress())
        else:
            self.tell("cancelled", file=task.file, **self._progress())

    def _fail_alike(self, failed: Failed, crew: Crew) -> None:
        """Fail jobs of a shape that does not fit into memory, if none of that shape was rendered."""
        model, shape = failed.task.model, shape_of(failed.task.job)
        if not failed.memory or not crew.alike or (model, shape) in self.fits:
            return
        error = f"not tried: as large as {failed.task.file}, which did not fit into memory"
        files = self.store.fail_waiting(model, error, shape)
        progress = self._progress()
        for file in files:
            self.tell("failed", file=file, error=error, **progress)

    def _progress(self) -> Event:
        counts = self.store.counts()
        finished = counts[DONE] + counts[FAILED] + counts[CANCELLED]
        return {"total": sum(counts.values()), "finished": finished}

    @contextmanager
    def _interruptible(self, crew: Crew) -> Iterator[None]:
        """Within the block, the first signal finishes current batches, and the second one aborts them."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupts += 1
            if self.interrupts == 1:
                self.signal = signal.Signals(number).name
                crew.stop()
            else:
                crew.abort()

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread handles signals
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell_of_signal(self) -> None:
        """Report a signal outside its handler: it may have interrupted the listener, which must not be called within
        itself.
        """
        name, self.signal = self.signal, ""
        if name:
            self.tell("stopping", why=name)

    def page(self) -> None:
        """Write the page about the folder. It is not needed for clips to be done."""
        try:
            rows = self.store.rows(every=True)
            write_gallery(self.store.out, rows, self.store.scratch / NAME, note=self.events.note)
        except OSError as error:
            self.tell("page", error=str(error))
        self.paged = time.monotonic()
