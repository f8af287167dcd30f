"""Faults that an operator met during unattended runs, each with the expected behaviour."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stgfast import Guidance, Perturbation, cli
from stgfast.errors import SettingsError
from stgfast.queue.job import Job
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import batch_run, loading, texts
from stgfast.render.checks import check
from stgfast.render.files import metadata_of, remark_on
from stgfast.render.models import described
from stgfast.render.planning import BadJobs
from stgfast.render.run import render
from tests import forks
from tests.render import pipes

TEXT = {"pipeline": {"max_sequence_length": 16}}


def some(count=3, **more):
    prompts = ("a red kite", "the grey sea", "a dog runs")
    return [{**pipes.CALL, **TEXT, "prompt": prompts[n % 3], "seed": n, "name": f"k{n}", **more} for n in range(count)]


@pytest.fixture
def pipe():
    return pipes.guided()


def go(pipe, jobs, out, events=None, **more):
    listener = None if events is None else events.append
    return render(pipe, jobs, out, **{"format": "png", "listener": listener, **more})


def told(events, name):
    return [event for event in events if event["event"] == name]


def test_a_full_disk_fails_no_job_for_its_prompt(tmp_path, pipe, monkeypatch):
    """Encoded prompts that do not fit on the disk are dropped, and encoded again."""
    encoded = []
    monkeypatch.setattr(texts, "MEMORY", 1)
    monkeypatch.setitem(texts.Texts.__init__.__kwdefaults__, "memory", 1)
    write = Path.write_bytes

    def full(self, data):
        if self.parent.name.startswith("texts"):
            encoded.append(self)
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert go(pipe, some(9), tmp_path, max_batch=2).done == 9
    assert encoded
    assert not any(path.exists() for path in encoded)


def test_what_is_on_disk_of_prompts_is_bounded(tmp_path):
    calls = []

    class Reader:
        def encode_prompt(self, prompt):
            calls.append(prompt)
            return (torch.ones(1, 1000),)

    kept = texts.Texts(tmp_path / "texts", torch.device("cpu"), memory=10_000, disk=20_000)
    pipe = Reader()
    for number in range(40):
        kept.encoding(pipe, 1)(prompt=[f"p{number}"])
        size = sum(path.stat().st_size for path in (tmp_path / "texts").glob("*"))
        assert size <= 20_000
        assert kept.size <= 10_000
    assert size > 10_000
    assert len(calls) == 40
    for number, more in ((39, 0), (37, 0), (0, 1)):  # in memory, on disk, forgotten
        before = len(calls)
        (made,) = kept.encoding(pipe, 1)(prompt=[f"p{number}"])
        assert torch.equal(made, torch.ones(1, 1000))
        assert len(calls) - before == more, number
    shutil.rmtree(tmp_path / "texts")  # by another program that needs the space
    assert torch.equal(kept.encoding(pipe, 1)(prompt=["p36"])[0], torch.ones(1, 1000))


def test_a_plan_keeps_nothing_and_what_is_not_rendered_can_be_changed(tmp_path, pipe):
    go(pipe, some(), tmp_path, plan_only=True)
    with Store(tmp_path) as store:
        assert list(store.rows(every=True)) == []
    events = []
    assert go(pipe, some(steps=3), tmp_path, events, plan_only=True).waiting == 3
    assert [event["job"]["steps"] for event in told(events, "listed")] == [3, 3, 3]
    assert go(pipe, some(1, steps=3), tmp_path).done == 1  # under the name of other plans
    with Store(tmp_path) as store:  # two pending jobs, one of them failed before
        for number in (1, 2):
            store.stage(described(pipe).settled(Job(**some()[number])), f"k{number}", 1, "", "m")
        with store.taking_up([]) as bad:
            assert list(bad) == []
        store.fail(store.claim(1, "cpu").tasks[0], "no", {})
    report = go(pipe, some(steps=4)[1:], tmp_path)
    assert (report.done, report.failed) == (2, 0)
    assert metadata_of(tmp_path / "k1")["job"]["steps"] == 4
    with pytest.raises(BadJobs, match=r"which this folder has with other settings \(steps\)"):
        go(pipe, some(steps=5), tmp_path)


def test_a_model_with_fewer_layers_than_the_default_s(tmp_path, pipe):
    """The default of LTX is layer 19."""
    pipes.pipeline("ltx").save_pretrained(tmp_path / "model")
    layers = {"guidance": {"perturbations": [{"layers": [1]}]}, "num_frames": 9}
    made = {"device": "cpu", "same_process": True}
    assert go(tmp_path / "model", some(1, **layers), tmp_path / "out", **made).done == 1
    said = "guidance: got none, and the default does not fit this model: layers, LTXPipeline: got [19]"
    with pytest.raises(BadJobs) as caught:
        go(tmp_path / "model", some(1, num_frames=9), tmp_path / "other", **made)
    assert said in caught.value.lines[0].why
    # A clip without STG, and a clip of a loaded pipeline, have the same name as before.
    assert (
        go(tmp_path / "model", some(1, **layers | {"guidance": {"perturbations": []}}), tmp_path / "plain", **made).done
        == 1
    )


WRONG = {
    "layer": (
        {"guidance": {"perturbations": [{"layers": [99]}]}},
        "layers, WanPipeline: got [99], expected numbers from 0",
    ),
    "length of a list": (
        {"guidance": {"perturbations": [{"layers": [1], "scale": [1.0, 2.0, 3.0]}]}, "steps": 2},
        "expected",
    ),
    "kind that the model has not": (
        {"guidance": {"perturbations": [{"layers": [1], "kind": "attention", "axis": "time"}]}},
        "expected",
    ),
    "number as text": (
        {"pipeline": {"guidance_scale": "x"}},
        "guidance_scale: got 'x', expected a number, such as 5.0",
    ),
    "tensor": ({"pipeline": {"latents": [1]}}, "got 'latents', expected an argument that is no tensor"),
    "itself": ({"pipeline": {"self": 1}}, "got 'self', expected an argument of WanPipeline"),
    "frames": ({"num_frames": 10}, "num_frames: got 10, expected 9 or 13, as WanPipeline makes them"),
    "start": ({"guidance": {"perturbations": [{"layers": [1]}], "start": 0.9, "stop": 0.95}}, "start and stop"),
}


@pytest.mark.parametrize(("job", "why"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_known_before_the_model_loads(tmp_path, monkeypatch, job, why):
    pipes.pipeline("wan").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading.Loading, "load", None)  # it is not loaded
    jobs = [{**some(1, guidance={"perturbations": [{"layers": [1]}]})[0], **job}]
    with pytest.raises(BadJobs) as caught:
        go(tmp_path / "model", jobs, tmp_path / "out", plan_only=True)
    assert why in caught.value.lines[0].why


def test_a_rate_of_frames(tmp_path):
    pipes.pipeline("ltx").save_pretrained(tmp_path / "model")
    model = described(tmp_path / "model")
    job = {"prompt": "a", "guidance": {"perturbations": [{"layers": [1]}]}}
    for rate in (0, -1, "x"):
        with pytest.raises(SettingsError, match="frame_rate: got"):
            check(model, Job.from_dict({**job, "pipeline": {"frame_rate": rate}}))
    check(model, Job.from_dict({**job, "pipeline": {"frame_rate": 12}}))


def test_clips_whose_list_was_lost_are_found_again(tmp_path, pipe):
    go(pipe, some(), tmp_path, format="mp4")
    shutil.rmtree(tmp_path / FOLDER)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    report = go(pipe, some(4), tmp_path, format="mp4")
    assert (report.done, report.rendered) == (4, 1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(BadJobs, match=r"in the folder but not on its list \(steps\), expected another"):
        go(pipe, some(1, steps=3), tmp_path, format="mp4")
    (tmp_path / "k0.mp4").write_bytes(b"something else")
    with pytest.raises(BadJobs, match="in the folder but not on its list, expected another"):
        go(pipe, some(1), tmp_path, format="mp4")


def test_a_clip_that_is_not_whole_is_rendered_again(tmp_path, pipe):
    go(pipe, some(), tmp_path, format="mp4")
    (tmp_path / "k0.mp4").write_bytes(b"")  # emptied
    whole = (tmp_path / "k1.mp4").read_bytes()
    (tmp_path / "k1.mp4").write_bytes(whole[: len(whole) // 2])  # cut short
    assert go(pipe, some(), tmp_path, format="mp4").rendered == 2
    broken = bytearray((tmp_path / "k2.mp4").read_bytes())
    broken[:200] = bytes(200)  # of the same length
    (tmp_path / "k2.mp4").write_bytes(broken)
    assert go(pipe, some(), tmp_path, format="mp4").rendered == 0
    events = []
    assert go(pipe, some(), tmp_path, events, format="mp4", verify=True).rendered == 1
    assert [event["file"] for event in told(events, "broken")] == ["k2.mp4"]
    assert go(pipe, some(), tmp_path, format="mp4", verify=True).rendered == 0


def test_what_a_file_manager_leaves_in_a_folder_of_pictures_is_no_damage(tmp_path, pipe):
    go(pipe, some(1), tmp_path)
    (tmp_path / "k0" / ".DS_Store").write_text("x")
    assert go(pipe, some(1), tmp_path).rendered == 0
    (tmp_path / "k0" / "0002.png").unlink()
    assert go(pipe, some(1), tmp_path).rendered == 1


def test_strange_clips_are_flagged(tmp_path, pipe, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    assert remark_on(frames, 5) == remark_on(frames, None) == ""
    assert remark_on(frames, 6) == "it has 5 frames, where 6 were asked for"
    assert remark_on(frames // 64, 5) == "it is black"
    assert remark_on(np.full_like(frames, 99), 5) == "it has only one colour"
    assert remark_on(np.repeat(frames[:1], 5, axis=0), 5) == "it does not move: all frames are the same"
    monkeypatch.setattr(batch_run, "pixels", lambda clip: frames // 64)
    events = []
    assert go(pipe, some(1), tmp_path, events).done == 1
    assert told(events, "strange") == [{"event": "strange", "file": "k0", "remark": "it is black"}]
    assert "strange: it is black" in (tmp_path / "index.html").read_text()
    assert metadata_of(tmp_path / "k0")["frames"] == 5
    with Store(tmp_path) as store:
        (row,) = store.rows(every=True)
    assert row.remark == "it is black"


def test_another_quality_is_no_reason_to_render_again_and_is_said(tmp_path, pipe):
    go(pipe, some(), tmp_path, format="mp4", crf=18)
    events = []
    assert go(pipe, some(), tmp_path, events, format="mp4", crf=30).rendered == 0
    assert told(events, "kept") == [{"event": "kept", "clips": 3, "form": "mp4, crf 30"}]
    events.clear()
    go(pipe, some(), tmp_path, events, format="mp4", crf=18)
    assert told(events, "kept") == []
    go(pipe, some(), tmp_path, events, format="mp4", crf=18, fps=12)
    assert told(events, "kept")[0]["form"] == "mp4, crf 18, 12 fps"


def test_a_model_s_index_with_brackets_without_end(tmp_path):
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(SettingsError, match="a file with JSON"):
        described(tmp_path)


@pytest.mark.parametrize("module", ["render.worker", "render.process", "queue.store"])
def test_modules_are_imported_by_themselves(module):
    subprocess.run([sys.executable, *forks.FORKED, "-c", f"import stgfast.{module}"], check=True)


def test_the_toy_is_not_loaded_to_be_planned(tmp_path, monkeypatch):
    from stgfast import toy

    monkeypatch.setattr(toy, "pipeline", None)
    report = go("toy", [{"prompt": toy.PROMPTS[0]}], tmp_path, plan_only=True)
    assert report.waiting == 1
    with pytest.raises(BadJobs, match=r"got \[12\], expected numbers from 0 to 11"):
        go("toy", [{"prompt": "a", "guidance": {"perturbations": [{"layers": [12]}]}}], tmp_path, plan_only=True)


def test_a_sweep_says_its_own_name(tmp_path, capsys):
    from stgfast.cli import main

    arguments = ["sweep", "a", "--layers", "x", "--scales", "1", "--model", "toy", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("stgfast sweep: --layers: got ['x']")


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&- >&-"])
@pytest.mark.parametrize(
    ("command", "counts"),
    [("add", (1, 0)), pytest.param("render --model toy --same-process", (0, 1), marks=pytest.mark.again)],
)
def test_closed_files_end_nothing(tmp_path, capsys, command, counts, closed):
    """And output is not written into the state file, which could get the number of a closed stream."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    jobs.write_text(json.dumps({"prompt": "a red square moves left", "steps": 1}))
    with Store(out):
        pass
    given = f"{sys.executable} -m stgfast.cli {command} {jobs} --out {out} {closed}"
    assert subprocess.run(["bash", "-c", given], check=False).returncode == 0
    assert cli.main(["status", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["inbox"], found["counts"]["done"]) == counts


def test_a_clip_is_made_again_from_what_it_says(tmp_path, pipe):
    """A prompt that contains braces after its choices keeps them."""
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({**some(1)[0], "prompt": r"a \{red|blue\} {kite|kite}", "name": ""}))
    assert go(pipe, path, tmp_path / "out").done == 1
    (clip,) = [found for found in (tmp_path / "out").iterdir() if found.name.startswith("a-red")]
    said = metadata_of(clip)["job"]
    assert said["prompt"] == "a {red|blue} kite"
    again = go(pipe, [said], tmp_path / "out")
    assert (again.done, again.rendered) == (1, 0)
    assert Guidance.from_dict(said["guidance"]) == Guidance(Perturbation([1]))
