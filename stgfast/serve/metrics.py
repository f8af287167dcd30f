"""A folder in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from stgfast.queue.state import State
from stgfast.queue.status import status_of

TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[dict[str, str], float]


def metrics(state: State) -> str:
    """All numbers of a folder."""
    status = status_of(state, shown=1000)
    totals = "SELECT COALESCE(SUM(took), 0), COALESCE(SUM(bytes), 0) FROM jobs WHERE status = 'done'"
    took, size = state.connection.execute(totals).fetchone()
    attempts, deaths = state.connection.execute(
        "SELECT COALESCE(SUM(attempts), 0), COALESCE(SUM(deaths), 0) FROM jobs"
    ).fetchone()
    left = [] if status.seconds is None else [_plain(status.seconds)]
    rate = [] if status.rate is None else [_plain(status.rate)]
    parts = [
        _told("stgfast_jobs", "Jobs of the folder.", [({"status": name}, n) for name, n in status.counts.items()]),
        _told("stgfast_jobs_paused", "Pending jobs that are paused.", [_plain(status.held)]),
        _told("stgfast_jobs_added", "Added jobs that no run has looked at.", [_plain(status.inbox)]),
        _told("stgfast_jobs_refused", "Added jobs that are wrong for the model.", [_plain(len(status.refused))]),
        _told("stgfast_paused", "1 where nothing of the folder is begun.", [_plain(status.paused)]),
        _told(
            "stgfast_run_seconds",
            "Since a run that is on began.",
            [
                ({"pid": str(run["pid"]), "host": run["host"], "model": run["model"]}, run["seconds"])
                for run in status.runs
            ],
        ),
        _told("stgfast_clips_per_hour", "By the clips of the last hour.", rate),
        _told("stgfast_left_seconds", "Until all is done, at that rate.", left),
        _told("stgfast_clip_seconds", "Seconds that the clips that are done took, all stages.", [_plain(took)]),
        _told("stgfast_clip_bytes", "Bytes of the clips that are done.", [_plain(size)]),
        _told("stgfast_attempts", "How often jobs were begun.", [_plain(attempts)]),
        _told("stgfast_deaths", "How often a process died that rendered a job.", [_plain(deaths)]),
    ]
    return "".join(parts)


def _plain(value: float) -> Sample:
    return {}, value


def _told(name: str, about: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{f'{{{inner}}}' if inner else ''} {float(value):.15g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
