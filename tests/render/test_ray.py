"""Runs on a local Ray cluster: the same clips, whichever actor renders them, and whichever dies."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from stgfast.errors import DeviceError, SettingsError
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import actors, command, limits, models
from stgfast.render.actor import Actor, Ready
from stgfast.render.crew import Setup
from stgfast.render.files import Form, read_frames
from stgfast.render.gallery import NAME
from stgfast.render.models import described
from stgfast.render.run import render
from stgfast.version import __version__
from tests import forks
from tests.render import pipes, standins

pytestmark = pytest.mark.xdist_group("ray")  # one Ray for all of them


def test_one_worker_has_all_of_these(request):
    """Otherwise each worker would start a Ray cluster of its own."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@ray")


TEXT = {"pipeline": {"max_sequence_length": 16}}


def some(count, **more):
    return [
        {**pipes.CALL, **TEXT, "prompt": ("a red kite", "the grey sea")[n % 2], "seed": n, "name": f"k{n}", **more}
        for n in range(count)
    ]


@pytest.fixture
def together(monkeypatch):
    """Start no job while an actor loads. If loading takes long, no job might be left for that actor."""
    free = actors.Actors.free

    def later(crew):
        return [] if any(actor.hello for actor in crew.members) else free(crew)

    monkeypatch.setattr(actors.Actors, "free", later)


def go(model, jobs, out, events=None, also=None, **more):
    def listener(event):
        if events is not None:
            events.append(event)
        if also is not None:
            also(event)

    return render(model, jobs, out, **{"format": "png", "max_batch": 1, "listener": listener, **more})


def told(events, name):
    return [event for event in events if event["event"] == name]


def entries(out):
    return sorted(path.name for path in out.iterdir() if path.name != NAME)


def nothing_stray(out, names):
    assert entries(out) == sorted([FOLDER, *names])
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == ["jobs.db", "lock"]


def once(action, event, **wanted):
    """A listener that acts at the first event of a kind."""
    seen = []

    def listener(told):
        if told["event"] == event and not seen and all(told.get(name) == value for name, value in wanted.items()):
            seen.append(told)
            action(told)

    return listener


def killer(seconds=0.0):
    """Builds a pipeline that kills its process at a certain prompt."""

    def build():
        from stgfast import Guidance, Perturbation, accelerate

        pipe = accelerate(pipes.pipeline("wan"), Guidance(Perturbation([1])))
        encode = type(pipe).encode_prompt

        class WanPipeline(type(pipe)):
            def encode_prompt(self, prompt, *args, **kwargs):
                time.sleep(seconds)
                if "bad" in prompt:
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(self, prompt, *args, **kwargs)

        WanPipeline.encode_prompt.__wrapped__ = encode
        pipe.__class__ = WanPipeline
        return pipe

    return build


def test_two_actors_render_what_one_process_does(tmp_path, model, cluster, together):
    jobs, events, nice = some(8, steps=4), [], []

    def also(event):
        if event["event"] == "joined":
            nice.append(psutil.Process(event["pid"]).nice())

    report = go(str(model), jobs, tmp_path / "ray", events, also, ray="auto", actors=2)
    assert nice == [psutil.Process().nice()] * 2
    assert (report.done, report.rendered, report.code) == (8, 8, 0)
    done = told(events, "done")
    assert sorted(event["file"] for event in done) == sorted(job["name"] for job in jobs)
    assert {event["actor"] for event in done} == {0, 1}
    assert len({event["pid"] for event in told(events, "joined")} - {os.getpid()}) == 2
    assert {event["device"] for event in told(events, "claimed")} == {"cpu"}
    nothing_stray(tmp_path / "ray", [job["name"] for job in jobs])
    go(str(model), jobs, tmp_path / "local")
    for job in jobs:
        one, other = (read_frames(tmp_path / where / job["name"]) for where in ("ray", "local"))
        apart = abs(one.astype(int) - other)  # different by rounding if this process has more threads than the actors
        assert apart.max() <= 1, f"{job['name']}: {(apart > 0).sum()} of {apart.size} differ, by {apart.max()} at most"


