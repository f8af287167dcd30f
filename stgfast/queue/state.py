"""The state of an output folder, in SQLite beside the clips: each job, its runner, and its result.

    OUT/                    the clips, only whole ones
    OUT/.stgfast/jobs.db    this state
    OUT/.stgfast/packed/    images and LoRAs from archives of jobs
    OUT/.stgfast/<runner>/  temporary files of one running process, and the lock that says it runs

Several processes use it at once: runs, and commands that add jobs, cancel some, or read.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = ".stgfast"
PENDING, CLAIMED, PUBLISHING, DONE, FAILED, CANCELLED = STATUSES = (
    *("pending", "claimed", "publishing", "done", "failed", "cancelled"),
)
PAUSED = "paused"  # the setting of a folder that starts no jobs
PACKED = "packed"  # subfolder with the files of archives
VERSION = 3
JOBS = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    file TEXT NOT NULL,                    -- of the output, within the folder
    folded TEXT NOT NULL UNIQUE,           -- the same for names that some file systems take for the same
    identity TEXT NOT NULL,                -- everything that decides the clip
    job TEXT NOT NULL,                     -- as JSON
    model TEXT NOT NULL,
    line INTEGER NOT NULL,
    stack INTEGER NOT NULL REFERENCES stacks,
    status TEXT NOT NULL DEFAULT 'pending',
    runner TEXT,                           -- who has claimed it
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,     -- how often a process died that rendered it
    apart INTEGER NOT NULL DEFAULT 0,      -- not to be stacked with others
    seconds TEXT,                          -- per stage, as JSON
    error TEXT,
    finished REAL                          -- by the clock on the wall, for people
)"""
# Columns added in version 2. Version 3 renamed `recipe` to `identity`.
COLUMNS = {
    "priority": "INTEGER NOT NULL DEFAULT 0",
    "paused": "INTEGER NOT NULL DEFAULT 0",
    "added": "INTEGER NOT NULL DEFAULT 0",  # added by another process than a run: any run of the model renders it
    "place": "TEXT",  # the place of a process that died while rendering it
    "took": "REAL",  # seconds of all stages, the clip's share of its batch
    "wall": "REAL",  # seconds since the clip before it was done, for estimates
    "bytes": "INTEGER",  # of the clip
    "form": "TEXT",  # of the clip: its kind, frames per second and quality
    "remark": "TEXT",  # what is strange about the clip
}
REST = """
CREATE TABLE stacks (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, shape TEXT NOT NULL);
CREATE TABLE shapes (key TEXT PRIMARY KEY, rows INTEGER NOT NULL)
"""  # shapes: how many clips fit into memory at once
MORE = """
DROP INDEX IF EXISTS waiting;
CREATE INDEX waiting ON jobs (status, deaths, priority DESC, apart, stack, id);
CREATE INDEX finishing ON jobs (status, finished);
CREATE TABLE inbox (id INTEGER PRIMARY KEY, entry TEXT NOT NULL, line INTEGER NOT NULL, source TEXT NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0, error TEXT);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (runner TEXT PRIMARY KEY, pid INTEGER NOT NULL, host TEXT NOT NULL, model TEXT NOT NULL,
    started REAL NOT NULL);
CREATE TABLE progress (id INTEGER PRIMARY KEY, stage TEXT NOT NULL, step INTEGER NOT NULL, steps INTEGER NOT NULL,
    seconds REAL NOT NULL, place TEXT NOT NULL)
"""  # inbox: added jobs that no run has read yet


class StoreError(RuntimeError):
    """The output folder or its state cannot be used."""


class State:
    """A connection to the state of a folder."""

    connection: sqlite3.Connection

    def __init__(self, out: Path):
        self.out, self.home = out, out / FOLDER

    def connect(self, *, check: bool = True) -> None:
        """Open or create the state, and check whether it is damaged. Its files must be in the folder itself: a link
        might lead anywhere.
        """
        try:
            for name in ("jobs.db", "jobs.db-wal", "jobs.db-shm"):
                if (self.home / name).is_symlink():
                    raise StoreError(f"{self.home / name}: got a link, expected a file")
            self.connection = sqlite3.connect(self.home / "jobs.db", timeout=60, isolation_level=None)
            try:
                self._prepare()
                if check:
                    self._check()
            except BaseException:
                self.connection.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.home / 'jobs.db'}: {error}") from error

    def make_home(self) -> None:
        """Make the folder, and its subfolder with the state."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.home.is_symlink():
                raise StoreError(f"{self.home}: got a link, expected a folder")
            self.home.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"output folder {self.out}: {error}") from error

    def _prepare(self) -> None:
        connection = self.connection
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            with self.transaction():
                self._make(connection.execute("PRAGMA user_version").fetchone()[0])

    def _check(self) -> None:
        damage = self.connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise StoreError(f"state in {self.home} is damaged ({damage}): move jobs.db away to start again")

    def _make(self, version: int) -> None:
        """Make the tables, new or from an older version."""
        if version not in range(VERSION + 1):
            raise StoreError(f"state in {self.home}: got version {version}, expected {VERSION}")
        if version == VERSION:  # another process made it meanwhile
            return
        parts = {
            0: (JOBS, *REST.split(";\n")),
            1: (*(f"ALTER TABLE jobs ADD COLUMN {name} {kind}" for name, kind in COLUMNS.items()), *MORE.split(";\n")),
            2: ("ALTER TABLE jobs RENAME COLUMN recipe TO identity",) if version else (),
        }
        for statement in (each for since, part in parts.items() if since >= version for each in part):
            self.connection.execute(statement)
        self.connection.execute(f"PRAGMA user_version={VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, with no other process in between."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.connection.in_transaction:  # a full disk has already ended it
                self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    def setting(self, name: str) -> str:
        """A setting of the folder, such as `paused`; "" if it is not set."""
        found = self.connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else ""

    def set(self, name: str, value: str) -> None:
        change = "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        self.connection.execute(change, (name, value))


def locked(path: Path, *, wait: bool = False) -> int:
    """Lock a file. The lock ends with the process, however that ends. The file must not be a link."""
    import fcntl  # Windows does not have it; the rest of the library works there

    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


def lock_of_dead(path: Path) -> int | None:
    """The lock of a runner that no longer holds it."""
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Which fields of two entries differ, in words."""
    return ", ".join(sorted(name for name in {**one, **other} if one.get(name) != other.get(name)))
