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
        _metric("stgfast_jobs", "Jobs of the folder.", [({"status": name}, n) for name, n in status.counts.items()]),
        _metric("stgfast_jobs_paused", "Pending jobs that are paused.", [_plain(status.held)]),
        _metric("stgfast_jobs_added", "Added jobs that no run has read yet.", [_plain(status.inbox)]),
        _metric("stgfast_jobs_refused", "Added jobs that were refused.", [_plain(len(status.refused))]),
        _metric("stgfast_paused", "1 if the folder is paused.", [_plain(status.paused)]),
        _metric(
            "stgfast_run_seconds",
            "Seconds since an active run started.",
            [
                ({"pid": str(run["pid"]), "host": run["host"], "model": run["model"]}, run["seconds"])
                for run in status.runs
            ],
        ),
        _metric("stgfast_clips_per_hour", "Clips per hour, from the last hour.", rate),
        _metric("stgfast_left_seconds", "Seconds until all jobs are done, at the current rate.", left),
        _metric("stgfast_clip_seconds", "Seconds spent on finished clips, all stages.", [_plain(took)]),
        _metric("stgfast_clip_bytes", "Bytes of finished clips.", [_plain(size)]),
        _metric("stgfast_attempts", "Attempts at jobs.", [_plain(attempts)]),
        _metric("stgfast_deaths", "Deaths of processes while they rendered a job.", [_plain(deaths)]),
    ]
    return "".join(parts)


def _plain(value: float) -> Sample:
    return {}, value


def _metric(name: str, about: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{f'{{{inner}}}' if inner else ''} {float(value):.15g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
