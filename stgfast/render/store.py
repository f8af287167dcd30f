"""The state of an output folder, in SQLite beside the clips: every job, whose it is, and how it went.

    OUT/                    the clips, and nothing else that is not whole
    OUT/.stgfast/jobs.db    this state
    OUT/.stgfast/<runner>/  what one running process writes before it is whole, and the lock that says it runs

Who is alive is asked of the kernel: a runner holds a lock on its own file, which ends with the process however that
ends. No clock decides anything. A clip goes from `claimed` over `publishing` (written aside, about to be renamed) to
`done`; where a runner died in between, the next one finishes the rename or gives the job back.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError
from stgfast.guidance import Guidance
from stgfast.render.batches import Batch, Task, shape_of, stack_of
from stgfast.render.files import discard, publish
from stgfast.render.jobs import NOTHING, Bad, Job

FOLDER = ".stgfast"
PENDING, CLAIMED, PUBLISHING, DONE, FAILED = STATUSES = ("pending", "claimed", "publishing", "done", "failed")
VERSION = 1
DEATHS = 3  # a job that was in hand so often when an actor died has failed
# Whatever was in hand twice when somebody died is rendered alone from then on.
AGAIN_AFTER_DEATH = "status = 'pending', apart = apart OR deaths, deaths = deaths + ?, runner = NULL"
SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    file TEXT NOT NULL,                    -- of the output, within the folder
    folded TEXT NOT NULL UNIQUE,           -- the same for names that some file systems take for the same
    recipe TEXT NOT NULL,
    job TEXT NOT NULL,                     -- as JSON
    model TEXT NOT NULL,
    line INTEGER NOT NULL,
    stack INTEGER NOT NULL REFERENCES stacks,
    status TEXT NOT NULL DEFAULT 'pending',
    runner TEXT,                           -- who has it in hand
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,     -- how often a runner, or an actor of one, died with it in hand
    apart INTEGER NOT NULL DEFAULT 0,      -- not to be stacked with others
    seconds TEXT,                          -- per stage, as JSON
    error TEXT,
    finished REAL                          -- by the clock on the wall, for people
);
CREATE INDEX waiting ON jobs (status, deaths, apart, stack, id);
CREATE TABLE stacks (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, shape TEXT NOT NULL);
CREATE TABLE shapes (key TEXT PRIMARY KEY, rows INTEGER NOT NULL);  -- how many clips fit into memory at once
"""


class StoreError(RuntimeError):
    """The output folder or its state cannot be used."""


@dataclass(frozen=True)
class Row:
    """One job as it stands."""

    file: str
    status: str
    attempts: int
    line: int
    job: Job
    seconds: Mapping[str, float]
    error: str | None
    model: str


