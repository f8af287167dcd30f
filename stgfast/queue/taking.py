"""The jobs of a run: those that it adds to the list of a folder, and those that others have added."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError
from stgfast.guidance import Guidance
from stgfast.queue.batches import shape_of, stack_of
from stgfast.queue.job import NOTHING, Job, Lora
from stgfast.queue.placing import discard, size_of
from stgfast.queue.readers import Bad
from stgfast.queue.state import CANCELLED, DONE, FAILED, PENDING, State, differing

RETRIED = "status = 'pending', error = NULL, deaths = 0, apart = 0, place = NULL"
AFRESH = {"status": PENDING, "attempts": 0, "deaths": 0, "error": None, "seconds": None, "took": None, "remark": None}
Staged = tuple[Job, str, int, str, str, Mapping[str, Any]]  # what `Taking.stage` takes


class Taking(State):
    """A run's own part of a folder's list.

    Attributes:
        adopt: what a clip says it was made from, as `Job.identity`, or None.
    """

    adopt: Callable[[Path], str | None]

    def _prepare(self) -> None:
        super()._prepare()
        connection = self.connection
        connection.execute("CREATE TEMP TABLE mine (id INTEGER PRIMARY KEY)")  # the jobs of this run
        staged = "id INTEGER PRIMARY KEY, file TEXT, job TEXT, line INTEGER, stack TEXT, apart INTEGER, model TEXT"
        connection.execute(f"CREATE TEMP TABLE staged ({staged}, identity TEXT)")

    def stage(self, job: Job, file: str, line: int, images: str, model: str, made: Mapping[str, Any] = NOTHING) -> None:
        """Put a job on this run's list, which nobody else sees yet.

        Args:
            images: how its pipeline takes them, as its adapter says.
            made: what decides clips of this model beside its name.
        """
        values = {
            **{"file": file, "job": json.dumps(job.to_dict()), "line": line, "stack": stack_of(job, images)},
            **{"apart": job.image is not None and not images, "model": model, "identity": job.identity(model, made)},
        }
        self._insert("staged", values)

    @contextmanager
    def taking_up(self, bad: Iterable[Bad], *, keep: bool = True) -> Iterator[Iterator[Bad]]:
        """Add all staged jobs to this folder, or find them with their earlier results.

        `bad` stages jobs while it runs, before the folder is locked. It is returned, followed by what cannot be added.
        If the block raises, nothing is added; nor if it decides so.
        """
        try:
            yield itertools.chain(bad, self._take_up())
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT" if keep else "ROLLBACK")

    def _take_up(self) -> Iterator[Bad]:
        self.connection.execute("BEGIN IMMEDIATE")
        for row in self.connection.execute("SELECT * FROM staged ORDER BY id"):
            try:
                self._add(row)
            except SettingsError as error:
                yield Bad(row["line"], str(error))
        self.connection.execute("DELETE FROM staged")

    def _add(self, staged: sqlite3.Row) -> int:
        file, identity, job = staged["file"], staged["identity"], trusted(staged["job"])
        there = self.connection.execute("SELECT * FROM jobs WHERE folded = ?", (file.casefold(),)).fetchone()
        final = self.out / file
        values = {
            **{"file": file, "folded": file.casefold(), "identity": identity, "job": staged["job"]},
            **{"model": staged["model"], "line": staged["line"], "priority": job.priority, "apart": staged["apart"]},
            "stack": self._stack(job, staged["stack"]),
        }
        if there is None:
            if os.path.lexists(final):
                self._check_adoptable(final, identity)
                values |= {"status": DONE, "bytes": size_of(final)}
            number = self._insert("jobs", values)
        else:
            number = int(there["id"])
            if self.connection.execute("SELECT 1 FROM mine WHERE id = ?", (number,)).fetchone():
                same = "the same clip" if there["identity"] == identity else "the same name"
                raise SettingsError(
                    f"name: got {file!r}, {same} as line {there['line']}, expected another seed or another name"
                )
            self._change(there, values, final)
        self.connection.execute("INSERT INTO mine VALUES (?)", (number,))
        return number

    def _insert(self, table: str, values: Mapping[str, Any]) -> int:
        insert = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        return int(self.connection.execute(insert, tuple(values.values())).lastrowid or 0)

    def _check_adoptable(self, final: Path, identity: str) -> None:
        """Adopt a clip that the list does not know, if it says that it is the job's: the list was lost."""
        found = self.adopt(final)
        if found == identity:
            return
        how = "" if found is None else f" ({differing(json.loads(found), json.loads(identity))})"
        raise SettingsError(
            f"name: got {final.name!r}, which is in the folder but not on its list{how}, expected another"
        )

    def _change(self, there: sqlite3.Row, values: Mapping[str, Any], final: Path) -> None:
        """Handle a job that the list already has: it is the same, or replaces one that was not rendered."""
        changes = {name: values[name] for name in ("line", "job", "priority")}
        if there["identity"] != values["identity"]:
            if there["status"] not in (PENDING, FAILED, CANCELLED):
                how = differing(json.loads(there["identity"]), json.loads(values["identity"]))
                raise SettingsError(
                    f"name: got {final.name!r}, which this folder has with other settings ({how}), expected another "
                    f"name or another folder"
                )
            changes = {**values, **AFRESH}
        elif there["status"] == DONE and not _whole(final, there["bytes"]):
            changes |= AFRESH  # a deleted clip is rendered again, and so is a truncated one
            discard(final)
        assignments = ", ".join(f"{name} = ?" for name in changes)
        self.connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*changes.values(), there["id"]))

    def _stack(self, job: Job, key: str) -> int:
        self.connection.execute("INSERT OR IGNORE INTO stacks (key, shape) VALUES (?, ?)", (key, shape_of(job)))
        return int(self.connection.execute("SELECT id FROM stacks WHERE key = ?", (key,)).fetchone()[0])

    def retry_failed(self) -> int:
        """Retry the failed jobs of this run."""
        change = f"UPDATE jobs SET {RETRIED} WHERE status = 'failed' AND id IN mine"
        return self.connection.execute(change).rowcount

    def lose(self, file: str) -> None:
        """Remove a finished clip that is damaged, and render it again."""
        discard(self.out / file)
        self.connection.execute("UPDATE jobs SET status = 'pending' WHERE file = ? AND status = 'done'", (file,))

    # Jobs that others add

    def models_added(self) -> list[str]:
        """The models that added jobs name; "" for the run's own."""
        named = "COALESCE(json_extract(entry, '$.model'), '')"
        query = f"SELECT DISTINCT {named} FROM inbox WHERE error IS NULL"
        return [str(row[0]) for row in self.connection.execute(query)]

    def take_in(
        self, models: Mapping[str, Mapping[str, Any]], check: Callable[[str, int], Staged], limit: int = 200
    ) -> tuple[int, list[tuple[int, str]]]:
        """Take added jobs, and those that an earlier run took. Returns the number of new ones, and the refused ones.

        Args:
            models: the models of this run, and what decides their clips beside their names.
            check: returns the job of an entry as it is staged; its error is why the job is refused.
        """
        new = sum(self._adopt_added(model, made) for model, made in models.items())
        if not self.connection.execute("SELECT 1 FROM inbox WHERE error IS NULL LIMIT 1").fetchone():
            return new, []
        refused = []
        with self.transaction():
            query = "SELECT * FROM inbox WHERE error IS NULL ORDER BY id LIMIT ?"
            for row in self.connection.execute(query, (limit,)).fetchall():
                self.connection.execute("SAVEPOINT one")
                try:
                    self.stage(*check(row["entry"], row["line"]))
                    (staged,) = self.connection.execute("SELECT * FROM staged").fetchall()
                    number = self._add(staged)
                except SettingsError as error:
                    self.connection.execute("ROLLBACK TO one")
                    self.connection.execute("UPDATE inbox SET error = ? WHERE id = ?", (str(error), row["id"]))
                    refused.append((row["line"], str(error)))
                else:
                    new += 1
                    change = "UPDATE jobs SET added = 1, paused = ? WHERE id = ?"
                    self.connection.execute(change, (row["paused"], number))
                    self.connection.execute("DELETE FROM inbox WHERE id = ?", (row["id"],))
                self.connection.execute("DELETE FROM staged")
                self.connection.execute("RELEASE one")
        return new, refused

    def _adopt_added(self, model: str, made: Mapping[str, Any]) -> int:
        """Take jobs that another run took for any run with this model, made in the same way."""
        query = "SELECT id, identity FROM jobs WHERE added AND model = ? AND status IN ('pending', 'claimed', 'failed')"
        rows = self.connection.execute(f"{query} AND id NOT IN mine", (model,)).fetchall()
        ours = [row["id"] for row in rows if made.items() <= json.loads(row["identity"]).items()]
        self.connection.executemany("INSERT INTO mine VALUES (?)", [(one,) for one in ours])
        return len(ours)


def trusted(text: str) -> Job:
    """A job from its JSON, without repeating the checks from when it was added, in particular of its image."""
    data = json.loads(text)
    guidance = data.pop("guidance", None)
    job = object.__new__(Job)  # its defaults come from the class, except for mutable ones
    loras = []
    for given in data.pop("loras", ()):
        loras.append(lora := object.__new__(Lora))
        vars(lora).update({"weight": 1.0, "second": False, **given})
    more = {"guidance": guidance and Guidance.from_dict(guidance), "loras": tuple(loras)}
    vars(job).update({"pipeline": {}, **data, **more})
    return job


def _whole(clip: Path, size: int | None) -> bool:
    """Whether a clip exists with the recorded number of bytes."""
    found = size_of(clip)
    return found is not None and size in (None, found)
