"""The scripts in bench/ count right, and print no number when their sides disagree. No time is asserted here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import combine
import reuse


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


def test_reuse_counts_what_is_left_out(monkeypatch):
    monkeypatch.setattr(reuse, "STEPS", 4)
    monkeypatch.setattr(reuse, "SETTINGS", ({"reuse": 1}, {"reuse": 2}))
    exact, half = reuse.rows(2, reuse.EARLY)
    blocks, (layer,) = 12, reuse.EARLY.perturbations[0].layers
    weak = blocks - layer - 1
    assert exact["block-rows"] == 4 * (2 * blocks + weak)
    assert half["block-rows"] == 4 * 2 * blocks + 2 * weak
    assert half["block-rows saved"] == pytest.approx(2 * weak / exact["block-rows"], rel=1e-3)
    assert exact["distance"] == 0
    assert 0 < half["distance / what guidance does"] < 1
