"""Packages that are not installed: guidance works without them, and what needs them names their extra."""

import importlib.util
import subprocess
import sys

import pytest

import stgfast
from stgfast import cli, extras
from tests import forks

CORE = """
import sys
from importlib.machinery import PathFinder

ABSENT, there = {names}, PathFinder.find_spec

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in ABSENT else there(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
for name in list(sys.modules):
    if name.partition(".")[0] in ABSENT:
        del sys.modules[name]
import torch
import stgfast
from stgfast import Guidance, Perturbation
from tests import models

pipe, call = models.pipeline("wan"), {{**models.sizes("wan", num_inference_steps=2), **models.prompt("wan")}}
def made():
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames
plain = made()
stgfast.accelerate(pipe, Guidance([Perturbation([1]), Perturbation([2], kind="attention")], rescale=0.5))
assert stgfast.explain(pipe).block_rows > 0
assert not torch.equal(made(), plain)
assert torch.equal(stgfast.restore(pipe) and made(), plain)
print("guided")
"""


@pytest.mark.parametrize("python", [forks.FORKED, pytest.param((), marks=pytest.mark.again)], ids=["forked", "new"])
def test_guidance_needs_the_core_alone(python):
    """PyYAML, tqdm and Pillow come with diffusers, which uses PEFT if it is there, as in a fork."""
    used = {"yaml", "tqdm", "PIL"} | ({"peft"} if python else set())
    names = sorted({*extras.EXTRAS["ray"], "peft", "pytest", "pytest_benchmark"} - used)
    command = [sys.executable, *python, "-c", CORE.format(names=names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "guided\n", done.stderr


COMMANDS = {
    "demo": (["demo"], "toy"),
    "render": (["render", "--model", "toy", "jobs.jsonl", "--out", "clips"], "render"),
    "sweep": (["sweep", "a kite", "--model", "toy", "--layers", "4", "--scales", "1", "--out", "clips"], "render"),
    "evaluate": (["evaluate", "clips"], "render"),
}


@pytest.fixture
def no_av(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))


@pytest.mark.parametrize(("arguments", "extra"), COMMANDS.values(), ids=COMMANDS)
def test_every_command_says_what_it_needs(arguments, extra, no_av, capsys):
    assert cli.main(arguments) == 2
    said = f"stgfast {arguments[0]}: av: not installed; run pip install 'stgfast[{extra}]'\n"
    assert capsys.readouterr() == ("", said)


def test_a_call_says_what_it_needs(no_av, tmp_path):
    for call in (lambda: stgfast.render("toy", [], tmp_path), lambda: stgfast.evaluate(tmp_path)):
        with pytest.raises(extras.MissingError, match=r"av: not installed; run pip install 'stgfast\[render"):
            call()
    assert not list(tmp_path.iterdir())


def test_doctor_and_bench_need_the_core_alone(no_av, capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_extras_are_those_of_the_package():
    """The checked packages are those in the project's file, by the names of their modules."""
    import tomllib

    from tests.test_readme import ROOT

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pyyaml": "yaml", "pillow": "PIL", "protobuf": "google.protobuf"}
    names = [requirement.split(">=")[0] for requirement in listed["render"]]
    assert {imported.get(name, name) for name in names} == set(extras.RENDER)
