"""The command: what a person sees, what a machine reads, and what the shell is told."""

import argparse
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from stgfast.errors import SettingsError
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import command, models, worker
from stgfast.render.files import read_frames
from stgfast.render.gallery import NAME
from stgfast.render.screen import Screen
from tests.render import pipes

SETS = [f"--set={name}={value}" for name, value in pipes.CALL.items()] + ['--set=pipeline={"max_sequence_length": 16}']


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.NAMED, "tiny", pipes.NAMED)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def call(*arguments, add=command.add_render, stderr=None):
    parser = argparse.ArgumentParser()
    add(parser)
    stdout, stderr = io.StringIO(), stderr or io.StringIO()
    code = command.run(parser.parse_args([*map(str, arguments), "--model", "tiny", "--same-process"]), stdout, stderr)
    return code, stdout.getvalue(), stderr.getvalue()


def prompts(tmp_path, text="a red kite\nthe grey sea\n"):
    (tmp_path / "jobs.txt").write_text(text)
    return tmp_path / "jobs.txt"


def test_for_a_person(tmp_path):
    code, out, err = call(prompts(tmp_path), "--out", tmp_path / "out", *SETS, stderr=Terminal())
    assert (code, out) == (0, "")
    assert "2 clips to render, 0 done" in err
    assert "2/2" in err  # the bar
    assert "2 rendered in" in err
    clips = sorted((tmp_path / "out").glob("*.mp4"))
    assert [clip.name.rpartition("-")[0] for clip in clips] == ["a-red-kite", "the-grey-sea"]
    assert call(tmp_path / "jobs.txt", "--out", tmp_path / "out", "--quiet", *SETS) == (0, "", "")


def test_a_log_has_lines(tmp_path):
    code, _, err = call(prompts(tmp_path), "--out", tmp_path / "out", *SETS)
    assert code == 0
    assert "\r" not in err
    assert re.search(r"^[12] of 2 jobs settled$", err, re.MULTILINE)


def test_a_narrow_terminal_gets_short_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    err = call(prompts(tmp_path), "--out", tmp_path / "out", *SETS, stderr=Terminal())[2]
    bars = [part for part in re.split(r"[\r\n]", err) if re.match(r"\s*[12]/2", part)]
    assert bars
    assert max(map(len, bars)) <= 40


def test_for_a_machine(tmp_path):
    code, out, err = call(prompts(tmp_path), "--out", tmp_path / "out", "--json", *SETS)
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    names = [event["event"] for event in events]
    assert names[:2] == ["planned", "loading"]
    assert names.count("done") == 2
    assert events[-1]["event"] == "ended"
    assert (events[-1]["done"], events[-1]["failed"]) == (2, 0)


def test_bad_lines(tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a"}\nno\n{"prompt": "b", "name": "../b\\u001b[2J"}\n')
    code, out, err = call(tmp_path / "jobs.jsonl", "--out", tmp_path / "out", *SETS)
    assert (code, out) == (2, "")
    assert "line 2: a line: got what is not JSON" in err
    assert "line 3: name: got" in err
    assert "2 bad lines; nothing was rendered" in err
    assert "\x1b" not in err
    code, out, err = call(tmp_path / "jobs.jsonl", "--out", tmp_path / "out", "--skip-bad", "--quiet", *SETS)
    assert code == 1
    assert err.count("\n") == 2
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_failed_jobs(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(worker, "write", fails)
    code, _, err = call(prompts(tmp_path), "--out", tmp_path / "out", "--quiet", *SETS)
    assert code == 1
    assert err.count("RuntimeError: no picture") == 2
    monkeypatch.undo()
    monkeypatch.setitem(models.NAMED, "tiny", pipes.NAMED)
    assert call(tmp_path / "jobs.txt", "--out", tmp_path / "out", "--quiet", *SETS)[0] == 1
    assert call(tmp_path / "jobs.txt", "--out", tmp_path / "out", "--quiet", "--retry-failed", *SETS)[0] == 0


def test_a_clip_again(tmp_path):
    call(prompts(tmp_path, "a red kite\n"), "--out", tmp_path / "mp4", *SETS)
    (clip,) = (tmp_path / "mp4").glob("*.mp4")
    # Compared as PNGs: equal frames may be other bytes as H.264.
    for source, out in ((tmp_path / "jobs.txt", "one"), ("--from", "two")):
        sources = ["--from", clip] if source == "--from" else [source, *SETS]
        assert call(*sources, "--out", tmp_path / out, "--format", "png")[0] == 0
    (again,), (clip,) = (list((tmp_path / out).glob("a-*")) for out in ("two", "one"))
    assert again.name == clip.name
    assert torch.equal(torch.from_numpy(read_frames(again)), torch.from_numpy(read_frames(clip)))
    code, _, err = call("--from", tmp_path / "none.mp4", "--out", tmp_path / "two")
    assert code == 2
    assert "clip: got" in err


def test_plan(tmp_path):
    code, out, _ = call(prompts(tmp_path), "--out", tmp_path / "out", "--plan", *SETS)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["pending", "pending"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "expected a job file, --from with a clip, or --wait for jobs that are added"),
        (("jobs.txt", "--from", "clip.mp4"), 2, "expected a job file, or --from with a clip, and not both"),
        (("none.jsonl",), 2, "none.jsonl"),
        (("jobs.xls",), 2, "expected a name that ends in"),
        (("jobs.txt", "--set", "steps"), 2, "FIELD=VALUE"),
        (("jobs.txt", "--set", "stepps=3"), 2, "expected 'steps'"),
        (("jobs.txt", "--max-batch", "0"), 2, "max_batch: got 0"),
        (("jobs.txt", "--out", "jobs.txt"), 3, "output folder"),
    ],
)
def test_what_goes_wrong(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path)
    found, _, err = call("--out", "out", *arguments)
    assert (found, message in err) == (code, True), err


def test_defaults():
    given = ["steps=30", 'pipeline={"a": 1}', "negative_prompt=dull, grey", "name=007"]
    expected = {"steps": 30, "pipeline": {"a": 1}, "negative_prompt": "dull, grey", "name": "007"}
    assert command.defaults_of(given) == expected
    with pytest.raises(SettingsError, match="--set: got 'steps'"):
        command.defaults_of(["steps"])


def test_a_sweep_is_a_grid_in_the_page(tmp_path):
    arguments = ("a red kite", "--layers", "1", "2,3", "--scales", "0.5", "2", "--out", tmp_path / "out")
    code, _, err = call(*arguments, *SETS, add=command.add_sweep)
    assert code == 0, err
    (text,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "out" / "index.html").read_text(), re.DOTALL)
    clips = json.loads(text)
    found = [[(part["layers"], part["scale"]) for part in clip["guidance"]] for clip in clips]
    assert found == [[], [("1", 0.5)], [("1", 2.0)], [("2, 3", 0.5)], [("2, 3", 2.0)]]
    frames = [read_frames(tmp_path / "out" / clip["name"]) for clip in clips]
    assert len({one.tobytes() for one in frames}) == 5


