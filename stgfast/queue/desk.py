"""Changes of a folder from outside its runs: add, cancel, pause, prioritize jobs.

A run reads the folder each second and follows. If no run is active, the next one does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError, wrong
from stgfast.queue.job import MAX_PRIORITY, check_number, shown
from stgfast.queue.pack import is_archive, read_packed
from stgfast.queue.readers import Bad, checked, read
from stgfast.queue.state import CANCELLED, CLAIMED, FAILED, FOLDER, PACKED, PAUSED, PENDING, State, StoreError
from stgfast.queue.taking import RETRIED
from stgfast.queue.words import Words


@dataclass(frozen=True)
class Choice:
    """A selection of jobs.

    Attributes:
        names: names of clips, with or without extension; * stands for any letters.
        words: words that prompt and name must all contain, in any order.
        statuses: statuses of the jobs.
        every: all jobs of the folder.
    """

    names: Sequence[str] = ()
    words: str = ""
    statuses: Sequence[str] = ()
    every: bool = False

    def __post_init__(self) -> None:
        if not (self.names or self.words.split() or self.statuses or self.every):
            raise SettingsError("jobs: got none, expected names of clips, --words, --status or --all")

    def means(self, file: str, prompt: str, status: str) -> bool:
        stem = file.rsplit(".", 1)[0]
        text = f"{prompt} {file}".casefold()
        return (
            (not self.names or any(fnmatchcase(file, name) or fnmatchcase(stem, name) for name in self.names))
            and all(word in text for word in self.words.casefold().split())
            and (not self.statuses or status in self.statuses)
        )


class Desk(State):
    """The state of a folder for a command, as a context manager. Its process is not a runner.

    Attributes:
        create: make the folder if it does not exist.
        check: check that the state is not damaged, which reads all of it.
    """

    def __init__(self, out: Path, *, create: bool = False, check: bool = True):
        super().__init__(out)
        self.create, self.check = create, check

    def __enter__(self) -> Desk:
        if self.create:
            self.make_home()
        elif not (self.home / "jobs.db").is_file() or self.home.is_symlink():
            raise StoreError(
                f"output folder {self.out}: got one without {FOLDER}/jobs.db, expected one of stgfast render"
            )
        self.connect(check=self.check)
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def add(
        self, jobs: Path | Iterable[Mapping[str, Any]], *, priority: int | None = None, words: Words | None = None
    ) -> tuple[int, list[Bad]]:
        """Add jobs to the folder's inbox, all of them or none. Returns their number, and the errors.

        Prompts of mappings are used as they are, or have choices and variables with `words`. The run that claims them
        checks what depends on the model, and refuses jobs that the model cannot do.
        """
        if isinstance(jobs, Path):
            lines = read_packed(jobs, self.home / PACKED) if is_archive(jobs) else read(jobs)
            source = jobs.name
        else:
            lines = (checked(number, given, base=Path(), words=words) for number, given in enumerate(jobs, 1))
            source = ""
        if priority is not None:
            check_number("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        bad: list[Bad] = []
        count = 0
        self.connection.execute("CREATE TEMP TABLE entries (entry TEXT, line INTEGER)")
        for line in lines:
            if isinstance(line, Bad):
                bad.append(line)
                continue
            for job in line.jobs:
                entry = {**job.to_dict(), **({} if priority is None else {"priority": priority})}
                self.connection.execute("INSERT INTO entries VALUES (?, ?)", (json.dumps(entry), line.number))
                count += 1
        if bad:
            return 0, bad
        with self.transaction():
            insert = "INSERT INTO inbox (entry, line, source) SELECT entry, line, ? FROM entries ORDER BY rowid"
            self.connection.execute(insert, (source,))
        return count, []

    def again(self, file: str, changes: Mapping[str, Any]) -> list[Bad]:
        """Add a job of the folder again, with some fields changed, or left out if they are None."""
        row = self.connection.execute("SELECT job, model FROM jobs WHERE file = ?", (file,)).fetchone()
        if row is None:
            raise wrong("name", shown(file), "a clip of this folder")
        job = {**json.loads(row["job"]), "model": row["model"]}
        for field in ("name", *(("image_sha256",) if "image" in changes else ())):
            job.pop(field, None)
        job |= changes
        _, bad = self.add([{field: value for field, value in job.items() if value is not None}])
        return bad

    def models(self) -> list[str]:
        """The models of its jobs, and of active runs."""
        query = "SELECT model FROM jobs UNION SELECT model FROM runs ORDER BY model"
        return [str(row[0]) for row in self.connection.execute(query)]

    def dismiss(self) -> int:
        """Remove refused jobs, and return their number."""
        return self.connection.execute("DELETE FROM inbox WHERE error IS NOT NULL").rowcount

    def cancel(self, choice: Choice) -> list[str]:
        """Cancel jobs that are not done. A clip in progress is discarded."""
        with self.transaction():
            found = self._found(choice, (PENDING, CLAIMED, FAILED))
            self._change(found, "status = 'cancelled', runner = NULL, error = NULL")
            return self._named(found) + self._of_inbox(choice, "DELETE FROM inbox WHERE id = ?")

    def retry(self, choice: Choice) -> list[str]:
        """Render failed or cancelled jobs after all."""
        with self.transaction():
            found = self._found(choice, (FAILED, CANCELLED))
            self._change(found, f"{RETRIED}, added = 1")
            return self._named(found)

    def pause(self, choice: Choice | None = None) -> list[str]:
        """Do not start these jobs, or none of the folder."""
        return self._paused(choice, 1)

    def resume(self, choice: Choice | None = None) -> list[str]:
        return self._paused(choice, 0)

    def _paused(self, choice: Choice | None, paused: int) -> list[str]:
        if choice is None:
            self.set(PAUSED, "1" if paused else "")
            return []
        with self.transaction():
            found = self._found(choice, (PENDING, CLAIMED, FAILED))
            self._change(found, f"paused = {paused}")
            return self._named(found) + self._of_inbox(choice, f"UPDATE inbox SET paused = {paused} WHERE id = ?")

    def prioritise(self, choice: Choice, priority: int) -> list[str]:
        """Start jobs with a higher priority first."""
        check_number("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        with self.transaction():
            found = self._found(choice, (PENDING, CLAIMED, FAILED, CANCELLED))
            self._change(found, f"priority = {priority}")
            change = f"UPDATE inbox SET entry = json_set(entry, '$.priority', {priority}) WHERE id = ?"
            return self._named(found) + self._of_inbox(choice, change)

    def has_added(self) -> bool:
        """Whether added jobs are not rendered yet."""
        query = "SELECT 1 FROM inbox WHERE error IS NULL UNION SELECT 1 FROM jobs WHERE added AND status != 'done'"
        return self.connection.execute(f"{query} LIMIT 1").fetchone() is not None

    def _found(self, choice: Choice, statuses: Sequence[str]) -> list[sqlite3.Row]:
        marks = ", ".join("?" * len(statuses))
        query = "SELECT id, file, status, json_extract(job, '$.prompt') AS prompt FROM jobs"
        rows = self.connection.execute(f"{query} WHERE status IN ({marks}) ORDER BY id", tuple(statuses))
        return [row for row in rows if choice.means(row["file"], row["prompt"], row["status"])]

    def _change(self, rows: Sequence[sqlite3.Row], assignment: str) -> None:
        change = f"UPDATE jobs SET {assignment} WHERE id = ?"
        self.connection.executemany(change, [(row["id"],) for row in rows])

    def _of_inbox(self, choice: Choice, change: str) -> list[str]:
        """Jobs that no run has read: their names if they have any, else their prompts."""
        query = "SELECT id, json_extract(entry, '$.name') AS name, json_extract(entry, '$.prompt') AS prompt FROM inbox"
        rows = self.connection.execute(f"{query} ORDER BY id").fetchall()
        meant = [row for row in rows if choice.means(row["name"] or "", row["prompt"] or "", PENDING)]
        self.connection.executemany(change, [(row["id"],) for row in meant])
        return [row["name"] or row["prompt"] for row in meant]

    @staticmethod
    def _named(rows: Sequence[sqlite3.Row]) -> list[str]:
        return [row["file"] for row in rows]
