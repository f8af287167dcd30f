"""Clips made by several processes together, started by torchrun or by Ray."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from stgfast import cli
from stgfast.errors import SettingsError
from stgfast.render import together
from stgfast.render.files import metadata_of, read_frames
from stgfast.render.models import described
from stgfast.render.run import render
from tests import forks
from tests.render import pipes
from tests.render.test_ray import entries, go, nothing_stray, once, some, told

TOY = described("toy")
ray = pytest.mark.xdist_group("ray")
PATIENCE = 120


def torchrun(model, jobs, out, *, processes=2, popen=subprocess.Popen, **streams):
    file = out.parent / "jobs.jsonl"
    file.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [*launch, "-m", "stgfast.cli", "render", str(file), "--model", str(model), "--out", str(out)]
    more = ["--format", "png", "--max-batch", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return popen([*command, *more], env=environment, text=True, **streams)


def same_clips(one, other, names):
    for name in names:
        frames = [read_frames(folder / name).astype(int) for folder in (one, other)]
        assert np.abs(frames[0] - frames[1]).max() <= 1, name


def rank_of(process):
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


@pytest.mark.xdist_group("commands")
def test_started_by_torchrun(tmp_path, model):
    jobs, out = some(5, steps=3), tmp_path / "out"
    running = torchrun(model, jobs, out, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said, _ = running.communicate(timeout=PATIENCE)
    events = [json.loads(line) for line in said.splitlines()]  # of the first process only
    assert running.returncode == 0
    assert [event["rendered"] for event in told(events, "ended")] == [5]
    names = [job["name"] for job in jobs]
    nothing_stray(out, names)
    go(str(model), jobs, tmp_path / "alone", max_batch=2, same_process=True)
    same_clips(out, tmp_path / "alone", names)
    assert metadata_of(out / names[0])["processes"] == 2


def test_what_is_wrong_is_said_once(monkeypatch, tmp_path, capsys):
    """Each process that torchrun started has the same arguments."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["render", "jobs.jsonl", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("stgfast render: ") == 1


@pytest.mark.again
def test_a_process_of_torchrun_that_is_killed(tmp_path, model):
    """The first process reports why it ends, and finished clips are kept. The next start renders the rest."""
    jobs, out = some(6, steps=40), tmp_path / "out"
    with (tmp_path / "said").open("w+") as said:
        # Forks would not show their rank in their environment.
        running = torchrun(model, jobs, out, popen=forks.STARTED, stdout=said, stderr=subprocess.DEVNULL)
        while '"done"' not in (tmp_path / "said").read_text():
            assert running.poll() is None
            time.sleep(0.02)
        (second,) = [one for one in psutil.Process(running.pid).children(recursive=True) if rank_of(one) == "1"]
        second.kill()
        assert running.wait(PATIENCE) != 0
    done = entries(out)
    assert 0 < len(done) < 7
    again = torchrun(model, jobs, out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert again.wait(PATIENCE) == 0
    nothing_stray(out, [job["name"] for job in jobs])


@ray
@pytest.mark.parametrize("which", ["a follower", "the first"])
def test_a_group_of_actors_that_loses_one(tmp_path, model, cluster, which):
    """The death of one actor ends its group only, which starts again: no clip is lost or rendered twice."""
    jobs, events = some(8, steps=12), []

    def kill(event):
        followers = [one.pid for one in psutil.process_iter() if "Follower" in one.name() or titled(one)]
        os.kill(event["pid"] if which == "the first" else followers[0], signal.SIGKILL)

    report = go(str(model), jobs, tmp_path / "out", events, once(kill, "done"), ray="auto", gpus_per_clip=2)
    assert (report.done, report.failed, report.code) == (8, 0, 0), [
        e for e in events if e["event"] not in ("claimed", "done")
    ]
    assert told(events, "died")
    assert len({event["pid"] for event in told(events, "joined")}) == 2
    names = [job["name"] for job in jobs]
    nothing_stray(tmp_path / "out", names)
    go(str(model), jobs, tmp_path / "alone", same_process=True)
    same_clips(tmp_path / "out", tmp_path / "alone", names)


def titled(process):
    try:
        return any("Follower" in word for word in process.cmdline())
    except psutil.Error:
        return False


@ray
def test_more_processes_than_the_cluster_has(tmp_path, model, cluster):
    with pytest.raises(SettingsError, match=r"^gpus_per_clip: got 1000, expected a divisor of the actors, 1000, for"):
        go(str(model), some(1), tmp_path, ray="auto", gpus_per_clip=1000)
    with pytest.raises(SettingsError, match=r"^gpus_per_clip: got 2, expected a divisor of the actors, 1, for which"):
        go(str(model), some(1), tmp_path, ray="auto", gpus_per_clip=2, actors=1)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "2"])
def test_a_number_of_processes_that_is_none(wrong):
    with pytest.raises(SettingsError, match=r"gpus_per_clip: got .*, expected a number of GPUs, 1 or more"):
        together.check(wrong, None, TOY)


def test_processes_that_nobody_starts(tmp_path):
    with pytest.raises(SettingsError, match=r"^gpus_per_clip: got 2, expected ray beside it, or torchrun"):
        render("toy", [{"prompt": "a"}], tmp_path, gpus_per_clip=2)


def test_what_does_not_go_with_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert together.check(None, None, TOY) == together.check(4, None, TOY) == 4
    with pytest.raises(SettingsError, match="gpus_per_clip: got 2, expected 4, as many as torchrun has started"):
        together.check(2, None, TOY)
    with pytest.raises(SettingsError, match="ray: got 'local', expected none with torchrun"):
        together.check(None, "local", TOY)


def test_a_pipeline_that_is_handed_over(monkeypatch, tmp_path):
    """Processes that torchrun started may each render with a pipeline of their own, as before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    pipe = pipes.pipeline("wan")
    assert together.check(None, None, described(pipe)) == 1
    with pytest.raises(
        SettingsError, match="model: got 'WanPipeline', expected a folder or a name: each of the processes"
    ):
        render(pipe, [{"prompt": "a"}], tmp_path, gpus_per_clip=4)
