"""Who is told when a run is over: a command that gets the report as JSON, and an address that it is sent to."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stgfast.errors import wrong

PATIENCE = 60.0  # seconds for a command, or an answer


@dataclass(frozen=True)
class Hooks:
    """What is to be done at the end of a run.

    on_done  a command of the shell, where all is done
    on_fail  one for every other end
    webhook  an address to which the report is sent in either case
    """

    on_done: str | None = None
    on_fail: str | None = None
    webhook: str | None = None

    def __post_init__(self) -> None:
        if self.webhook is not None and not self.webhook.startswith(("http://", "https://")):
            raise wrong("--webhook", self.webhook, "an address that begins with https:// or http://")

    def run(self, code: int, report: Mapping[str, Any], complain: Callable[[str], None]) -> None:
        """A hook that fails is complained of, and changes nothing about how the run ended."""
        text = json.dumps({**report, "code": code})
        name, command = ("--on-fail", self.on_fail) if code else ("--on-done", self.on_done)
        if command:
            try:
                done = subprocess.run(command, shell=True, input=text, text=True, timeout=PATIENCE, check=False)
                if done.returncode:
                    complain(f"{name}: the command ended with exit code {done.returncode}")
            except (OSError, subprocess.TimeoutExpired) as error:
                complain(f"{name}: {error}")
        if self.webhook:
            headers = {"Content-Type": "application/json", "User-Agent": "stgfast"}
            request = urllib.request.Request(self.webhook, text.encode(), headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE):
                    pass
            except (OSError, ValueError) as error:
                complain(f"--webhook: {error}")
