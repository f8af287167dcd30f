"""The state of an output folder for a run, which claims jobs and records their results.

The kernel says who is alive: a runner holds a lock on its own file, which ends with the process however that ends. No
clock decides anything. A clip goes from `claimed` over `publishing` (written to a temporary place, about to be renamed)
to `done`. If a runner dies in between, the next one finishes the rename or releases the job.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stgfast.queue.batches import Batch, Task
from stgfast.queue.job import Job
from stgfast.queue.placing import discard, publish, size_of
from stgfast.queue.state import (
    CANCELLED,
    DONE,
    FAILED,
    PACKED,
    PAUSED,
    PUBLISHING,
    STATUSES,
    StoreError,
    lock_of_dead,
    locked,
)
from stgfast.queue.taking import Taking, trusted

RETRIES = 2  # of a job whose process died, or whose device failed
WITHIN = "within"  # marks a runner that renders in its own process: a job may kill it
ORDER = "deaths, priority DESC, apart, stack, jobs.id"  # the order in which jobs start
WAITS = "status = 'pending' AND NOT paused AND jobs.id IN mine"


@dataclass(frozen=True)
class Row:
    """One job and its status."""

    file: str
    status: str
    attempts: int
    line: int
    job: Job
    seconds: Mapping[str, float]
    error: str | None
    model: str
    remark: str = ""

    @classmethod
    def of(cls, row: sqlite3.Row) -> Row:
        """A row from the list of the folder."""
        return cls(
            file=row["file"],
            status=row["status"],
            attempts=row["attempts"],
            line=row["line"],
            job=trusted(row["job"]),
            seconds=json.loads(row["seconds"] or "{}"),
            error=row["error"],
            model=row["model"],
            remark=row["remark"] or "",
        )


class Store(Taking):
    """One run's view of an output folder, as a context manager: within it, this process is a living runner.

    Attributes:
        retries: how often a job is retried after its process died.
        adopt: what a clip says it was made from, as `Job.identity`, or None.
    """

    def __init__(self, out: Path, *, retries: int = RETRIES, adopt: Callable[[Path], str | None] | None = None):
        super().__init__(out)
        self.retries, self.adopt = retries, adopt or (lambda path: None)
        self.runner = uuid.uuid4().hex
        self.scratch = self.home / self.runner

    def __enter__(self) -> Store:
        self.make_home()
        try:
            with self._registering():
                self.scratch.mkdir()
                self.lock = locked(self.scratch / "lock")
        except OSError as error:
            raise StoreError(f"output folder {self.out}: {error}") from error
        try:
            self.connect()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if (self.home / "jobs.db").exists():  # the folder was not deleted meanwhile
                (self.scratch / WITHIN).unlink(missing_ok=True)  # a regular end: nothing died
                self.connection.execute("DELETE FROM runs WHERE runner = ?", (self.runner,))
                self._recover(self.runner)  # release what is claimed
        except (sqlite3.Error, OSError):
            if kind is None:
                raise  # otherwise the first error stands; the next runner finds this lock free, and does the same
        finally:
            self.connection.close()
            self._leave()

    def _leave(self) -> None:
        try:
            if self.home.is_dir():  # and was not deleted meanwhile
                with self._registering():
                    # An abandoned thread may still write there. The next runner clears what remains.
                    shutil.rmtree(self.scratch, ignore_errors=True)
        finally:
            os.close(self.lock)

    @contextmanager
    def _registering(self) -> Iterator[None]:
        """Register a runner and clear dead ones, one process at a time."""
        lock = locked(self.home / "lock", wait=True)
        try:
            yield
        finally:
            os.close(lock)

    def begin(self, model: str) -> None:
        """Record that this run is active with this model."""
        values = (self.runner, os.getpid(), socket.gethostname(), model, time.time())
        change = "INSERT INTO runs VALUES (?, ?, ?, ?, ?) ON CONFLICT (runner) DO UPDATE SET model = excluded.model"
        self.connection.execute(change, values)

    def renders_within(self) -> None:
        """Record that jobs are rendered in this process, and may kill it."""
        (self.scratch / WITHIN).touch()

    # Rendering

    def next_model(self) -> str | None:
        """The model of the first waiting job."""
        query = f"SELECT model FROM jobs WHERE {WAITS} ORDER BY {ORDER} LIMIT 1"
        found = self.connection.execute(query).fetchone()
        return None if found is None else str(found["model"])

    def claim(
        self, size: int, device: str, *, model: str = "", idle: bool = True, place: str = "", others: bool = False
    ) -> Batch | None:
        """Claim up to `size` waiting jobs that fit together; fewer if memory is known to hold fewer.

        A job that was being rendered when a process died comes last: if it is the cause, the others are done before. It
        then has a process for itself, first with similar jobs, and finally alone. If there is another place, it goes
        there.

        Args:
            model: their model; any if left out.
            idle: the asking process renders nothing else.
            place: the place of that process.
            others: there are other places.
        """
        if self.setting(PAUSED):
            return None
        with self.transaction():
            may = f"{WAITS} AND (model = ? OR ? = '') AND (deaths = 0 OR (? AND NOT (? AND place IS ?)))"
            asks = (model, model, idle, others, place)
            first = self.connection.execute(
                f"SELECT jobs.*, stacks.shape FROM jobs JOIN stacks ON stacks.id = stack WHERE {may} "
                f"ORDER BY {ORDER} LIMIT 1",
                asks,
            ).fetchone()
            if first is None:
                return None
            shape = f"{device}, {first['model']}: {first['shape']}"
            known = self.connection.execute("SELECT rows FROM shapes WHERE key = ?", (shape,)).fetchone()
            size = min(size, known["rows"]) if known else size
            rows = [first]
            if size > 1 and not first["apart"] and first["deaths"] < self._alone:
                rows = self.connection.execute(
                    f"SELECT * FROM jobs WHERE {may} AND deaths = ? AND NOT apart AND stack = ? AND priority = ? "
                    "AND model = ? ORDER BY id LIMIT ?",
                    (*asks, first["deaths"], first["stack"], first["priority"], first["model"], size),
                ).fetchall()
            ids = [(self.runner, row["id"]) for row in rows]
            claim = "UPDATE jobs SET status = 'claimed', runner = ?, attempts = attempts + 1 WHERE id = ?"
            self.connection.executemany(claim, ids)
        return Batch(tuple(_task(row) for row in rows), shape, lonely=first["deaths"] > 0)

    @property
    def _alone(self) -> int:
        """The number of deaths from which a job is rendered alone."""
        return min(2, self.retries)

    def slowest(self, model: str, shape: str) -> float | None:
        """The most seconds that a clip of this shape has taken in this folder."""
        query = "SELECT MAX(took) FROM jobs JOIN stacks ON stacks.id = stack WHERE status = 'done'"
        found = self.connection.execute(f"{query} AND model = ? AND shape = ?", (model, shape)).fetchone()[0]
        return None if found is None else float(found)

    def waiting_prompts(self, count: int, model: str) -> list[tuple[str, str | None]]:
        """The prompts and negative prompts of the next jobs, for encoding ahead."""
        query = f"SELECT job FROM jobs WHERE {WAITS} AND model = ? ORDER BY {ORDER} LIMIT ?"
        rows = self.connection.execute(query, (model, count))
        found = (json.loads(row["job"]) for row in rows)
        return list(dict.fromkeys((job["prompt"], job.get("negative_prompt")) for job in found))

    def finish(
        self,
        task: Task,
        aside: Path,
        seconds: Mapping[str, float],
        *,
        wall: float | None = None,
        form: str = "",
        remark: str = "",
    ) -> tuple[str, str]:
        """Make a written clip the job's output. Returns the job's status and the reason.

        The name is recorded before the move. It fails if another file has that name by now. A job that was cancelled
        meanwhile stays cancelled.
        """
        took, size = sum(seconds.values()), size_of(aside)
        values = {"seconds": json.dumps(seconds), "took": took, "wall": wall, "bytes": size}
        values |= {"form": form, "remark": remark}
        change = f"UPDATE jobs SET status = 'publishing', error = NULL, {', '.join(f'{name} = ?' for name in values)}"
        mine = (task.id, self.runner)
        if not self.connection.execute(f"{change} WHERE id = ? AND runner = ?", (*values.values(), *mine)).rowcount:
            discard(aside)
            return CANCELLED, "it was cancelled"
        try:
            publish(aside, self.out / task.file)
        except FileExistsError as error:
            discard(aside)
            why = f"{error.strerror}: {task.file}"
            self.fail(task, why, seconds)
            return FAILED, why
        done = "UPDATE jobs SET status = 'done', finished = ?, runner = NULL WHERE id = ?"
        self.connection.execute(done, (time.time(), task.id))
        return DONE, ""

    def fail(self, task: Task, error: str, seconds: Mapping[str, float]) -> bool:
        """Record a failure. Returns whether the job was still this run's: a cancelled one stays cancelled."""
        change = "UPDATE jobs SET status = 'failed', error = ?, seconds = ?, finished = ?, runner = NULL"
        values = (error, json.dumps(seconds), time.time(), task.id, self.runner)
        return self.connection.execute(f"{change} WHERE id = ? AND runner = ?", values).rowcount > 0

    def fail_waiting(self, model: str, error: str, shape: str = "") -> list[str]:
        """Fail the waiting jobs of this run with this model, and this shape if it is given, without trying them.
        Returns their files.
        """
        with self.transaction():
            rows = self.connection.execute(
                f"SELECT jobs.id, file FROM jobs JOIN stacks ON stacks.id = stack WHERE {WAITS} AND model = ? "
                "AND (shape = ? OR ? = '') ORDER BY jobs.id",
                (model, shape, shape),
            ).fetchall()
            change = "UPDATE jobs SET status = 'failed', error = ?, finished = ? WHERE id = ?"
            self.connection.executemany(change, [(error, time.time(), row["id"]) for row in rows])
        return [row["file"] for row in rows]

    def give_back(self, tasks: Iterable[Task], *, apart: bool = False, error: str | None = None) -> None:
        """Release claimed jobs; with `apart`, each for a batch of its own."""
        change = "UPDATE jobs SET status = 'pending', runner = NULL, apart = MAX(apart, ?), error = ?"
        with self.transaction():
            values = [(int(apart), error, task.id, self.runner) for task in tasks]
            self.connection.executemany(f"{change} WHERE id = ? AND runner = ?", values)

    def died(self, tasks: Iterable[Task], why: str, place: str = "") -> list[tuple[Task, str]]:
        """Release jobs whose process died. Returns those that failed because of it."""
        with self.transaction():
            ids = {task.id: task for task in tasks}
            marks = ", ".join("?" * len(ids))
            query = f"SELECT id, deaths FROM jobs WHERE runner = ? AND id IN ({marks})"
            rows = self.connection.execute(query, (self.runner, *ids)).fetchall()
            failed = [(ids[row["id"]], error) for row in rows if (error := self._die(row, why, place))]
        return failed

    def _die(self, row: sqlite3.Row, why: str, place: str) -> str:
        """The status of a job whose process died, waiting or failed, and why."""
        deaths = row["deaths"] + 1
        if row["deaths"] < max(self._alone, self.retries):
            change = "UPDATE jobs SET status = 'pending', runner = NULL, deaths = ?, place = ?, error = ? WHERE id = ?"
            self.connection.execute(change, (deaths, place, why, row["id"]))
            return ""
        error = f"the process that rendered it died {deaths} times, the last time while no other job was claimed: {why}"
        change = "UPDATE jobs SET status = 'failed', runner = NULL, deaths = ?, error = ?, finished = ? WHERE id = ?"
        self.connection.execute(change, (deaths, error, time.time(), row["id"]))
        return error

    def bound(self, shape: str, rows: int) -> None:
        """Remember that no more clips of this shape fit into memory."""
        change = "INSERT INTO shapes VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET rows = MIN(rows, excluded.rows)"
        self.connection.execute(change, (shape, rows))

    def record(self, progress: Iterable[tuple[int, str, int, int, float, str]]) -> None:
        """Record the progress of running jobs: job, stage, step, number of steps, seconds, place. A crash may lose
        it.
        """
        self.connection.execute("PRAGMA synchronous=OFF")
        try:
            with self.transaction():
                theirs = "SELECT id FROM jobs WHERE runner IS NOT NULL AND runner != ?"
                self.connection.execute(f"DELETE FROM progress WHERE id NOT IN ({theirs})", (self.runner,))
                self.connection.executemany("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?, ?)", progress)
        finally:
            self.connection.execute("PRAGMA synchronous=FULL")

    def cancelled(self, ids: Iterable[int]) -> set[int]:
        """Which of these jobs were cancelled."""
        wanted = list(ids)
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT id FROM jobs WHERE status = 'cancelled' AND id IN ({marks})"
        return {row["id"] for row in self.connection.execute(query, wanted)}

    # Other runners

    def recover(self) -> int:
        """Take over from runners that died: finish their renames, release their jobs, clear their folders."""
        recovered = 0
        with self._registering():
            held = {row["runner"] for row in self.connection.execute("SELECT DISTINCT runner FROM jobs")} - {None}
            there = {path.name for path in self.home.iterdir() if path.is_dir()} - {PACKED}
            for runner in (held | there) - {self.runner}:
                lock = lock_of_dead(self.home / runner / "lock")
                if lock is None and (self.home / runner / "lock").exists():
                    continue  # it lives
                recovered += self._recover(runner, blamed=(self.home / runner / WITHIN).exists())
                if runner in there:
                    shutil.rmtree(self.home / runner)
                if lock is not None:
                    os.close(lock)
        return recovered

    def _recover(self, runner: str, *, blamed: bool = False) -> int:
        """Release what a runner had claimed. `blamed`: one of these jobs may have killed it."""
        with self.transaction():
            self.connection.execute("DELETE FROM runs WHERE runner = ?", (runner,))
            rows = self.connection.execute("SELECT * FROM jobs WHERE runner = ?", (runner,)).fetchall()
            for row in rows:
                if row["status"] == PUBLISHING and self._roll_forward(self.home / runner / row["file"], row["file"]):
                    change = "UPDATE jobs SET status = 'done', finished = ?, runner = NULL WHERE id = ?"
                    self.connection.execute(change, (time.time(), row["id"]))
                elif blamed:
                    self._die(row, "the process of the run ended", "")
                else:
                    change = "UPDATE jobs SET status = 'pending', runner = NULL WHERE id = ?"
                    self.connection.execute(change, (row["id"],))
        return len(rows)

    def _roll_forward(self, aside: Path, file: str) -> bool:
        """Finish the rename of a clip: it is in one of two places, and whole in either."""
        there = os.path.lexists(self.out / file)
        if os.path.lexists(aside):
            if there:
                return False  # another file is there by now; the next attempt reports it
            publish(aside, self.out / file)
        elif not there:
            return False
        return True

    def waiting(self, model: str = "") -> int:
        """The number of this run's jobs, of one model if it is given, that may start if the folder is not paused."""
        query = f"SELECT COUNT(*) FROM jobs WHERE {WAITS} AND (model = ? OR ? = '')"
        return int(self.connection.execute(query, (model, model)).fetchone()[0])

    def of_another_form(self, form: str) -> int:
        """The number of finished clips of this run in another format than it would write."""
        query = "SELECT COUNT(*) FROM jobs WHERE status = 'done' AND form != ? AND id IN mine"
        return int(self.connection.execute(query, (form,)).fetchone()[0])

    def elsewhere(self) -> int:
        """The number of this run's jobs that other runners have claimed."""
        count = "SELECT COUNT(*) FROM jobs WHERE runner IS NOT NULL AND runner != ? AND id IN mine"
        return int(self.connection.execute(count, (self.runner,)).fetchone()[0])

    # Looking

    def counts(self) -> dict[str, int]:
        """The number of this run's jobs by status."""
        rows = self.connection.execute("SELECT status, COUNT(*) FROM jobs WHERE id IN mine GROUP BY status")
        return {**dict.fromkeys(STATUSES, 0), **{row[0]: row[1] for row in rows}}

    def rows(self, *, status: str | None = None, every: bool = False) -> Iterator[Row]:
        """This run's jobs, or all in the folder, in order, one by one."""
        where = "(? IS NULL OR status = ?)" + ("" if every else " AND id IN mine")
        for row in self.connection.execute(f"SELECT * FROM jobs WHERE {where} ORDER BY id", (status, status)):
            yield Row.of(row)


def _task(row: sqlite3.Row) -> Task:
    return Task(row["id"], row["file"], trusted(row["job"]), row["model"])
