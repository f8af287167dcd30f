"""The status of a folder: what runs and how far it is, what waits, the rate, and when it will be done."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from stgfast.queue.state import CLAIMED, PAUSED, PENDING, STATUSES, State, lock_of_dead

HOUR = 3600.0


@dataclass(frozen=True)
class Running:
    """A job that is being rendered."""

    file: str
    stage: str
    step: int
    steps: int
    seconds: float
    place: str


@dataclass(frozen=True)
class Status:
    """The status of a folder at one moment.

    Attributes:
        runs: active runs: process, host, model, seconds since their start.
        inbox: jobs that were added, and no run has read yet.
        strange: finished clips that look wrong, such as black ones.
        refused: added jobs that the model cannot do, with the reason.
        rate: clips per hour, from those of the last one; None if there are none.
        seconds: until all is done, at that rate; None if it is not known.
    """

    counts: dict[str, int]
    paused: bool
    held: int
    inbox: int
    refused: list[tuple[str, str]]
    runs: list[dict[str, Any]]
    running: list[Running]
    failures: list[tuple[str, str]]
    strange: list[tuple[str, str]]
    rate: float | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status_of(state: State, *, shown: int = 20) -> Status:
    """The status of a folder, with up to `shown` names each of running, refused and failed jobs."""
    query = state.connection.execute
    counts = {
        **dict.fromkeys(STATUSES, 0),
        **dict(query("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall()),
    }
    (held,) = query("SELECT COUNT(*) FROM jobs WHERE status = 'pending' AND paused").fetchone()
    (inbox,) = query("SELECT COUNT(*) FROM inbox WHERE error IS NULL").fetchone()
    running = query(
        "SELECT file, stage, step, steps, progress.seconds, progress.place FROM jobs LEFT JOIN progress USING (id) "
        "WHERE status IN ('claimed', 'publishing') ORDER BY progress.stage IS NULL, progress.seconds DESC LIMIT ?",
        (shown,),
    )
    named = "COALESCE(json_extract(entry, '$.name'), json_extract(entry, '$.prompt'))"
    refused = query(f"SELECT {named}, error FROM inbox WHERE error IS NOT NULL ORDER BY id LIMIT ?", (shown,))
    failures = query("SELECT file, error FROM jobs WHERE status = 'failed' ORDER BY finished DESC LIMIT ?", (shown,))
    strange = query(
        "SELECT file, remark FROM jobs WHERE status = 'done' AND remark != '' ORDER BY finished DESC LIMIT ?", (shown,)
    )
    runs = [
        {
            "pid": row["pid"],
            "host": row["host"],
            "model": row["model"],
            "seconds": round(time.time() - row["started"], 1),
        }
        for row in query("SELECT * FROM runs ORDER BY started").fetchall()
        if _lives(state, row["runner"])
    ]
    rate = _rate(state)
    left = counts[PENDING] - held + counts[CLAIMED] + inbox
    return Status(
        counts=counts,
        paused=bool(state.setting(PAUSED)),
        held=held,
        inbox=inbox,
        refused=[tuple(row) for row in refused],
        runs=runs,
        running=[
            Running(
                row["file"],
                row["stage"] or "begins",
                row["step"] or 0,
                row["steps"] or 0,
                row["seconds"] or 0.0,
                row["place"] or "",
            )
            for row in running
        ],
        failures=[tuple(row) for row in failures],
        strange=[tuple(row) for row in strange],
        rate=rate,
        seconds=None if rate is None or not runs else left / rate * HOUR,
    )


def _rate(state: State) -> float | None:
    """Clips per hour, from the last ones: those of an hour, or of the active runs if they are younger."""
    now = time.time()
    query = "SELECT COUNT(*), MIN(finished) FROM jobs WHERE status = 'done' AND finished > ?"
    (began,) = state.connection.execute("SELECT MIN(started) FROM runs").fetchone()
    since = max(now - HOUR, began or 0.0)
    count, first = state.connection.execute(query, (since,)).fetchone()
    if not count:
        return None
    return float(count / max(now - (since if began else first), 1.0) * HOUR)


def _lives(state: State, runner: str) -> bool:
    lock = lock_of_dead(state.home / runner / "lock")
    if lock is None:
        return (state.home / runner / "lock").exists()
    os.close(lock)
    return False
