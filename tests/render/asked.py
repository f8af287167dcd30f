"""A run that is killed many times, while other processes add, cancel, pause and prioritise jobs at random.

    python -m tests.render.asked --jobs 300 --kills 10

In the end every job that was not cancelled is rendered once, no cancelled job is, and the states match the files.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stgfast.queue.desk import Desk
from stgfast.queue.state import CANCELLED, DONE, FOLDER
from stgfast.queue.status import status_of
from stgfast.render.gallery import NAME
from tests.render import pipes

CLI = [sys.executable, "-m", "stgfast.cli"]
STEPS = 24  # so that jobs are claimed at a kill
SETS = [f"--set={name}={value}" for name, value in {**pipes.CALL, "steps": STEPS}.items()] + [
    '--set=pipeline={"max_sequence_length": 16}'
]
CROWD = 3  # processes that send commands at the same time


class Asker:
    """Sends commands to a folder from a shell, and remembers what was cancelled."""

    def __init__(self, out: Path, rng: random.Random, jobs: int):
        self.out, self.rng, self.jobs = out, rng, jobs
        self.added: list[str] = []
        self.cancelled: set[str] = set()
        self.asked: collections.Counter[str] = collections.Counter()

    def ask(self, *arguments: str) -> subprocess.Popen[str]:
        self.asked[arguments[0]] += 1
        command = [*CLI, *arguments, "--out", str(self.out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def round(self) -> None:
        """Several commands at once."""
        several = [
            (kind, self.ask(*arguments)) for kind, *arguments in (self.choice() for _ in range(CROWD)) if arguments
        ]
        for kind, process in several:
            said, _ = process.communicate(timeout=60)
            assert process.returncode in (0, 1), said  # 1: no unfinished job has this name
            if kind == "cancel" and process.returncode == 0:
                self.cancelled |= {name.strip().removesuffix(".mp4") for name in said.split(":", 1)[1].split(",")}

    def choice(self) -> list[str]:
        kind = self.rng.choices(("add", "cancel", "priority", "pause", "resume"), (10, 3, 3, 2, 3))[0]
        if kind == "add" and len(self.added) < self.jobs:
            return [kind, kind, self.more()]
        if kind in ("cancel", "priority", "pause") and self.added:
            name = self.rng.choice(self.added)
            middle = [str(self.rng.randint(-5, 5))] if kind == "priority" else []
            return [kind, kind, *middle, name] if kind != "pause" or self.rng.random() < 0.8 else [kind, kind]
        if kind == "resume":
            return [kind, kind] if self.rng.random() < 0.5 else [kind, kind, "--all"]
        return [kind]

    def more(self) -> str:
        names = [f"k{number:03}" for number in range(len(self.added), min(self.jobs, len(self.added) + 12))]
        self.added += names
        path = self.out.parent / f"{names[0]}.jsonl"
        lines = [json.dumps({"prompt": "a red kite", "seed": int(name[1:]), "name": name}) for name in names]
        path.write_text("\n".join(lines))
        return str(path)


def start(model: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [*CLI, "render", "--wait", "--json", "--model", str(model), "--out", str(out), "--max-batch", "3", *SETS]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--between", type=float, default=14.0, help="seconds between kills, at most")
    arguments = parser.parse_args(argv)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder, "model"), Path(folder, "out")
        pipes.pipeline("wan").save_pretrained(model)
        asker = Asker(out, rng, arguments.jobs)
        while not asker.added:
            asker.round()
        killed: list[int] = []
        logs = [Path(folder, "log-0")]
        run, until = start(model, out, logs[-1]), time.monotonic() + rng.uniform(7.0, arguments.between)
        while len(killed) < arguments.kills or len(asker.added) < arguments.jobs:
            asker.round()
            assert run.poll() is None, logs[-1].read_text()[-2000:]
            if time.monotonic() < until or len(killed) == arguments.kills:
                continue
            with Desk(out) as desk:
                claimed = sum(status_of(desk).counts[name] for name in ("claimed", "publishing"))
            if claimed or time.monotonic() > until + 5:
                # Half of the kills hit the run only, the others also the worker process.
                (os.killpg if len(killed) % 2 else os.kill)(run.pid, signal.SIGKILL)
                run.wait()
                killed.append(claimed)
                logs.append(Path(folder, f"log-{len(killed)}"))
                run, until = start(model, out, logs[-1]), time.monotonic() + rng.uniform(7.0, arguments.between)
        for command in (("resume",), ("resume", "--all")):
            asker.ask(*command).wait()
        finish(run, out, logs[-1])
        told = {
            "kills": len(killed),
            "claimed when killed": killed,
            **check(asker, out, logs),
            "asked": dict(asker.asked),
        }
        sys.stdout.write(json.dumps(told) + "\n")
    return 0


def finish(run: subprocess.Popen[bytes], out: Path, log: Path) -> None:
    """Wait until no job waits, then end the run."""
    until = time.monotonic() + 600
    while True:
        with Desk(out) as desk:
            found = status_of(desk)
        ready = '"event": "ready"' in log.read_text()  # before that, a signal ends it like any process
        if ready and not found.inbox and not sum(found.counts[name] for name in ("pending", "claimed", "publishing")):
            break
        assert time.monotonic() < until, found
        assert run.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    code = run.wait(60)
    assert code == 130, (code, log.read_text()[-2000:])


def check(asker: Asker, out: Path, logs: list[Path]) -> dict[str, int]:
    with Desk(out) as desk:
        rows = {row["file"]: row for row in desk.connection.execute("SELECT * FROM jobs").fetchall()}
        refused = desk.connection.execute("SELECT error FROM inbox").fetchall()
    assert not refused, [row[0] for row in refused]
    files = {path.name for path in out.iterdir()} - {FOLDER, NAME}
    wanted = {f"{name}.mp4" for name in set(asker.added) - asker.cancelled}
    assert files == wanted, (sorted(files - wanted), sorted(wanted - files))
    # Jobs that were cancelled before a run read them are not in the state.
    assert {file for file, row in rows.items() if row["status"] == DONE} == wanted
    others = {file: row["status"] for file, row in rows.items() if file not in wanted}
    assert set(others.values()) <= {CANCELLED}, others
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == ["jobs.db", "lock"]
    lines = [
        line for log in logs for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")
    ]
    events = [json.loads(line) for line in lines]
    done = collections.Counter(event["file"] for event in events if event["event"] == "done")
    assert not done or max(done.values()) == 1, done.most_common(3)
    assert set(done) <= wanted
    return {
        "jobs": len(asker.added),
        "clips": len(files),
        "cancelled": len(asker.cancelled),
        "attempts": sum(row["attempts"] for row in rows.values()),
        "deaths": sum(row["deaths"] for row in rows.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
