"""A worker process: jobs that hang, or kill their process, fail alone, and the run continues."""

import collections
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from stgfast.errors import DeviceError, LoadError
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import limits, models, process, rendering, worker
from stgfast.render.gallery import NAME
from stgfast.render.run import render
from tests import forks
from tests.render import pipes, standins

pytestmark = pytest.mark.xdist_group("commands")  # one after the other
TEXT = {"pipeline": {"max_sequence_length": 16}}
LIMIT = 8.0  # seconds; a small clip takes less, even on a busy machine


def some(count, bad=()):
    return [
        {**pipes.CALL, **TEXT, "prompt": "bad" if n in bad else "a red kite", "seed": n, "name": f"k{n:02}"}
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(limits, "GRACE", 1.0)
    monkeypatch.setattr(rendering, "LOOK", 0.1)


def go(model, jobs, out, events, **more):
    return render(model, jobs, out, **{"format": "png", "max_batch": 1, "listener": events.append, **more})


def told(events, name):
    return [event for event in events if event["event"] == name]


def nothing_stray(out, files):
    assert sorted(path.name for path in out.iterdir()) == sorted([FOLDER, NAME, *files])
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == ["jobs.db", "lock"]


def children():
    return [child.pid for child in psutil.Process().children() if child.name() == "child"]  # a fork has a module's name


@pytest.mark.parametrize("what", ["sleeps", "blocks", "blocks all"])
def test_a_job_that_hangs_fails_within_its_limit(tmp_path, monkeypatch, what):
    monkeypatch.setitem(models.NAMED, "standing", standins.named(what))
    events = []
    report = go("standing", some(20, bad=[7]), tmp_path / "out", events, timeout=LIMIT)
    assert (report.done, report.failed, report.waiting, report.code) == (19, 1, 0, 1)
    (failed,) = told(events, "failed")
    assert failed["file"] == "k07"
    where = "its first stage" if what == "blocks all" else "denoise"
    assert failed["error"].startswith(f"it took longer than {LIMIT:g} s (in {where}")
    # A thread that can be stopped costs no process. If it is unknown which of several batches hangs, two are needed.
    assert len(told(events, "ready")) == {"sleeps": 1, "blocks": 2, "blocks all": 3}[what]
    nothing_stray(tmp_path / "out", [f"k{n:02}" for n in range(20) if n != 7])
    assert children() == []
    with Store(tmp_path / "out") as store:
        assert collections.Counter(row.attempts for row in store.rows(every=True))[1] >= 15  # others were in flight


@pytest.fixture
def unwatched(monkeypatch):
    """Remove from this process what a test model put into it."""
    monkeypatch.setattr(worker.BatchRun, "watched", False, raising=False)
    monkeypatch.setattr(worker.BatchRun, "clips", worker.BatchRun.clips)


@pytest.mark.parametrize("what", ["sleeps", "blocks"])
@pytest.mark.parametrize("handed_over", [False, True], ids=["by name", "a pipeline"])
def test_a_job_that_hangs_in_the_process_of_the_run(tmp_path, monkeypatch, unwatched, what, handed_over):
    monkeypatch.setitem(models.NAMED, "standing", standins.named(what))
    model, more = (standins.build(what), {}) if handed_over else ("standing", {"same_process": True})
    events = []
    report = go(model, some(20, bad=[7]), tmp_path / "out", events, timeout=LIMIT, **more)
    assert (report.done, report.failed, report.waiting) == (19, 1, 0)
    assert [event["file"] for event in told(events, "failed")] == ["k07"]
    nothing_stray(tmp_path / "out", [f"k{n:02}" for n in range(20) if n != 7])


@pytest.mark.again
def test_a_batch_that_hangs_is_rendered_one_by_one(tmp_path, monkeypatch, unwatched):
    monkeypatch.setitem(models.NAMED, "standing", standins.named("sleeps"))
    events = []
    more = {"timeout": 2.0, "max_batch": 3, "same_process": True}
    report = go("standing", some(6, bad=[2]), tmp_path / "out", events, **more)
    assert (report.done, report.failed) == (5, 1)
    assert [event["file"] for event in told(events, "failed")] == ["k02"]
    assert told(events, "again")[0]["files"] == ["k00", "k01", "k02"]


def test_limits_are_by_what_others_took(tmp_path, monkeypatch, unwatched):
    """Without rendered clips, a batch may be silent for a while; later it may take many times their time."""
    monkeypatch.setitem(models.NAMED, "standing", standins.named("sleeps"))
    monkeypatch.setattr(limits, "QUIET", 3.0)
    events, here = [], {"same_process": True}
    assert go("standing", some(1, bad=[0]), tmp_path / "out", events, **here).failed == 1
    assert told(events, "failed")[0]["error"].startswith("it made no progress for 3 s (in denoise")
    assert go("standing", some(2, bad=[0]), tmp_path / "out", events, **here).done == 1
    monkeypatch.setattr(limits, "LEAST", 3.5)
    monkeypatch.setattr(limits, "GENEROUS", 0.01)
    assert go("standing", some(1, bad=[0]), tmp_path / "out", events, retry_failed=True, **here).failed == 1
    assert told(events, "failed")[-1]["error"].startswith("it took longer than 3.5 s (in denoise")


@pytest.mark.parametrize("what", ["exits", "is killed", "breaks the device"])
def test_a_job_that_takes_its_process_down_fails(tmp_path, monkeypatch, what):
    """And no other job with it. Jobs that were rendered beside it are not blamed forever."""
    monkeypatch.setitem(models.NAMED, "standing", standins.named(what))
    events = []
    report = go("standing", some(12, bad=[3]), tmp_path / "out", events, max_batch=2)
    assert (report.done, report.failed, report.waiting, report.code) == (11, 1, 0, 1)
    (failed,) = told(events, "failed")
    assert failed["file"] == "k03"
    why = {
        "exits": "the worker process ended with exit code 137",
        "is killed": "the worker process was ended by SIGKILL, as the system does when memory is short",
        "breaks the device": "RuntimeError: CUDA error",
    }[what]
    said = "the process that rendered it died 3 times, the last time while no other job was claimed: "
    assert failed["error"] == said + why
    assert [event["files"] for event in told(events, "died")][-1] == ["k03"]
    nothing_stray(tmp_path / "out", [f"k{n:02}" for n in range(12) if n != 3])


@pytest.mark.again
def test_what_may_be_the_machine_s_fault_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setitem(models.NAMED, "standing", standins.named("is killed", tmp_path / "marker"))
    events = []
    report = go("standing", some(6, bad=[1]), tmp_path / "out", events, max_batch=2)
    assert (report.done, report.failed, report.code) == (6, 0, 0)
    assert len(told(events, "died")) == 1
    assert len(told(events, "replaced")) == 1


@pytest.mark.again
def test_a_process_that_always_dies_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setitem(models.NAMED, "dying", pipes.named(dying))
    monkeypatch.setattr(process, "LIVES", 2)
    said = "the worker process died 2 times in a row, the last time because: .* exit code 9"
    with pytest.raises(DeviceError, match=said):
        go("dying", some(2), tmp_path / "out", [])
    assert children() == []
    with Store(tmp_path / "out") as store:
        assert [row.status for row in store.rows(every=True)] == ["pending", "pending"]


def dying():
    os._exit(9)


def test_a_model_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setitem(models.NAMED, "wrong", pipes.named(unloadable))
    with pytest.raises(LoadError, match="ValueError: no weights"):
        go("wrong", some(1), tmp_path / "out", [])
    monkeypatch.setitem(models.NAMED, "slow", pipes.named(standins.forever))
    monkeypatch.setattr(process, "LOADING", 1.0)
    monkeypatch.setattr(process, "LIVES", 1)
    with pytest.raises(DeviceError, match="the model was not loaded after 1 s"):
        go("slow", some(1), tmp_path / "out", [])
    assert children() == []


def unloadable():
    raise ValueError("no weights")


def test_the_process_ends_with_the_run(tmp_path):
    """However that ends: here by SIGKILL, while the worker process does nothing that could notice it."""
    code = """
    import sys
    from stgfast.render import models
    from stgfast.render.run import render
    from tests.render import standins
    from tests.render.test_process import some
    models.NAMED["standing"] = standins.named("blocks all")
    render("standing", some(1, bad=[0]), sys.argv[1], format="png", listener=lambda event: print(event, flush=True))
    """
    command = [sys.executable, *forks.FORKED, "-c", textwrap.dedent(code), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = 0
        for line in parent.stdout:
            if "'event': 'claimed'" in line:
                pid = int(line.split("'pid': ")[1].rstrip("}\n, "))
                break
        time.sleep(2.0)  # it hangs
        parent.kill()
    with Store(tmp_path / "out") as store:
        until = time.monotonic() + 20
        while not store.recover():  # the other process has the lock of the run too
            assert time.monotonic() < until, "the process that renders lives on"
            time.sleep(0.1)
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        deaths = store.connection.execute("SELECT deaths, status FROM jobs").fetchall()
    assert [tuple(row) for row in deaths] == [(0, "pending")]  # a killed run blames no job


@pytest.fixture
def hangs_up():
    """SIGHUP has its default action, also if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_loses_nothing(tmp_path, monkeypatch, hangs_up, unwatched):
    monkeypatch.setitem(models.NAMED, "standing", standins.named("sleeps"))
    events = []

    def listener(event):
        events.append(event)
        if event["event"] == "done" and len(told(events, "done")) == 1:
            os.kill(os.getpid(), signal.SIGHUP)  # as when the terminal closes

    more = {"format": "png", "listener": listener, "same_process": True}
    report = render("standing", some(12), tmp_path / "out", max_batch=1, **more)
    assert report.interrupted
    assert report.code == 130
    assert 1 <= report.done < 12
    assert told(events, "stopping")[0]["why"] == "SIGHUP"
    with Store(tmp_path / "out") as store:
        found = store.connection.execute("SELECT deaths FROM jobs").fetchall()
    assert {row[0] for row in found} == {0}
    assert render("standing", some(12), tmp_path / "out", **more).done == 12


def test_the_process_inherits_the_lock_of_its_run(tmp_path, monkeypatch):
    """As long as the process may write, the run counts as alive."""
    monkeypatch.setitem(models.NAMED, "standing", standins.named("sleeps"))
    held = []

    def listener(event):
        if event["event"] == "ready":
            (lock,) = (tmp_path / "out" / FOLDER).glob("*/lock")
            handles = Path(f"/proc/{event['pid']}/fd").iterdir()
            held.append(str(lock.resolve()) in {os.readlink(handle) for handle in handles})

    assert render("standing", some(1), tmp_path / "out", format="png", listener=listener).done == 1
    assert held == [True]
