"""The command line as people see it."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stgfast
from stgfast import demo, toy
from stgfast.cli import main
from stgfast.evaluate.study import EARLY
from stgfast.queue.store import Store
from stgfast.render.files import read_frames


def test_demo(capsys, tmp_path, monkeypatch):
    steps = 12  # enough for clips that show what the prompt says
    monkeypatch.setattr(demo.run, "__kwdefaults__", {"steps": steps})
    assert main(["demo", "--out", str(tmp_path / "clips"), "--prompts", "1"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(CFG|CFG \+ STG|recipe) +(\d+) +\d+\.\d   (\d) of 1$", printed, re.MULTILINE)
    (layer,) = EARLY.perturbations[0].layers
    blocks = 12
    guided = 2 * blocks + blocks - layer - 1
    assert [right for *_, right in rows] == ["1"] * 3
    expected = {"CFG": steps * 2 * blocks, "CFG + STG": steps * guided, "recipe": 14 * guided}
    assert {name: int(count) for name, count, _ in rows} == expected
    assert f"blocks 0 to {layer}: 2 rows" in printed
    assert re.search(r"^The recipe takes \d+\.\d\d times as long as CFG\.$", printed, re.MULTILINE)
    shown = re.findall(r"^  (\S+/clips/\S+)$", printed, re.MULTILINE)
    assert [Path(path).name.partition("-")[0] for path in shown] == ["1", "demo.png"]
    frames = read_frames(Path(shown[0]))
    assert frames.shape == (17, 256, 3 * 256, 3)
    cfg, guided, _ = np.split(frames.astype(int), 3, axis=2)
    assert np.abs(cfg - guided).mean() > 0.1
    with Image.open(shown[-1]) as picture:
        assert picture.width > 1000


def test_a_demo_of_no_prompts(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "clips"), "--prompts", "0"]) == 2
    assert capsys.readouterr().err == "stgfast demo: prompts: got 0, expected a number, 1 or more\n"
    assert not (tmp_path / "clips").exists()


def test_prompts_of_the_demo_are_drawn_by_its_seed():
    assert demo.prompts_of(0, 4) == demo.prompts_of(0, 8)[:4]
    assert demo.prompts_of(0, 4) != demo.prompts_of(1, 4)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for line in (
        rf"^  torch +{re.escape(importlib.metadata.version('torch'))}$",
        r"^  flash-attn +flash_attn is not installed$|^  flash-attn +runs on cuda, not on cpu$",
        r"^  sdpa +runs here$",
        r"^  Mochi +\S+ \(",
    ):
        assert re.search(line, printed, re.MULTILINE), line


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"stgfast {stgfast.__version__}\n"


def test_verify(capsys):
    assert main(["verify", "--model", "toy", toy.PROMPTS[0], "--set", "steps=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LTXPipeline: accelerated guidance is equal to the plain method.")
    assert "step 1 of 2, pipe.transformer: 25 block-rows ran, 36 without sharing." in printed
    assert main(["verify", "--model", "toy", "--set", "nothing=2"]) == 2
    assert "stgfast verify: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["status", "--json"], ["pause"]])
def test_output_that_nobody_reads(tmp_path, capsys, command):
    """As in `stgfast status | head -1`: what the command does is done, and it ends without a word."""
    with Store(tmp_path):
        pass
    reader, writer = os.pipe()
    os.close(reader)
    name, *more = command
    whole = [sys.executable, "-m", "stgfast.cli", name, "--out", str(tmp_path), *more]
    done = subprocess.run(whole, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    assert main(["status", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paused"] == (name == "pause")


def test_output_that_cannot_be_written(tmp_path):
    with Store(tmp_path):
        pass
    command = [sys.executable, "-m", "stgfast.cli", "status", "--out", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "stgfast status: standard output: No space left on device\n")


def test_another_error_is_not_taken_for_one_of_the_output(monkeypatch, capsys):
    """Here standard output is no file, as in a notebook."""

    def fails(arguments):
        raise OSError("of the command")

    monkeypatch.setattr("stgfast.doctor.run_doctor", fails)
    with pytest.raises(OSError, match="of the command"):
        main(["doctor"])
