"""The scripts in bench/ count right, and print no number when their sides disagree. No time is asserted here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import combine


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