def test_a_sweep_over_a_file_of_prompts_and_cfg_scales(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red kite\n# no prompt\nthe grey sea\n")
    arguments = (
        tmp_path / "prompts.txt",
        "--layers",
        "1",
        "--scales",
        "1",
        "--cfg",
        "2",
        "4",
        "--out",
        tmp_path / "out",
    )
    code, out, err = call(*arguments, "--plan", *SETS, add=command.add_sweep)
    assert code == 0, err
    names = [line.split()[1] for line in out.splitlines()]
    assert len(names) == 8
    assert names[:2] == ["prompt-1-seed-0-cfg-2-cfg-alone.mp4", "prompt-1-seed-0-cfg-2-residual-1-scale-1.mp4"]
    events = [
        json.loads(line) for line in call(*arguments, "--plan", "--json", *SETS, add=command.add_sweep)[1].splitlines()
    ]
    planned = [event["job"] for event in events if event["event"] == "listed"]
    assert {(job["prompt"], job["pipeline"]["guidance_scale"]) for job in planned} == {
        (prompt, scale) for prompt in ("a red kite", "the grey sea") for scale in (2.0, 4.0)
    }
    assert {job["pipeline"]["max_sequence_length"] for job in planned} == {16}  # of --set
    with Store(tmp_path / "out") as store:
        assert list(store.rows(every=True)) == []  # a plan keeps nothing
    (tmp_path / "prompts.txt").write_text("# none\n")
    code, _, err = call(*arguments, *SETS, add=command.add_sweep)
    assert (code, "expected one with a job in it" in err) == (2, True)


def test_a_layer_that_the_model_does_not_have(tmp_path):
    """How many it has is known when it is loaded; the other jobs go on."""
    arguments = ("a red kite", "--layers", "1", "99", "--scales", "1", "--out", tmp_path / "out")
    code, _, err = call(*arguments, *SETS, add=command.add_sweep)
    assert code == 1
    assert "[99], expected numbers from 0 to" in err
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--layers", "one", "--scales", "1"), "--layers: got ['one'], expected numbers, such as 10 20 30"),
        (("--layers", "1", "--scales", "nan"), "scale: got nan, expected a finite number"),
        (("--layers", "1", "--scales", "1", "--kind", "skip"), "kind of perturbation: got 'skip'"),
    ],
)
def test_a_wrong_sweep_says_so_and_renders_nothing(tmp_path, changes, message):
    code, _, err = call("a red kite", "--out", tmp_path / "out", *changes, *SETS, add=command.add_sweep)
    assert code == 2
    assert message in err
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_reader_of_the_output_that_goes_away_ends_nothing(tmp_path):
    """`stgfast render ... --json | head -1`"""
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"a red kite {number}\n" for number in range(3)))
    code = """
import sys
from stgfast import cli
from stgfast.render import models
from tests.render import pipes
models.NAMED["tiny"] = pipes.NAMED
sys.exit(cli.main())
"""
    command = [
        sys.executable,
        "-c",
        code,
        "render",
        jobs,
        "--model",
        "tiny",
        "--out",
        tmp_path / "out",
        "--json",
        *SETS,
    ]
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 0, said
    assert "Traceback" not in said
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3
    assert "Nobody reads the output of the run any more" in (tmp_path / "out" / NAME).read_text()


def test_nothing_that_is_printed_is_a_command_to_the_terminal():
    out, err = io.StringIO(), io.StringIO()
    screen = Screen("render", out, err, quiet=False, as_json=False)
    screen.show({"event": "failed", "file": "k0", "error": "\x1b[2Jgone\x07", "total": 1, "finished": 1})
    screen.close()
    assert "\x1b[2J" not in err.getvalue()
    assert "[2Jgone" in err.getvalue()


def test_a_reader_of_the_list_that_goes_away(tmp_path):
    """`stgfast render --plan ... | head -1`"""
    reading, writing = os.pipe()
    os.close(reading)
    parser = argparse.ArgumentParser()
    command.add_render(parser)
    given = [prompts(tmp_path), "--out", tmp_path / "out", "--plan", "--model", "tiny", *SETS]
    with os.fdopen(writing, "w") as stdout:
        assert command.run(parser.parse_args([str(part) for part in given]), stdout, io.StringIO()) == 0
