"""The command: output for people, output for programs, and exit codes."""

import argparse
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from stgfast.errors import SettingsError
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import batch_run, command, models
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
    assert re.search(r"^[12] of 2 jobs finished$", err, re.MULTILINE)


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
    assert "line 2: a line: got invalid JSON" in err
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

    monkeypatch.setattr(batch_run, "write", fails)
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
        assert list(store.rows(every=True)) == []  # a plan writes nothing
    (tmp_path / "prompts.txt").write_text("# none\n")
    code, _, err = call(*arguments, *SETS, add=command.add_sweep)
    assert (code, "expected one with a job in it" in err) == (2, True)


def test_a_layer_that_the_model_does_not_have(tmp_path):
    """The number of layers is known when the model is loaded; the other jobs continue."""
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


@pytest.mark.xdist_group("commands")
def test_a_reader_of_the_output_that_goes_away_ends_nothing(tmp_path):
    """`stgfast render ... --json | head -1`"""
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"a red kite {number}\n" for number in range(3)))
    command = [
        sys.executable,
        "-m",
        "tests.render.tiny",
        "render",
        jobs,
        "--model",
        "tiny",
        "--out",
        tmp_path / "out",
        "--json",
        "--same-process",
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
    assert "The output of the run has no reader any more" in (tmp_path / "out" / NAME).read_text()


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


def test_a_plan_says_how_long_and_how_many_bytes(tmp_path):
    jobs = prompts(tmp_path)
    out = tmp_path / "out"
    assert "time unknown" in call(jobs, "--out", out, "--plan", *SETS)[2]
    call(jobs, "--out", out, *SETS)
    jobs.write_text("a red kite\na dog\n")
    _, said, _ = call(jobs, "--out", out, "--plan", "--json", *SETS)
    (found,) = [event for event in map(json.loads, said.splitlines()) if event["event"] == "forecast"]
    assert (found["jobs"], found["unknown"]) == (1, 0)
    assert found["seconds"] > 0
    assert found["bytes"] == pytest.approx(np.mean([clip.stat().st_size for clip in out.glob("*.mp4")]), abs=1)
    err = call(jobs, "--out", tmp_path / "other", "--plan", "--like", out, *SETS)[2]
    assert re.search(r"^2 clips will take about \d+ s and 0\.0\d GB; the disk has [0-9.]+ GB$", err, re.MULTILINE), err
    assert call(jobs, "--out", out, "--plan", "--like", tmp_path / "none", *SETS)[0] == 3


def test_a_disk_that_is_too_small(tmp_path):
    event = {"event": "forecast", "jobs": 3, "unknown": 1, "seconds": 7260.0, "bytes": 2 * 10**9, "free": 10**9}
    err = io.StringIO()
    Screen("render", io.StringIO(), err, quiet=False, as_json=False).show(event)
    assert err.getvalue() == (
        "2 clips will take about 2 h 1 min and 2.00 GB; the disk has 1.00 GB, which is not enough; unknown for 1 more\n"
    )


def test_somebody_is_told_when_it_is_over(tmp_path):
    """A command and a URL receive the report. If they fail, the exit code stays the same."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Log nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hooks = ("--on-done", f"cat > {tmp_path}/done", "--on-fail", f"cat > {tmp_path}/fail")
        webhook = ("--webhook", f"http://127.0.0.1:{server.server_port}/")
        assert call(prompts(tmp_path), "--out", tmp_path / "out", *hooks, *webhook, *SETS)[0] == 0
        report = json.loads((tmp_path / "done").read_text())
        assert (report["code"], report["done"], report["rendered"]) == (0, 2, 2)
        assert (report["out"], report["model"]) == (str(tmp_path / "out"), "tiny")
        assert got == [report]
        assert not (tmp_path / "fail").exists()
        assert call(tmp_path / "none.txt", "--out", tmp_path / "out", *hooks, *webhook, *SETS)[0] == 2
        failed = json.loads((tmp_path / "fail").read_text())
        assert failed["code"] == 2
        assert "none.txt" in failed["error"]
        assert got[1:] == [failed]
        server.shutdown()
    code, _, err = call(prompts(tmp_path), "--out", tmp_path / "out", "--on-done", "exit 3", *webhook, *SETS)
    assert code == 0
    assert "stgfast render: --on-done: the command ended with exit code 3" in err
    assert "stgfast render: --webhook: " in err
    code, _, err = call(prompts(tmp_path), "--out", tmp_path / "out", "--webhook", "file:///etc/passwd", *SETS)
    assert (code, "--webhook: got 'file:///etc/passwd', expected an address" in err) == (2, True)


def test_every_line_for_a_machine_has_its_form(tmp_path):
    """However a run ends, the last line has the exit code."""
    known, seen = documented(), []
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    for arguments, code in (
        ((prompts(tmp_path), *SETS), 0),
        ((tmp_path / "bad.jsonl",), 2),
        ((tmp_path / "bad.jsonl", "--skip-bad"), 1),
        ((prompts(tmp_path), "--plan", *SETS), 0),
        ((tmp_path / "none.txt",), 2),
        ((prompts(tmp_path), "--device", "cuda:9", *SETS), 2),
    ):
        found, said, err = call(*arguments, "--json", "--out", tmp_path / f"out-{len(seen)}")
        seen.append(found)
        assert (found, err) == (code, "")
        events = [json.loads(line) for line in said.splitlines()]
        assert [event["event"] for event in events].count("ended") == 1
        assert (events[-1]["event"], events[-1]["code"]) == ("ended", code)
        for event in events:
            assert event["version"] == 1
            assert event["run"] == events[0]["run"]
            assert set(event) - {"version", "run", "time", "event"} <= known[event["event"]], event


def documented():
    """The table of events in the README: the fields of each."""
    text = (Path(command.__file__).parent / "README.md").read_text().partition("## For programs")[2]
    rows = re.findall(r"^\| `([a-z]+)` \|\s*([^|]*?)\s*\|", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}


def test_every_event_is_documented():
    told = set()
    for path in Path(command.__file__).parent.glob("*.py"):
        told |= set(re.findall(r"""(?:tell\(|"event": )\s*"([a-z]+)\"""", path.read_text()))
    assert len(told) > 20
    assert told | {"resumed", "paused"} == set(documented())
