"""The output of a run, for people or programs.

Programs get lines of JSON. Each has `version`, the version of this format; `run`, the same in all lines of a run;
`time`; `event`; and the fields of that event.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from typing import Any, TextIO

VERSION = 1
NARROW = 72  # columns, below which there is no room for a bar
EVERY = 60.0  # seconds between progress lines, without a terminal for a bar


class Screen:
    """The output of one command."""

    def __init__(self, command: str, stdout: TextIO | None, stderr: TextIO | None, *, quiet: bool, as_json: bool):
        self.command, self.stdout, self.stderr, self.quiet, self.as_json = command, stdout, stderr, quiet, as_json
        self.run = uuid.uuid4().hex[:12]
        self.bar: Any = None
        self.bar_shown = 0.0
        self.report: dict[str, Any] = {}

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of the run. Raises BrokenPipeError if nobody reads the output any more."""
        kind = event["event"]
        if kind == "ended":
            self.report = {name: value for name, value in event.items() if name not in ("event", "code")}
        if self.as_json:
            if kind != "ended":  # it is shown last, with the exit code
                self._json(event)
            return
        if kind in ("done", "failed", "cancelled"):
            self._progress(event)
        if kind == "listed":
            self._line(self.stdout, f"{event['status']:10} {event['file']}")
        text = TEXTS.get(kind)
        if kind == "forecast":
            event = {"estimate": _forecast(event)}
        if text is not None and (not self.quiet or kind in ("bad", "failed", "refused", "strange")):
            self._line(self.stderr, text.format_map(event))

    def error(self, text: str) -> None:
        self.report["error"] = text
        self.complain(text)

    def complain(self, text: str) -> None:
        """Report an error that is not an event of the run."""
        try:
            if self.as_json:
                self._json({"event": "error", "error": text})
            else:
                self._line(self.stderr, f"stgfast {self.command}: {text}")
        except BrokenPipeError:  # nobody reads it
            return

    def ended(self, code: int) -> None:
        """The last line for programs, in all cases."""
        if not self.as_json:
            return
        try:
            self._json({"event": "ended", "code": code, **self.report})
        except BrokenPipeError:
            return

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _json(self, event: dict[str, Any]) -> None:
        line = {"version": VERSION, "run": self.run, "time": round(time.time(), 3), **event}
        self._line(self.stdout, json.dumps(line))

    def _progress(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        if not (self.stderr is not None and self.stderr.isatty()):
            if time.monotonic() - self.bar_shown > EVERY:  # a bar would fill a log
                self.bar_shown = time.monotonic()
                self._line(self.stderr, f"{event['finished']} of {event['total']} jobs finished")
            return
        if self.bar is None:
            from tqdm import tqdm

            narrow = shutil.get_terminal_size().columns < NARROW
            form = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]" if narrow else None
            before = event["finished"] - 1
            self.bar = tqdm(
                total=event["total"], initial=before, unit="clip", file=self.stderr, dynamic_ncols=True, bar_format=form
            )
        self.bar.total = event["total"]
        self.bar.update(event["finished"] - self.bar.n)

    def _line(self, stream: TextIO | None, text: str) -> None:
        if stream is None:
            return
        # Prompts and names come from job files: remove control characters, which a terminal might interpret.
        text = "".join(c if c.isprintable() else "\ufffd" for c in text)
        if self.bar is not None and not self.as_json:
            self.bar.clear()
        try:
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError) as error:
            # Nobody reads the output any more. Discard what is written from now on.
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                self.stdout = None if stream is self.stdout else self.stdout
                self.stderr = None if stream is self.stderr else self.stderr
            raise BrokenPipeError from error


def _forecast(event: dict[str, Any]) -> str:
    """The estimate of time and bytes, as far as it is known."""
    known = event["jobs"] - event["unknown"]
    if not known:
        return "time unknown: this folder has no clip of these shapes (--like names another folder)"
    hours, minutes = divmod(round(event["seconds"] / 60), 60)
    long = f"{hours} h {minutes} min" if hours or minutes else f"{event['seconds']:.0f} s"
    size, free = (f"{event[name] / 1e9:.2f} GB" for name in ("bytes", "free"))
    rest = f"; unknown for {event['unknown']} more" if event["unknown"] else ""
    small = ", which is not enough" if event["bytes"] > event["free"] else ""
    return f"{known} clips will take about {long} and {size}; the disk has {free}{small}{rest}"


TEXTS = {
    "bad": "line {line}: {error}",
    "refused": "added, line {line}: {error}",
    "added": "{jobs} jobs were added",
    "recovered": "{jobs} clips were claimed when an earlier run died; they are rendered again",
    "planned": "{pending} clips to render, {done} done, {failed} failed earlier",
    "kept": "{clips} finished clips have another format than {form}; they are kept",
    "broken": "{file}: cannot be read, and is rendered again: {why}",
    "forecast": "{estimate}",
    "loading": "loading {model}",
    "asking": "loading {model} on {actors} {each} of Ray",
    "ready": "ready on {device}",
    "joined": "actor {actor}: ready on {node}, {device}",
    "died": "{files}: retried, because the process died: {why}",
    "replaced": "a new worker process continues: {why}",
    "lost": "actor {actor} is lost: {why}",
    "overdue": "{files}: stopped: {why}",
    "failed": "{file}: {error}",
    "strange": "{file}: done, but {remark}",
    "cancelled": "{file}: cancelled",
    "again": "{files}: retried in smaller batches: {why}",
    "paused": "paused: no job starts until stgfast resume",
    "resumed": "resumed",
    "page": "the page about the folder could not be written: {error}",
    "stopping": "{why}: finishing what is in flight",
    "ended": "{rendered} rendered in {seconds:.1f} s; {done} done, {failed} failed, {waiting} waiting, {bad} bad lines",
}
