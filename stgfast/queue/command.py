"""`stgfast status`, `add`, `cancel`, `pause`, `resume`, `retry`, `priority`: work with a folder from any shell.

Exit codes: 0 done; 1 no job was selected; 2 the arguments or the jobs are wrong; 3 the folder cannot be used. None of
them loads torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stgfast.errors import SettingsError
from stgfast.queue.state import STATUSES, StoreError

DONE, NONE, WRONG, DISK = 0, 1, 2, 3
SHOWN = 10  # names of jobs, or bad lines


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder of clips")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="name of a clip; * stands for any letters")
    parser.add_argument("--words", default="", help="select jobs whose prompt or name contains these words")
    parser.add_argument(
        "--status", dest="statuses", action="append", default=[], choices=STATUSES, help="select jobs with this status"
    )
    parser.add_argument("--all", dest="every", action="store_true", help="select all jobs")
    _add_out(parser)


add_cancel = add_retry = _add_choice


def add_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", type=Path, help="a .jsonl, .csv, .yaml or .txt file, one job in each entry")
    parser.add_argument("--priority", type=int, help="priority of these jobs (default: that of the job, or 0)")
    _add_out(parser)


def add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", type=Path, help="a .jsonl, .csv, .yaml or .txt file, one job in each entry")
    parser.add_argument("archive", type=Path, help="a .zip file for stgfast render and stgfast add")


def add_priority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("priority", type=int, help="jobs with a higher priority are rendered first (default: 0)")
    _add_choice(parser)


def add_pause(parser: argparse.ArgumentParser) -> None:
    _add_choice(parser)
    parser.epilog = "Without a name, words or a status: the whole folder."


add_resume = add_pause


def add_status(parser: argparse.ArgumentParser) -> None:
    _add_out(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_add(arguments: argparse.Namespace) -> int:
    def add() -> int:
        from stgfast.queue.desk import Desk

        with Desk(arguments.out, create=True) as desk:
            count, bad = desk.add(arguments.jobs, priority=arguments.priority)
        for line in bad[:SHOWN]:
            sys.stderr.write(f"line {line.number}: {_plain(line.why)}\n")
        if bad:
            raise SettingsError(f"{len(bad)} bad line{'s' * (len(bad) > 1)}; nothing was added")
        sys.stdout.write(f"{count} job{'s' * (count != 1)} added\n")
        return DONE

    return _reported("add", add)


def run_pack(arguments: argparse.Namespace) -> int:
    def make() -> int:
        from stgfast.queue.pack import pack

        jobs, files = pack(arguments.jobs, arguments.archive)
        sys.stdout.write(f"{jobs} job{'s' * (jobs != 1)} and {files} file{'s' * (files != 1)} in {arguments.archive}\n")
        return DONE

    return _reported("pack", make)


def run_cancel(arguments: argparse.Namespace) -> int:
    return _changed(arguments, "cancelled", lambda desk, choice: desk.cancel(choice))


def run_retry(arguments: argparse.Namespace) -> int:
    return _changed(arguments, "to be retried", lambda desk, choice: desk.retry(choice))


def run_priority(arguments: argparse.Namespace) -> int:
    return _changed(
        arguments,
        f"with priority {arguments.priority}",
        lambda desk, choice: desk.prioritise(choice, arguments.priority),
    )


def run_pause(arguments: argparse.Namespace) -> int:
    return _changed(arguments, "paused", lambda desk, choice: desk.pause(choice), whole=True)


def run_resume(arguments: argparse.Namespace) -> int:
    return _changed(arguments, "resumed", lambda desk, choice: desk.resume(choice), whole=True)


def _changed(arguments: argparse.Namespace, done: str, change: Callable, *, whole: bool = False) -> int:  # type: ignore[type-arg]
    def do() -> int:
        from stgfast.queue.desk import Choice, Desk

        asked = arguments.names or arguments.words or arguments.statuses or arguments.every
        choice = None
        if asked or not whole:
            choice = Choice(arguments.names, arguments.words, arguments.statuses, arguments.every)
        with Desk(arguments.out) as desk:
            names = change(desk, choice)
        if choice is None:
            sys.stdout.write(f"{arguments.out} {done}\n")
            return DONE
        sys.stdout.write(f"{len(names)} job{'s' * (len(names) != 1)} {done}{_listed(names)}\n")
        return DONE if names else NONE

    return _reported(arguments.command, do)


def run_status(arguments: argparse.Namespace) -> int:
    def show() -> int:
        from stgfast.queue.desk import Desk
        from stgfast.queue.status import status_of

        with Desk(arguments.out) as desk:
            status = status_of(desk)
        sys.stdout.write(json.dumps(status.to_dict()) + "\n" if arguments.json else table(status))
        return DONE

    return _reported("status", show)


def table(status) -> str:  # type: ignore[no-untyped-def]
    """A status as text."""
    counts = ", ".join(f"{count} {name}" for name, count in status.counts.items() if count) or "no jobs"
    lines = [counts]
    if status.inbox:
        lines.append(f"{status.inbox} added, not yet read by a run")
    if status.paused or status.held:
        lines.append("paused" if status.paused else f"{status.held} of the pending are paused")
    if not status.runs:
        lines.append("no active run")
    for run in status.runs:
        lines.append(f"process {run['pid']} on {run['host']} renders {run['model']}, for {clock(run['seconds'])}")
    if status.rate is not None:
        until = "" if status.seconds is None else f"; done in {clock(status.seconds)}"
        lines.append(f"{status.rate:.1f} clips an hour{until}")
    for job in status.running:
        step = f" {job.step}/{job.steps}" if job.steps else ""
        lines.append(f"  {job.stage + step:16} {clock(job.seconds):>8}  {job.file}")
    for file, error in status.failures[:SHOWN]:
        lines.append(f"  failed: {file}: {error}")
    for file, remark in status.strange[:SHOWN]:
        lines.append(f"  done, with a warning: {file}: {remark}")
    for name, error in status.refused[:SHOWN]:
        lines.append(f"  refused: {name}: {error}")
    return "".join(f"{_plain(line)}\n" for line in lines)


def clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ": " + _plain(", ".join(names[:SHOWN]) + more)


def _plain(text: str) -> str:
    """Text from job files without control characters, which a terminal might interpret."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _reported(command: str, do: Callable[[], int]) -> int:
    try:
        return do()
    except (SettingsError, StoreError) as error:
        sys.stderr.write(f"stgfast {command}: {_plain(str(error))}\n")
        return DISK if isinstance(error, StoreError) else WRONG
