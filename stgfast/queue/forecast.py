"""Estimates of how long jobs will take, and how many bytes, from finished clips of the same shapes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from stgfast.queue.state import State


@dataclass(frozen=True)
class Forecast:
    """The estimate for waiting jobs.

    Attributes:
        jobs: their number.
        unknown: the number without a finished clip of their shape.
        seconds: of the others on the same devices, without loading the model.
        bytes: of their clips.
    """

    jobs: int
    unknown: int
    seconds: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(state: State, waiting: str, past: State) -> Forecast:
    """Estimate the jobs for which `waiting` is true by the finished ones of `past`.

    Clips of the same call except prompt and seed count first. Then those of the same size and number of branches,
    scaled by steps.
    """
    each, of = "key, shape, model", "jobs JOIN stacks ON stacks.id = stack"
    query = f"SELECT {each}, COUNT(*) AS count FROM {of} WHERE {waiting} GROUP BY {each}"
    jobs, unknown, seconds, size = 0, 0, 0.0, 0.0
    for row in state.connection.execute(query).fetchall():
        jobs += row["count"]
        known = _known(past, row["model"], row["key"], row["shape"])
        if known is None:
            unknown += row["count"]
        else:
            seconds += row["count"] * known[0]
            size += row["count"] * known[1]
    return Forecast(jobs, unknown, round(seconds, 3), round(size))


def _known(past: State, model: str, key: str, shape: str) -> tuple[float, float] | None:
    """The seconds and bytes of a clip, or None."""
    done = "FROM jobs JOIN stacks ON stacks.id = stack WHERE status = 'done' AND wall IS NOT NULL AND model = ?"
    wall, size = past.connection.execute(f"SELECT AVG(wall), AVG(bytes) {done} AND key = ?", (model, key)).fetchone()
    if wall is not None:
        return wall, size or 0.0
    steps = json.loads(key).get("steps")
    each = "AVG(wall / json_extract(key, '$.steps')), AVG(bytes)"
    wall, size = past.connection.execute(f"SELECT {each} {done} AND shape = ?", (model, shape)).fetchone()
    return None if wall is None or steps is None else (wall * steps, size or 0.0)
