"""Actions at the end of a run: a command that receives the report as JSON, and a webhook."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stgfast.errors import wrong

PATIENCE = 60.0  # seconds for a command or a response


@dataclass(frozen=True)
class Hooks:
    """The actions at the end of a run.

    Attributes:
        on_done: a shell command, if all jobs are done.
        on_fail: a shell command for each other end.
        webhook: an address that receives the report in both cases.
    """

    on_done: str | None = None
    on_fail: str | None = None
    webhook: str | None = None

    def __post_init__(self) -> None:
        if self.webhook is not None and not self.webhook.startswith(("http://", "https://")):
            raise wrong("--webhook", self.webhook, "an address that begins with https:// or http://")

    def run(self, code: int, report: Mapping[str, Any], complain: Callable[[str], None]) -> None:
        """Run the hooks. One that fails is reported, and does not change the result of the run."""
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
