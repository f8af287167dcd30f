"""The jobs of a folder for a page: a selection, in parts."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from stgfast.queue.desk import Choice
from stgfast.queue.state import State
from stgfast.queue.store import ORDER, Row

ORDERS = {
    "listed": "jobs.id",
    "latest": "finished IS NULL, finished DESC, jobs.id",
    "next": f"status != 'pending', paused, {ORDER}",
}


@dataclass(frozen=True)
class Entry:
    """A job in the list, and its progress.

    Attributes:
        version: changes when the clip is made again.
    """

    row: Row
    priority: int
    paused: bool
    version: float
    stage: str
    step: int
    steps: int


def listed(
    state: State, choice: Choice | None, *, order: str = "listed", offset: int = 0, limit: int = 100
) -> tuple[int, list[Entry]]:
    """The number of selected jobs (all without a choice), and some of them in an order."""
    where, given = "1", []
    if choice is not None and choice.statuses:
        where = f"status IN ({', '.join('?' * len(choice.statuses))})"
        given = list(choice.statuses)
    if choice is not None and (choice.words or choice.names):
        state.connection.create_function("means", 3, choice.means)
        where += " AND means(file, json_extract(job, '$.prompt'), status)"
    (count,) = state.connection.execute(f"SELECT COUNT(*) FROM jobs WHERE {where}", given).fetchone()
    rows = state.connection.execute(
        "SELECT jobs.*, progress.stage, progress.step, progress.steps FROM jobs LEFT JOIN progress USING (id) "
        f"WHERE {where} ORDER BY {ORDERS[order]} LIMIT ? OFFSET ?",
        (*given, limit, offset),
    )
    return count, [_entry(row) for row in rows]


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        row=Row.of(row),
        priority=row["priority"],
        paused=bool(row["paused"]),
        version=row["finished"] or 0.0,
        stage=row["stage"] or "",
        step=row["step"] or 0,
        steps=row["steps"] or 0,
    )