class Store:
    """One process's view of an output folder, as a context manager: within it, this process is a living runner."""

    def __init__(self, out: Path):
        self.out, self.home = out, out / FOLDER
        self.runner = uuid.uuid4().hex
        self.scratch = self.home / self.runner

    def __enter__(self) -> Store:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.home.is_symlink():
                raise StoreError(f"{self.home}: got a link, expected a folder")
            self.home.mkdir(exist_ok=True)
            with self._registering():
                self.scratch.mkdir()
                self.lock = _locked(self.scratch / "lock")
        except OSError as error:
            raise StoreError(f"output folder {self.out}: {error}") from error
        try:
            self.connection = sqlite3.connect(self.home / "jobs.db", timeout=60, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self.connection.close()
                raise
        except BaseException as error:
            self._leave()
            if isinstance(error, (sqlite3.Error, OSError)):
                raise StoreError(f"{self.home / 'jobs.db'}: {error}") from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if (self.home / "jobs.db").exists():  # and the folder was not deleted meanwhile
                self._recover(self.runner, deaths=0)  # what is in hand waits again
        except (sqlite3.Error, OSError):
            if kind is None:
                raise  # else the first error says why; the next runner finds this one's lock free, and does the same
        finally:
            self.connection.close()
            self._leave()

    def _leave(self) -> None:
        try:
            if self.home.is_dir():  # and was not deleted meanwhile
                with self._registering():
                    # A thread that was stopped may still write there. What stays, the next runner clears away.
                    shutil.rmtree(self.scratch, ignore_errors=True)
        finally:
            os.close(self.lock)

    def _prepare(self) -> None:
        connection = self.connection
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TEMP TABLE mine (id INTEGER PRIMARY KEY)")  # the jobs that this run is about
        staged = "id INTEGER PRIMARY KEY, file TEXT, job TEXT, line INTEGER, stack TEXT, apart INTEGER"
        connection.execute(f"CREATE TEMP TABLE staged ({staged})")
        with self._transaction():
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={VERSION}")
            elif version != VERSION:
                raise StoreError(f"state in {self.home}: got version {version}, expected {VERSION}")
        damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise StoreError(f"state in {self.home} is damaged ({damage}): move jobs.db away to begin anew")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing, with no other runner in between."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.connection.in_transaction:  # a full disk has ended it already
                self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    @contextmanager
    def _registering(self) -> Iterator[None]:
        """Runners come, and dead ones are cleared away, one at a time."""
        lock = _locked(self.home / "lock", wait=True)
        try:
            yield
        finally:
            os.close(lock)

    # Planning

    def stage(self, job: Job, file: str, line: int, images: str = "") -> None:
        """Put a job on this run's list, which nobody else sees yet; its pipeline takes images as its adapter says."""
        insert = "INSERT INTO staged (file, job, line, stack, apart) VALUES (?, ?, ?, ?, ?)"
        apart = job.image is not None and not images
        self.connection.execute(insert, (file, json.dumps(job.to_dict()), line, stack_of(job, images), apart))

    @contextmanager
    def taking_up(self, model: str, bad: Iterable[Bad], made: Mapping[str, Any] = NOTHING) -> Iterator[Iterator[Bad]]:
        """Everything that was staged becomes work of this folder, or is found again with what was done for it.

        `bad` stages jobs as it goes, before the folder is locked. It is given, and after it what cannot be taken up.
        Where the block raises, nothing was.
        """
        try:
            yield itertools.chain(bad, self._take_up(model, made))
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    def _take_up(self, model: str, made: Mapping[str, Any]) -> Iterator[Bad]:
        self.connection.execute("BEGIN IMMEDIATE")
        for row in self.connection.execute("SELECT * FROM staged ORDER BY id"):
            try:
                self._add(trusted(row["job"]), row, model, made)
            except SettingsError as error:
                yield Bad(row["line"], str(error))

    def _add(self, job: Job, staged: sqlite3.Row, model: str, made: Mapping[str, Any]) -> None:
        file, line = staged["file"], staged["line"]
        recipe, folded = job.recipe(model, made), file.casefold()
        there = self.connection.execute("SELECT * FROM jobs WHERE folded = ?", (folded,)).fetchone()
        final, data = self.out / file, json.dumps(job.to_dict())
        if there is None:
            if os.path.lexists(final):
                raise SettingsError(f"name: got {file!r}, which is in the folder but not on its list, expected another")
            values = (file, folded, recipe, data, model, line, self._stack(job, staged["stack"]), staged["apart"])
            names = "file, folded, recipe, job, model, line, stack, apart"
            insert = f"INSERT INTO jobs ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            identity = self.connection.execute(insert, values).lastrowid
        else:
            identity = there["id"]
            if self.connection.execute("SELECT 1 FROM mine WHERE id = ?", (identity,)).fetchone():
                same = "the same clip" if there["recipe"] == recipe else "the same name"
                raise SettingsError(
                    f"name: got {file!r}, {same} as line {there['line']}, expected another seed or another name"
                )
            if there["recipe"] != recipe:
                raise SettingsError(
                    f"name: got {file!r}, which this folder has with other settings "
                    f"({_differing(there['recipe'], recipe)}), expected another name or another folder"
                )
            lost = there["status"] == DONE and not os.path.lexists(final)
            change = f"UPDATE jobs SET line = ?, job = ?{', status = ?' if lost else ''} WHERE id = ?"
            self.connection.execute(change, (line, data, *([PENDING] if lost else []), identity))
        self.connection.execute("INSERT INTO mine VALUES (?)", (identity,))

    def _stack(self, job: Job, key: str) -> int:
        self.connection.execute("INSERT OR IGNORE INTO stacks (key, shape) VALUES (?, ?)", (key, shape_of(job)))
        return int(self.connection.execute("SELECT id FROM stacks WHERE key = ?", (key,)).fetchone()[0])

    def retry_failed(self) -> int:
        """Failed jobs of this run are to be tried again."""
        change = "UPDATE jobs SET status = 'pending', error = NULL WHERE status = 'failed' AND id IN mine"
        return self.connection.execute(change).rowcount

    # Rendering

    def claim(self, size: int, device: str) -> Batch | None:
        """Take up to `size` waiting jobs that fit together, fewer where memory is known to hold fewer.

        A job that was in hand when a runner or actor died goes last: if it is what kills, the others are done before.
        """
        with self._transaction():
            first = self.connection.execute(
                "SELECT jobs.*, stacks.shape FROM jobs JOIN stacks ON stacks.id = stack WHERE status = 'pending' "
                "AND jobs.id IN mine ORDER BY deaths, apart, stack, jobs.id LIMIT 1"
            ).fetchone()
            if first is None:
                return None
            shape = f"{device} {first['shape']}"
            known = self.connection.execute("SELECT rows FROM shapes WHERE key = ?", (shape,)).fetchone()
            size = min(size, known["rows"]) if known else size
            rows = [first]
            if size > 1 and not first["apart"]:
                rows = self.connection.execute(
                    "SELECT * FROM jobs WHERE status = 'pending' AND deaths = ? AND NOT apart AND stack = ? "
                    "AND id IN mine ORDER BY id LIMIT ?",
                    (first["deaths"], first["stack"], size),
                ).fetchall()
            ids = [(self.runner, row["id"]) for row in rows]
            claim = "UPDATE jobs SET status = 'claimed', runner = ?, attempts = attempts + 1 WHERE id = ?"
            self.connection.executemany(claim, ids)
        return Batch(tuple(_task(row) for row in rows), shape, lonely=first["deaths"] >= DEATHS - 1)

    def waiting_prompts(self, count: int) -> list[tuple[str, str | None]]:
        """Prompt and negative prompt of the jobs that come next, for reading them ahead."""
        rows = self.connection.execute(
            "SELECT job FROM jobs WHERE status = 'pending' AND id IN mine ORDER BY deaths, apart, stack, id LIMIT ?",
            (count,),
        )
        found = (json.loads(row["job"]) for row in rows)
        return list(dict.fromkeys((job["prompt"], job.get("negative_prompt")) for job in found))

    def finish(self, task: Task, aside: Path, seconds: Mapping[str, float]) -> bool:
        """A clip that is written aside becomes the job's output. Its name is on record before it is moved.

        Not so where somebody else's file has that name by now: then the job has failed.
        """
        change = "UPDATE jobs SET status = 'publishing', seconds = ?, error = NULL WHERE id = ? AND runner = ?"
        if not self.connection.execute(change, (json.dumps(seconds), task.id, self.runner)).rowcount:
            raise StoreError(f"{task.file}: got a job that another runner has, expected one of this runner")
        try:
            publish(aside, self.out / task.file)
        except FileExistsError as error:
            discard(aside)
            self.fail(task, f"{error.strerror}: {task.file}", seconds)
            return False
        done = "UPDATE jobs SET status = 'done', finished = ?, runner = NULL WHERE id = ?"
        self.connection.execute(done, (time.time(), task.id))
        return True

    def fail(self, task: Task, error: str, seconds: Mapping[str, float]) -> None:
        change = "UPDATE jobs SET status = 'failed', error = ?, seconds = ?, finished = ?, runner = NULL WHERE id = ?"
        self.connection.execute(change, (error, json.dumps(seconds), time.time(), task.id))

    def fail_waiting(self, shape: str, error: str) -> list[str]:
        """Jobs of this run that wait and have this shape have failed, untried: their files."""
        with self._transaction():
            rows = self.connection.execute(
                "SELECT jobs.id, file FROM jobs JOIN stacks ON stacks.id = stack "
                "WHERE status = 'pending' AND jobs.id IN mine AND shape = ? ORDER BY jobs.id",
                (shape,),
            ).fetchall()
            change = "UPDATE jobs SET status = 'failed', error = ?, finished = ? WHERE id = ?"
            self.connection.executemany(change, [(error, time.time(), row["id"]) for row in rows])
        return [row["file"] for row in rows]

    def give_back(self, tasks: Iterable[Task], *, apart: bool = False, error: str | None = None) -> None:
        """Jobs in hand wait again; `apart`, each on its own."""
        change = "UPDATE jobs SET status = 'pending', runner = NULL, apart = MAX(apart, ?), error = ? WHERE id = ?"
        with self._transaction():
            self.connection.executemany(change, [(int(apart), error, task.id) for task in tasks])

    def died(self, tasks: Iterable[Task], why: str) -> list[tuple[Task, str]]:
        """Jobs in hand when an actor died wait again, as after a runner's death. Returns those that failed by it."""
        failed = []
        for task in tasks:
            change = f"UPDATE jobs SET {AGAIN_AFTER_DEATH}, error = ? WHERE id = ?"
            self.connection.execute(change, (1, why, task.id))
            (deaths,) = self.connection.execute("SELECT deaths FROM jobs WHERE id = ?", (task.id,)).fetchone()
            if deaths >= DEATHS:
                error = f"who rendered it died {deaths} times, the last time with nothing else in hand: {why}"
                self.fail(task, error, {})
                failed.append((task, error))
        return failed

    def bound(self, shape: str, rows: int) -> None:
        """Remember that no more clips of this shape than these fit into memory."""
        change = "INSERT INTO shapes VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET rows = MIN(rows, excluded.rows)"
        self.connection.execute(change, (shape, rows))

    # Other runners

    def recover(self) -> int:
        """Take over from runners that died: finish their renames, give back their jobs, clear their folders away."""
        recovered = 0
        with self._registering():
            held = {row["runner"] for row in self.connection.execute("SELECT DISTINCT runner FROM jobs")} - {None}
            there = {path.name for path in self.home.iterdir() if path.is_dir()}
            for runner in (held | there) - {self.runner}:
                lock = _lock_of_dead(self.home / runner / "lock")
                if lock is None and (self.home / runner / "lock").exists():
                    continue  # it lives
                recovered += self._recover(runner, deaths=1)
                if runner in there:
                    shutil.rmtree(self.home / runner)
                if lock is not None:
                    os.close(lock)
        return recovered

    def _recover(self, runner: str, deaths: int) -> int:
        with self._transaction():
            rows = self.connection.execute("SELECT * FROM jobs WHERE runner = ?", (runner,)).fetchall()
            for row in rows:
                done = row["status"] == PUBLISHING and self._roll_forward(self.home / runner / row["file"], row["file"])
                change = "status = 'done', finished = ?, runner = NULL" if done else AGAIN_AFTER_DEATH
                self.connection.execute(
                    f"UPDATE jobs SET {change} WHERE id = ?", (time.time() if done else deaths, row["id"])
                )
        return len(rows)

    def _roll_forward(self, aside: Path, file: str) -> bool:
        """A clip was about to be renamed: it is in one of two places, and whole in either."""
        there = os.path.lexists(self.out / file)
        if os.path.lexists(aside):
            if there:
                return False  # somebody put a file there meanwhile; the next attempt will say so
            publish(aside, self.out / file)
        elif not there:
            return False
        return True

    def elsewhere(self) -> int:
        """How many of this run's jobs other runners have in hand."""
        count = "SELECT COUNT(*) FROM jobs WHERE runner IS NOT NULL AND runner != ? AND id IN mine"
        return int(self.connection.execute(count, (self.runner,)).fetchone()[0])

    # Looking

    def counts(self) -> dict[str, int]:
        """How many of this run's jobs stand where."""
        rows = self.connection.execute("SELECT status, COUNT(*) FROM jobs WHERE id IN mine GROUP BY status")
        return {**dict.fromkeys(STATUSES, 0), **{row[0]: row[1] for row in rows}}

    def rows(self, *, status: str | None = None, every: bool = False) -> Iterator[Row]:
        """This run's jobs, or every one in the folder, in order, one at a time."""
        where = "(? IS NULL OR status = ?)" + ("" if every else " AND id IN mine")
        for row in self.connection.execute(f"SELECT * FROM jobs WHERE {where} ORDER BY id", (status, status)):
            seconds = json.loads(row["seconds"] or "{}")
            job = trusted(row["job"])
            yield Row(
                row["file"], row["status"], row["attempts"], row["line"], job, seconds, row["error"], row["model"]
            )


def trusted(text: str) -> Job:
    """A job from its JSON, without a second look at what was checked when it was taken up, its image above all."""
    data = json.loads(text)
    guidance = data.pop("guidance", None)
    job = object.__new__(Job)  # which has its defaults from its class, but for what can be changed
    vars(job).update({"pipeline": {}, **data, "guidance": guidance and Guidance.from_dict(guidance)})
    return job


def _task(row: sqlite3.Row) -> Task:
    return Task(row["id"], row["file"], trusted(row["job"]), row["model"])


def _differing(one: str, other: str) -> str:
    before, now = json.loads(one), json.loads(other)
    names = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    return ", ".join(names)


def _locked(path: Path, *, wait: bool = False) -> int:
    import fcntl  # which Windows does not have; there, the rest of the library works

    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


def _lock_of_dead(path: Path) -> int | None:
    """The lock of a runner that no longer holds it."""
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
