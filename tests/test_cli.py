"""The command line: what a person sees."""

import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stgfast
from stgfast import toy
from stgfast.cli import main
from stgfast.render.files import read_frames


def test_demo(capsys, tmp_path):
    prompt = "a red square moves left over a black background"
    assert main(["demo", "--out", str(tmp_path / "clips"), "--prompt", prompt, "--prompt", prompt]) == 0
    printed = capsys.readouterr().out
    rows = {name: int(count) for name, count in re.findall(r"^(CFG|CFG \+ STG) +(\d+) ", printed, re.MULTILINE)}
    (layer,) = toy.GUIDANCE.perturbations[0].layers
    blocks, steps = 12, toy.CALL["num_inference_steps"]
    assert rows == {"CFG": 2 * steps * 2 * blocks, "CFG + STG": 2 * steps * (2 * blocks + blocks - layer - 1)}
    assert f"blocks 0 to {layer}: 2 rows" in printed
    shown = re.findall(r"^  (\S+/clips/\S+)$", printed, re.MULTILINE)
    stem = "a-red-square-moves-left-over-a-black-backg"
    assert [Path(path).name for path in shown] == [f"1-{stem}.mp4", f"2-{stem}.mp4", "demo.png"]
    frames = read_frames(Path(shown[0]))
    assert frames.shape == (17, 256, 512, 3)
    assert np.abs(frames[:, :, :256].astype(int) - frames[:, :, 256:]).mean() > 0.1  # the two sides differ
    with Image.open(shown[-1]) as picture:
        assert picture.width > 1000


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
