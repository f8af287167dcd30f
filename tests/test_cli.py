"""The command line: what a person sees."""

import re

import pytest
import torch

import stgfast
from stgfast.cli import main


def test_demo(capsys):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    rows = {name: int(count) for name, count in re.findall(r"^(CFG|CFG \+ STG) +(\d+) ", printed, re.MULTILINE)}
    assert rows == {"CFG": 6 * 96, "CFG + STG": 6 * 109}
    assert "blocks 35 to 47: 3 rows" in printed
    assert float(re.search(r"differ by ([\d.e-]+)", printed)[1]) > 0


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for line in (
        rf"^  torch +{re.escape(torch.__version__)}$",
        r"^  flash-attn +flash_attn is not installed$|^  flash-attn +runs on cuda, not on cpu$",
        r"^  sdpa +runs here$",
        r"^  Mochi +\S+ \(",
    ):
        assert re.search(line, printed, re.MULTILINE), line


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"stgfast {stgfast.__version__}\n"
