"""Public names are documented in the form that users of torch and diffusers know, and every example runs."""

import dataclasses
import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import diffusers
import pytest

import stgfast
from stgfast.integrations import ADAPTERS
from tests.render.wholes import WHOLES

ROOT = pathlib.Path(stgfast.__file__).parents[1]
PUBLIC = [name for name in stgfast.__all__ if name != "__version__"]
ERRORS = [name for name in PUBLIC if name.endswith("Error")]


@pytest.fixture
def pipe(monkeypatch):
    """A small pipeline that is called with a prompt alone; its default sizes are small too."""
    whole = WHOLES["LTXPipeline"]
    small = {**whole.size, "num_frames": whole.num_frames, "num_inference_steps": 2, **whole.pipeline}
    call = inspect.unwrap(diffusers.LTXPipeline.__call__)
    names = inspect.getfullargspec(call).args[-len(call.__defaults__) :]
    defaults = dict(zip(names, call.__defaults__, strict=True)) | small
    monkeypatch.setattr(call, "__defaults__", tuple(defaults.values()))
    adapter = dataclasses.replace(ADAPTERS["LTXPipeline"], defaults=whole.guidance)
    monkeypatch.setitem(ADAPTERS, "LTXPipeline", adapter)
    made = whole.build()
    made.set_progress_bar_config(disable=True)
    return made


def documented(name):
    return inspect.getdoc(stgfast if name == "stgfast" else getattr(stgfast, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_documented(name):
    text = documented(name)
    assert re.match(r"[A-Z].*?[.:]", text), "it begins with a sentence"
    if name in ERRORS:
        return
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    named = {
        each.strip("* ") for line in re.findall(r"^ {4}(\S.*?):", arguments, re.MULTILINE) for each in line.split(",")
    }
    assert named == {each for each in inspect.signature(getattr(stgfast, name)).parameters if each != "self"}


@pytest.mark.parametrize("name", [name for name in ("stgfast", *PUBLIC) if ">>>" in documented(name)])
def test_every_example_runs(name, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(documented(name), {"stgfast": stgfast, "pipe": pipe}, name, None, 0)
    printed = []
    doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert not printed, "".join(printed)


@pytest.mark.again  # `make docs` builds it too
def test_the_reference_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-W", "error", "docs/reference.py", str(tmp_path)]
    assert " ".join(["$(VENV)/bin/python", *command[1:4]]) in (ROOT / "Makefile").read_text()
    subprocess.run(command, check=True, cwd=ROOT)
    page = (tmp_path / "stgfast.html").read_text()
    assert not [name for name in PUBLIC if f'id="{name}"' not in page]
