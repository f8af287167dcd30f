"""Killed while other processes send commands. The same with 300 jobs and 10 kills: `python -m tests.render.asked`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stgfast.queue.desk import Choice, Desk
from stgfast.queue.status import status_of
from stgfast.render import batch_run, rendering
from stgfast.render.run import render
from tests.render import pipes

TEXT = {"pipeline": {"max_sequence_length": 16}}


def some(names):
    return [{**pipes.CALL, **TEXT, "prompt": "a red kite", "seed": n, "name": name} for n, name in enumerate(names)]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(rendering, "LOOK", 0.05)


def test_work_arrives_while_it_runs(tmp_path):
    """A waiting run takes added jobs, with its own defaults, and refuses those that the model cannot do."""
    events, defaults = [], {**pipes.CALL, **TEXT}

    def listener(event):
        events.append(event)
        kind = event["event"]
        with Desk(tmp_path) as desk:
            if kind == "done" and event["file"] == "b":
                added = [{"prompt": "a dog runs", "name": "c"}, {"prompt": "a", "width": 40, "name": "d"}]
                assert desk.add(added) == (2, [])
            elif kind == "done" and event["file"] == "c":
                assert status_of(desk).refused[0][0] == "d"
                signal.raise_signal(signal.SIGINT)

    settings = {"format": "png", "max_batch": 1, "defaults": defaults}
    report = render(pipes.guided(), some("ab"), tmp_path, wait=True, listener=listener, **settings)
    assert (report.done, report.rendered, report.interrupted) == (3, 3, True)
    told = [event["event"] for event in events]
    assert told.count("added") == told.count("refused") == 1
    (refused,) = [event for event in events if event["event"] == "refused"]
    assert "divisible by 16" in refused["error"]
    # Any run of the model takes added jobs, also one without a job file.
    with Desk(tmp_path) as desk:
        desk.add([{"prompt": "a dog runs", "name": "e"}])
    assert render(pipes.guided(), None, tmp_path, **settings).rendered == 1


def test_a_folder_is_paused_and_resumed(tmp_path):
    events = []

    def resume():
        with Desk(tmp_path) as desk:
            desk.resume()

    def listener(event):
        events.append(event)
        if [told["event"] for told in events].count("claimed") == 1 and event["event"] == "claimed":
            with Desk(tmp_path) as desk:
                desk.pause()
        elif event["event"] == "paused":
            threading.Timer(0.5, resume).start()

    report = render(pipes.guided(), some("abcdef"), tmp_path, format="png", max_batch=1, listener=listener)
    assert report.done == 6
    told = [event["event"] for event in events]
    between = told[told.index("paused") + 1 : told.index("resumed")]
    assert "claimed" not in between
    assert told.index("claimed") < told.index("paused")
    assert told.count("claimed") == told.count("done") == 6  # what was in flight was finished


def test_a_job_that_is_rendered_and_cancelled_leaves_nothing(tmp_path, monkeypatch):
    """The others of its batch are rendered; its clip is discarded."""
    events, write = [], batch_run.write

    def slow(*arguments):
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(batch_run, "write", slow)

    def listener(event):
        events.append(event)
        if event["event"] == "claimed":
            with Desk(tmp_path) as desk:
                assert desk.cancel(Choice(names=["b"])) == ["b"]

    report = render(pipes.guided(), some("abc"), tmp_path, format="png", listener=listener)
    assert (report.done, report.cancelled, report.failed, report.code) == (2, 1, 0, 0)
    assert [event["file"] for event in events if event["event"] == "cancelled"] == ["b"]
    assert not (tmp_path / "b").exists()


@pytest.mark.again
def test_asked_by_others_and_killed(tmp_path):
    command = [sys.executable, "-m", "tests.render.asked", "--jobs", "40", "--kills", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["kills"], result["jobs"]) == (2, 40)
    assert result["clips"] + result["cancelled"] == 40
    assert sum(result["claimed when killed"]) > 0  # a kill without claimed jobs tests nothing
