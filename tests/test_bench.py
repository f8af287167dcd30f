"""The benchmarks run, and print no number when their sides disagree. No time is asserted here."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import combine
import sharing


@pytest.fixture
def tiny(monkeypatch):
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "pooled_projection_dim": 16, "text_embed_dim": 32}
    monkeypatch.setattr(sharing, "SIZES", {"small": ({**narrow, "max_sequence_length": 16}, torch.float32, 32)})
    monkeypatch.setattr(sys, "argv", ["sharing.py", "--rounds", "1", "--frames", "7"])


@pytest.mark.usefixtures("tiny")
def test_sharing(capsys):
    assert sharing.main() == 0
    row = json.loads(capsys.readouterr().out)
    assert row["relative error"] <= 1e-5
    assert set(row["seconds"]) == {"stock", "paper", "stgfast"}


@pytest.mark.usefixtures("tiny")
def test_sharing_prints_no_number_when_the_sides_disagree(capsys, monkeypatch):
    monkeypatch.setattr(sharing, "SCALE", 1.001)  # the paper's side reads it when it runs
    made = sharing.stgfast.Perturbation

    def other(layers, scale):
        return made(layers, scale=1.0)

    monkeypatch.setattr(sharing.stgfast, "Perturbation", other)
    assert sharing.main() == 1
    printed = capsys.readouterr().out
    assert "disagree" in printed
    assert "seconds" not in printed


def test_combine_counts_bytes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["combine.py"])
    assert combine.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(combine.CASES)
    rows = {row["case"]: row for row in combine.table(numel=64)}
    plain = rows["2 branches"]
    # c - u reads two and writes one, times a number reads and writes one, and the subtraction is as the first
    assert (plain["floor"], plain["as_written"], plain["as_written operations"]) == (3, 8, 3)
    assert rows["3 branches, rescale"]["floor"] == 7
    assert all(row["floor"] < row["as_written"] < row["reference"] for row in rows.values())