@pytest.mark.again
def test_an_actor_that_is_killed_loses_nothing(tmp_path, model, cluster, together):
    """It is killed when the first of its clips is done. Its other claimed jobs are rendered again."""
    jobs, events = some(16, steps=8), []
    also = once(lambda event: os.kill(event["pid"], signal.SIGKILL), "done", actor=0)
    report = go(str(model), jobs, tmp_path / "out", events, also, ray="auto", actors=2, max_batch=2)
    assert (report.done, report.failed, report.code) == (16, 0, 0)
    done = [event["file"] for event in told(events, "done")]
    assert sorted(done) == sorted(job["name"] for job in jobs)
    lost = {file for event in told(events, "died") for file in event["files"]}
    assert lost
    assert {event["actor"] for event in told(events, "died")} == {0}
    nothing_stray(tmp_path / "out", done)
    with Store(tmp_path / "out") as found:
        deaths = dict(found.connection.execute("SELECT file, deaths FROM jobs").fetchall())
    assert {file for file, count in deaths.items() if count} == lost
    again = [job for job in jobs if job["name"] in lost]
    go(str(model), again, tmp_path / "local", max_batch=2)
    for name in lost:
        one, other = (read_frames(tmp_path / where / name).astype(int) for where in ("out", "local"))
        assert np.abs(one - other).max() <= 1, name


