"""Jobs with models, recipes and solvers: each clip is the same as alone, and each model is loaded once."""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import stgfast
from stgfast.errors import SettingsError
from stgfast.integrations import ADAPTERS
from stgfast.queue.desk import Desk
from stgfast.queue.state import CLAIMED
from stgfast.queue.status import status_of
from stgfast.queue.store import Store
from stgfast.recipes import Recipe, model_of
from stgfast.render import models
from stgfast.render.files import metadata_of
from stgfast.render.planning import BadJobs
from stgfast.render.run import render
from tests.render import pipes

JOB = {**pipes.CALL, "pipeline": {"max_sequence_length": 16}, "guidance": {"perturbations": [{"layers": [1]}]}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of different families."""
    top = tmp_path_factory.mktemp("models")
    for family in ("wan", "ltx"):
        pipes.pipeline(family).save_pretrained(top / family)
    return top


def some(folders, count=6, **more):
    """Jobs of both models in turn, by names relative to the job file."""
    names = ("wan", "ltx")
    return [
        {**JOB, "prompt": "a red kite", "seed": n, "name": f"k{n}", "model": str(folders / names[n % 2]), **more}
        for n in range(count)
    ]


def go(model, jobs, out, **more):
    events = []
    given = {"format": "npz", "device": "cpu", "listener": events.append, "same_process": True, **more}
    return render(model, jobs, out, **given), events


def told(events, name):
    return [event for event in events if event["event"] == name]


def frames(out, name):
    with np.load(out / f"{name}.npz") as clip:
        return clip["frames"]


def alike(one, other):
    """Equal but for rounding, in the last of 256 levels."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


def without(job, *names):
    return {name: value for name, value in job.items() if name not in names}


@pytest.mark.parametrize("same_process", [True, pytest.param(False, marks=pytest.mark.again)])
def test_every_model_is_loaded_once_and_clips_are_those_of_a_run_of_its_own(folders, tmp_path, same_process):
    jobs = some(folders)
    report, events = go(None, jobs, tmp_path / "out", same_process=same_process)
    assert (report.done, report.code) == (6, 0)
    assert [event["model"] for event in told(events, "loading")] == [str(folders / name) for name in ("wan", "ltx")]
    order = [event["file"] for event in told(events, "done")]
    assert [sorted(order[:3]), sorted(order[3:])] == [
        [f"k{n}.npz" for n in (0, 2, 4)],
        [f"k{n}.npz" for n in (1, 3, 5)],
    ]
    for place, family in enumerate(("wan", "ltx")):
        own = [without(job, "model") for job in jobs[place::2]]
        go(folders / family, own, tmp_path / family)
        for job in own:
            assert alike(*(frames(tmp_path / where, job["name"]) for where in ("out", family)))
            said, alone = (metadata_of(tmp_path / where / f"{job['name']}.npz") for where in ("out", family))
            assert (
                (said["model"], said["job"]) == (alone["model"], alone["job"]) == (str(folders / family), said["job"])
            )
    report, events = go(None, jobs, tmp_path / "out")  # again: all clips exist
    assert (report.rendered, told(events, "loading")) == (0, [])


def test_models_beside_the_job_file_and_the_run_s_own(folders, tmp_path):
    lines = [{**JOB, "prompt": "a", "name": "own"}, {**JOB, "prompt": "a", "name": "other", "model": "ltx"}]
    (folders / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, _ = go(folders / "wan", folders / "jobs.jsonl", tmp_path)
    assert report.done == 2
    models = {name: metadata_of(tmp_path / f"{name}.npz")["model"] for name in ("own", "other")}
    assert models == {"own": str(folders / "wan"), "other": str(folders / "ltx")}


def test_a_model_that_is_wrong_is_a_bad_line(folders, tmp_path):
    jobs = some(folders, 2)
    for wrong, why in (
        ({"model": "no/such/name"}, "model: got 'no/such/name', expected a folder"),
        ({"model": str(tmp_path)}, "with model_index.json"),
        ({"model": None}, "model: got"),
        ({"model": 3}, "model: got"),
        ({"model": "\0"}, "control character"),
        ({"guidance": {"perturbations": [{"layers": [9]}]}}, "9"),  # as that model has no such layer
    ):
        with pytest.raises(BadJobs) as caught:
            go(None, [jobs[0], {**jobs[1], **wrong}], tmp_path / "out")
        assert [line.number for line in caught.value.lines] == [2]
        assert why in caught.value.lines[0].why
    with pytest.raises(BadJobs, match="model: got None, expected one for this job, or --model"):
        go(None, [without(jobs[0], "model")], tmp_path / "out")
    with pytest.raises(BadJobs, match="none: a pipeline was handed over"):
        go(pipes.guided(), jobs[:1], tmp_path / "out", device=None)
    with pytest.raises(SettingsError, match="model: got None, expected one to wait with"):
        go(None, jobs, tmp_path / "out", wait=True)
    with pytest.raises(SettingsError, match="trust: got 'x', expected the name of the model, such as"):
        go(None, jobs, tmp_path / "out", trust="x")
    assert list((tmp_path / "out").glob("*.npz")) == []


@pytest.mark.parametrize("same_process", [True, pytest.param(False, marks=pytest.mark.again)])
def test_the_night_goes_on_without_a_model_that_cannot_be_loaded(folders, tmp_path, same_process):
    shutil.copytree(folders / "wan", tmp_path / "broken")
    (weights,) = (tmp_path / "broken" / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    jobs = [
        {**job, "model": str(tmp_path / "broken")} if number < 2 else job for number, job in enumerate(some(folders))
    ]
    report, events = go(None, jobs, tmp_path / "out", same_process=same_process)
    assert (report.done, report.failed, report.code) == (4, 2, 1)
    failed = told(events, "failed")
    assert [event["file"] for event in failed] == ["k0.npz", "k1.npz"]
    assert all("model: got one that cannot be loaded" in event["error"] for event in failed)
    with pytest.raises(SettingsError, match="cannot be loaded"):  # and without another one, the run reports it
        go(tmp_path / "broken", [without(jobs[0], "model")], tmp_path / "alone", same_process=same_process)


def test_an_added_job_may_name_another_model(folders, tmp_path):
    events, added = [], threading.Event()

    loaded = set()

    def listener(event):
        events.append(event)
        with Desk(tmp_path) as desk:
            loaded.update(run["model"] for run in status_of(desk).runs)
        if event["event"] == "done" and not added.is_set():
            added.set()
            with Desk(tmp_path) as desk:
                more = [
                    {**JOB, "prompt": "a dog", "name": name, "model": str(folders / name)} for name in ("ltx", "no")
                ]
                assert desk.add([*more, {**JOB, "prompt": "a dog", "name": "own"}]) == (3, [])

    report = render(
        *(folders / "wan", [{**JOB, "prompt": "a", "name": f"k{n}"} for n in range(8)], tmp_path),
        **{"format": "npz", "device": "cpu", "same_process": True, "max_batch": 1, "listener": listener},
    )
    assert (report.done, report.failed) == (10, 0)
    (refused,) = told(events, "refused")
    assert "model: got" in refused["error"]
    assert [event["model"] for event in told(events, "loading")] == [str(folders / name) for name in ("wan", "ltx")]
    assert loaded == {str(folders / name) for name in ("wan", "ltx")}  # one after the other
    assert metadata_of(tmp_path / "ltx.npz")["model"] == str(folders / "ltx")
    assert metadata_of(tmp_path / "own.npz")["model"] == str(folders / "wan")


def test_what_is_interrupted_begins_no_other_model(folders, tmp_path):
    events = []

    def listener(event):
        events.append(event)
        if event["event"] == "done":
            os.kill(os.getpid(), signal.SIGINT)

    given = {"format": "npz", "device": "cpu", "same_process": True, "listener": listener, "max_batch": 1}
    report = render(None, some(folders), tmp_path, **given)
    assert report.code == 130
    assert len(told(events, "loading")) == 1
    with Store(tmp_path) as store:
        assert CLAIMED not in {row.status for row in store.rows(every=True)}


@pytest.fixture
def recipe(folders):
    """For the second of the models: another solver, fewer steps, and half of the differences."""
    pipe = pipes.pipeline("ltx")
    return Recipe(model=model_of(pipe, ADAPTERS["LTXPipeline"]), steps=3, solver="unipc", reuse=2)


def test_a_recipe_per_job(folders, tmp_path, recipe):
    recipe.save(folders / "recipe.json")
    job = {**without(JOB, "steps"), "prompt": "a red kite", "model": "ltx"}
    lines = [
        {**job, "name": "by", "recipe": "recipe.json"},
        {**job, "name": "data", "recipe": recipe.to_dict(), "seed": 1},
        {**job, "name": "exact", "steps": 3},
        {**job, "name": "solved", "steps": 3, "solver": "unipc"},
    ]
    (folders / "looks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, events = go(None, folders / "looks.jsonl", tmp_path / "out")
    assert (report.done, len(told(events, "loading"))) == (4, 1)  # one model, with any solver
    for name, how in (("by", {"recipe": recipe}), ("solved", {}), ("exact", {})):
        pipe = stgfast.accelerate(pipes.pipeline("ltx"), stgfast.Guidance(stgfast.Perturbation([1])), **how)
        if name == "solved":
            stgfast.solver(pipe, "unipc")
        own = {**without(job, "model", "guidance"), "name": name, "steps": 3}
        go(pipe, [own], tmp_path / "own", device=None)
        assert alike(frames(tmp_path / "out", name), frames(tmp_path / "own", name)), name
    shown = [frames(tmp_path / "out", name) for name in ("by", "exact", "solved")]
    assert not any(alike(one, other) for one, other in itertools.pairwise(shown))
    said = metadata_of(tmp_path / "out" / "by.npz")["job"]
    assert (said["solver"], said["steps"], said["guidance"]["reuse"]) == ("unipc", 3, 2)
    again, _ = go(folders / "ltx", [said], tmp_path / "again")  # the metadata of a clip is enough to make it again
    assert again.done == 1
    assert alike(frames(tmp_path / "again", "by"), frames(tmp_path / "out", "by"))


def test_a_recipe_of_the_run_and_those_of_its_jobs(folders, tmp_path, recipe):
    job = {**without(JOB, "steps"), "prompt": "a"}
    jobs = [{**job, "name": "by"}, {**job, "name": "exact", "recipe": None, "steps": 2}]
    report, _ = go(folders / "ltx", jobs, tmp_path, recipe=recipe)
    assert report.done == 2
    assert [metadata_of(tmp_path / f"{name}.npz")["job"].get("solver", "") for name in ("by", "exact")] == ["unipc", ""]


def test_recipes_and_solvers_that_do_not_go_with_a_job(folders, tmp_path, recipe):
    (tmp_path / "none.json").write_text("{")
    for wrong, why in (
        ({"recipe": recipe.to_dict(), "steps": 9}, "steps with a recipe: got 9, expected the 3"),
        ({"recipe": recipe.to_dict(), "solver": "unipc"}, "solver and recipe"),
        ({"recipe": recipe.to_dict(), "model": str(folders / "wan")}, "model of the recipe: got LTXPipeline"),
        ({"recipe": {**recipe.to_dict(), "model": {"pipeline": "LTXPipeline"}}}, "model of the recipe: got"),
        ({"recipe": "none.json"}, "recipe: got 'none.json', expected a file written by stgfast tune"),
        ({"recipe": str(tmp_path / "none.json")}, "expected a file written by stgfast tune"),
        ({"recipe": {}}, "recipe: got [], expected model and steps"),
        ({"recipe": 3}, "recipe: got"),
        ({"recipe": "http://x/y"}, "expected a file"),
        ({"solver": "heun"}, "solver: got 'heun', expected one of"),
        ({"solver": "unipc", "model": str(folders / "wan")}, "got UniPCMultistepScheduler, expected FlowMatch"),
        ({"solver": 3}, "solver: got"),
    ):
        job = {**without(JOB, "steps"), "prompt": "a", "model": str(folders / "ltx"), **wrong}
        with pytest.raises(BadJobs) as caught:
            go(None, [job], tmp_path / "out")
        assert why in caught.value.lines[0].why, wrong


def test_the_command_without_a_model_of_its_own(folders, tmp_path, capsys):
    from stgfast.cli import main

    (folders / "all.jsonl").write_text(json.dumps({**JOB, "prompt": "a", "name": "one", "model": "wan"}) + "\n")
    given = ["render", str(folders / "all.jsonl"), "--out", str(tmp_path), "--format", "npz", "--device", "cpu"]
    assert main([*given, "--plan"]) == 0
    assert "one.npz" in capsys.readouterr().out
    assert main([*given, "--same-process"]) == 0
    assert metadata_of(tmp_path / "one.npz")["model"] == str(folders / "wan")
    assert main(["render", "--wait", "--out", str(tmp_path)]) == 2
    assert "model: got None, expected one to wait with" in capsys.readouterr().err


def test_what_is_handed_out_is_one_model_s(tmp_path):
    """Although all jobs are pending."""
    from tests.queue.test_store import jobs, take_up

    with Store(tmp_path) as store:
        take_up(store, jobs(2), "m")
        take_up(store, [one for one in jobs(4) if one.seed > 1], "n")
        assert store.next_model() == "m"
        assert [task.model for task in store.claim(9, "cpu", model="n").tasks] == ["n", "n"]
        assert store.claim(9, "cpu", model="n") is None
        assert [task.model for task in store.claim(9, "cpu").tasks] == ["m", "m"]
        assert store.next_model() is None


@pytest.mark.again
def test_torchrun_with_several_models(folders, tmp_path):
    (folders / "both.jsonl").write_text("".join(json.dumps(job) + "\n" for job in some(folders, 4)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "stgfast.cli", "render", str(folders / "both.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--device", "cpu", "--format", "npz"], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0
    go(None, some(folders, 4), tmp_path / "own")
    for n in range(4):
        assert alike(*(frames(tmp_path / out, f"k{n}") for out in ("out", "own")))
        assert metadata_of(tmp_path / "out" / f"k{n}.npz")["processes"] == 2


@pytest.mark.again
@pytest.mark.xdist_group("ray")
def test_actors_with_several_models(folders, tmp_path, cluster):
    report, events = go(None, some(folders, 4), tmp_path / "out", ray=cluster, actors=2, same_process=False)
    assert (report.done, report.code) == (4, 0)
    assert [event["model"] for event in told(events, "asking")] == [str(folders / name) for name in ("wan", "ltx")]
    go(None, some(folders, 4), tmp_path / "own")
    for n in range(4):
        assert alike(*(frames(tmp_path / out, f"k{n}") for out in ("out", "own")))


def test_a_previous_model_is_released_before_one_is_loaded(monkeypatch, tmp_path):
    """Models refer to themselves, so only garbage collection releases them."""
    released = []

    class Previous:
        pass

    def load():
        released.append(kept() is None)
        return pipes.guided()

    previous = Previous()
    previous.itself, kept = previous, weakref.ref(previous)
    del previous
    monkeypatch.setitem(models.NAMED, "another", pipes.named(load))
    job = {**pipes.CALL, "prompt": "a red kite", "pipeline": {"max_sequence_length": 16}}
    gc.disable()  # so that nothing else collects it
    try:
        go("another", [job], tmp_path)
    finally:
        gc.enable()
    assert released == [True]
