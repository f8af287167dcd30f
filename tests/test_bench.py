"""The scripts in bench/ count correctly, and print no number if their variants disagree. No time is asserted here."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import combine
import front
import render

from stgfast import toy


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


def test_the_front_counts_what_is_computed(monkeypatch):
    exact = front.Way("Euler", 4)
    monkeypatch.setattr(front, "CONVERGED", 4)
    monkeypatch.setattr(front, "BASE", exact)
    ways = (front.Way("UniPC", 4), front.Way("Euler", 4, 2, 0), front.Way("Euler", 4, peer="pass after pass"), exact)
    base, converged, half, plain = front.rows(2, front.EARLY, ways)
    blocks, (layer,) = 12, front.EARLY.perturbations[0].layers
    perturbed = blocks - layer - 1
    assert base["way"] == "Euler, 4 steps"
    assert (base["block-rows"], base["cost"]) == (4 * (2 * blocks + perturbed), 1.0)
    assert converged["distance"] == 0
    assert half["block-rows"] == 4 * blocks + 2 * blocks + 2 * perturbed
    assert half["cost"] == pytest.approx(half["block-rows"] / base["block-rows"], rel=1e-3)
    assert 0 < base["distance"] != half["distance"] > 0
    # Nothing is shared there; the result is the same.
    assert plain["block-rows"] == 4 * (3 * blocks - 1)
    assert plain["distance"] == pytest.approx(base["distance"], rel=0.01)


@pytest.mark.again
@pytest.mark.parametrize(
    "peer", ["FirstBlockCache, 0.2", "TaylorSeer, every 3, order 1", "SeaCache, 0.5", "MagCache, 0.12"]
)
def test_caches_of_diffusers_leave_out_what_they_are_counted_by(monkeypatch, peer):
    monkeypatch.setattr(front, "TOGETHER", 1)
    made = front.Front(front.EARLY)
    _, exact, _ = made.made(front.Way("Euler", 8, peer="pass after pass"), range(1))
    clip, rows, _ = made.made(front.Way("Euler", 8, peer=peer), range(1))
    again, _, _ = made.made(front.Way("Euler", 8, peer=peer), range(1))
    assert 0.2 * exact < rows < 0.9 * exact
    assert clip.equal(again)  # the next call has no cached values


def test_forecasts_leave_out_all_blocks_but_the_first():
    made = front.Front(front.EARLY)
    _, rows, _ = made.made(front.Way("Euler", 8, peer="block forecasts, every 2, order 1"), range(1))
    # Steps 0, 1, 2, 4, 6 and the last one compute all blocks.
    assert rows == pytest.approx(6 * 35 + 2 * 3)


@pytest.mark.again
def test_a_night_of_work_is_timed_where_its_clips_are_those_of_the_loop(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(toy.CALL, "num_inference_steps", 2)
    monkeypatch.setattr(sys, "argv", ["render.py", "--jobs=2", "--rounds=1", "--save", str(tmp_path / "rows.jsonl")])
    assert render.main() == 0
    assert list(json.loads((tmp_path / "rows.jsonl").read_text())["seconds"]) == list(render.variants(1))
    two = {name: render.variants(1)[name] for name in ("loop", "sharing")}
    monkeypatch.setattr(render, "variants", lambda max_batch: two)
    monkeypatch.setattr(render, "PERTURBED", dataclasses.replace(render.PERTURBED, scale=2.0))
    capsys.readouterr()
    assert render.main() == 1
    assert "no number" in capsys.readouterr().out