@pytest.mark.again
def test_a_broken_device_and_a_job_that_kills(tmp_path, cluster, monkeypatch):
    """For an unusable device a new process is started. A job that kills every process fails, and no other with it."""
    here, marker = os.getpid(), tmp_path / "broke"
    build = killer()

    def breaking():
        if os.getpid() == here or marker.exists():
            return build()
        from stgfast.render import worker

        def breaks(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        marker.touch()
        pipe = pipes.pipeline("wan")
        pipe.vae.decode = breaks
        worker.BatchRun._broken = lambda run: RuntimeError("CUDA error")
        return pipe

    monkeypatch.setitem(models.NAMED, "breaking", pipes.named(breaking))
    jobs, events = some(4), []
    jobs[1]["prompt"] = "bad"
    report = go("breaking", jobs, tmp_path / "out", events, ray="auto", retries=1)
    assert (report.done, report.failed, report.code) == (3, 1, 1)
    (failed,) = told(events, "failed")
    assert failed["file"] == "k1"
    assert "the process that rendered it died 2 times, the last time while no other job was claimed" in failed["error"]
    first, *_, last = told(events, "died")
    assert first["why"] == "actor 0: RuntimeError: CUDA error"
    assert last["files"] == ["k1"]
    assert len({event["pid"] for event in told(events, "joined")}) >= 2
    nothing_stray(tmp_path / "out", ["k0", "k2", "k3"])


@pytest.mark.again
def test_no_actor_is_left(tmp_path, cluster, monkeypatch):
    monkeypatch.setitem(models.NAMED, "killer", pipes.named(killer(seconds=0.5)))
    monkeypatch.setattr(actors, "LIVES", 1)
    jobs = some(4)
    jobs[3]["prompt"] = "bad"
    with pytest.raises(DeviceError, match=r"no actor is left, .* died 1 times in a row: .*; finished clips are kept$"):
        go("killer", jobs, tmp_path, ray="auto")
    with Store(tmp_path) as found:
        states = [row.status for row in found.rows(every=True)]
    assert states.count("pending") + states.count("done") == 4
    assert states[3] == "pending"


@pytest.mark.again
def test_an_actor_that_dies_while_it_loads_is_given_up(tmp_path, cluster, monkeypatch):
    here = os.getpid()

    def build():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return pipes.pipeline("wan")

    monkeypatch.setitem(models.NAMED, "heavy", pipes.named(build))
    monkeypatch.setattr(actors, "LIVES", 1)
    with pytest.raises(DeviceError, match="no actor is left"):
        go("heavy", some(1), tmp_path, ray="auto")


@pytest.mark.again
def test_the_cluster_is_gone(tmp_path, model, cluster, monkeypatch):
    monkeypatch.setattr(actors, "GONE", 0.5)
    monkeypatch.setattr(actors, "ANSWER", 0.1)
    also = once(lambda event: monkeypatch.setattr(actors, "answers", lambda address: False), "done")
    with pytest.raises(DeviceError, match=r"^the Ray cluster at 127\.0\.0\.1:\d+ does not answer any more"):
        go(str(model), some(200, steps=20), tmp_path, also=also, ray="auto")
    with Store(tmp_path) as found:
        states = {row.status for row in found.rows(every=True)}
    assert states == {"pending", "done"}


def test_an_interruption_finishes_what_is_in_hand(tmp_path, model, cluster):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    also, events = once(lambda event: os.kill(os.getpid(), signal.SIGINT), "done"), []
    report = go(str(model), some(40, steps=20), tmp_path, events, also, ray="auto")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (report.interrupted, report.code) == (True, 130)
    assert report.done + report.waiting == 40
    assert 1 <= report.done <= 1 + actors.IN_HAND
    assert told(events, "died") == []
    nothing_stray(tmp_path, [event["file"] for event in told(events, "done")])


@pytest.mark.again
def test_a_second_interruption_stops_at_once(tmp_path, model, cluster):
    def twice(event):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    report = go(str(model), some(4, steps=1000), tmp_path, also=once(twice, "claimed"), ray="auto")
    assert (report.code, report.done, report.waiting) == (130, 0, 4)
    assert entries(tmp_path) == [FOLDER]


@pytest.mark.again
def test_a_model_that_an_actor_does_not_see(tmp_path, model, cluster):
    away = model.with_name("away")
    also = once(lambda event: model.rename(away), "asking")
    try:
        with pytest.raises(SettingsError, match=r"^model on .*: got '.*', expected a folder that every node sees$"):
            go(str(model), some(2), tmp_path / "out", also=also, ray="auto")
    finally:
        away.rename(model)
    assert entries(tmp_path / "out") == [FOLDER]


def test_what_an_actor_says_where_it_cannot_render(tmp_path, model, monkeypatch):
    monkeypatch.setattr(actors, "ANSWER", 0.0)
    form = Form(kind="png")
    setup = Setup(described(str(model)), form, own_fps=True)
    folder = tmp_path / "out" / FOLDER / "runner"
    folder.mkdir(parents=True)
    (folder / "token").write_text("token")
    said = Actor(setup, True, folder, "token", __version__).load()
    assert isinstance(said, Ready)
    assert (said.device_name, said.pid) == ("cpu", os.getpid())
    said = Actor(setup, True, folder, "other", __version__).load()
    assert said.ours
    assert said.why.startswith(f"output folder {tmp_path / 'out'}: got 'another one on ")
    said = Actor(setup, True, folder, "token", "0.0").load()
    assert said.ours
    assert said.why.endswith(f"got '{__version__}', expected the version of the run, 0.0")

    faults = {
        MemoryError("no room"): "has less memory than the model takes: offload text, model or group takes less",
        OSError("no such file"): "model: got one that cannot be loaded: OSError: no such file",
    }
    for fault, why in faults.items():

        def fails(fault=fault):
            raise fault

        other = described(str(model))
        object.__setattr__(other, "build", fails)
        said = Actor(Setup(other, form, own_fps=True), True, folder, "token", __version__).load()
        assert not said.ours  # another device may do
        assert said.why.endswith(why)


def test_devices_that_are_alike():
    """If a job does not fit into the memory of one, it fits into none. Of one that is not ready, nothing is known."""
    for names, alike in ((["H100", "H100"], True), (["H100", "L4"], False), (["H100", ""], False)):
        crew = SimpleNamespace(members=[SimpleNamespace(device_name=name) for name in names])
        assert actors.Actors.alike.fget(crew) is alike


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ray": "somewhere"}, r"^ray: got 'somewhere', expected \"local\", \"auto\", or the host:port of a cluster$"),
        ({"ray": "ray://head:10001"}, r"^ray: got 'ray://head:10001', expected"),
        ({"ray": "auto", "actors": 0}, r"^actors: got 0, expected a number, 1 or more$"),
        ({"actors": 2}, r"^actors: got 2, expected none without ray"),
    ],
)
def test_wrong_settings(tmp_path, model, given, message):
    with pytest.raises(SettingsError, match=message):
        go(str(model), some(1), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_cannot_be_sent(tmp_path):
    with pytest.raises(SettingsError, match=r"^model: got 'WanPipeline', expected a folder or a name: "):
        go(pipes.pipeline("wan"), some(1), tmp_path / "out", ray="auto")


def test_ray_is_not_installed(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r'^ray: got .*, expected it installed: pip install "stgfast\[ray\]"$'):
        go(str(model), some(1), tmp_path / "out", ray="auto")


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.mark.again
def test_the_command_with_a_ray_of_its_own(tmp_path, model):
    """An actor dies, then Ctrl-C reaches every process of the terminal. Only JSON is printed."""
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in some(300, steps=20)))
    arguments = ["render", "jobs.jsonl", "--model", model, "--out", "out", "--ray", "local", "--json", "--format=png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stgfast.cli", *map(str, arguments)], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    events, printed, listening = [], [], set()
    for line in process.stdout:
        printed.append(line)
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
        names = [event["event"] for event in events]
        if names.count("done") == 1 and names[-1] == "done":
            listening |= addresses(process.pid)
            os.kill(events[-1]["pid"], signal.SIGKILL)
        if names.count("joined") == 2 and names[-1] == "joined":
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert [line for line in printed if not line.startswith("{")] == []
    assert process.stderr.read() == ""
    ended = events[-1]
    assert (ended["event"], ended["interrupted"], ended["failed"]) == ("ended", True, 0)
    assert 1 <= ended["done"] < 300
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listening
    nothing_stray(tmp_path / "out", [event["file"] for event in told(events, "done")])


def addresses(pid):
    """The addresses on which a process and its children listen."""
    here = psutil.Process(pid)
    sockets = [socket for one in (here, *here.children(recursive=True)) for socket in one.net_connections("inet")]
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


@pytest.mark.again
def test_ray_is_imported_where_it_is_asked_for(tmp_path, model):
    """In a separate process, for which there is no cluster at this address."""
    code = f"""
import sys, stgfast
from tests.render import pipes, standins
jobs = [dict(pipes.CALL, prompt="a", pipeline=dict(max_sequence_length=16))]
stgfast.render({str(model)!r}, jobs, "out")
print("ray" in sys.modules)
told = []
try:
    stgfast.render({str(model)!r}, jobs, "other", ray="127.0.0.1:1", listener=told.append)
except ValueError as error:
    print(error)
print([event["event"] for event in told])
"""
    command = [sys.executable, *forks.FORKED, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True)
    imported, error, events = found.stdout.splitlines()
    assert imported == "False"
    assert error.startswith("ray: got '127.0.0.1:1', expected a cluster that answers there; ")
    assert events == "['planned']"


def test_the_option(tmp_path, model):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_sweep(parser)
    arguments = ["a", "--layers", "1", "--scales", "1", "--model", str(model), "--out", str(tmp_path), "--ray", "no"]
    stderr = io.StringIO()
    assert command.run(parser.parse_args(arguments), io.StringIO(), stderr) == 2
    assert stderr.getvalue() == f"stgfast render: ray: got 'no', expected {actors.ADDRESSES}\n"


@pytest.mark.again
@pytest.mark.parametrize("what", ["sleeps", "blocks all"])
def test_a_job_that_hangs_fails_within_its_limit(tmp_path, cluster, monkeypatch, what):
    """One whose thread can be stopped, and one that can be stopped only with its actor."""
    monkeypatch.setitem(models.NAMED, "standing", standins.named(what))
    monkeypatch.setattr(limits, "GRACE", 1.0)
    jobs, events = some(20), []
    for number, job in enumerate(jobs):
        job["prompt"] = "bad" if number == 7 else "a kite"
    report = go("standing", jobs, tmp_path / "out", events, ray="auto", timeout=5.0)
    assert (report.done, report.failed, report.waiting, report.code) == (19, 1, 0, 1)
    (failed,) = told(events, "failed")
    assert failed["file"] == "k7"
    assert failed["error"].startswith("it took longer than 5 s")
    assert (len(told(events, "joined")) == 1) == (what == "sleeps")
    nothing_stray(tmp_path / "out", [job["name"] for job in jobs if job["name"] != "k7"])
