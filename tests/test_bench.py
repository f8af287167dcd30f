"""The benchmarks run, and print no number when their sides disagree. No time is asserted here."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import combine
import steps

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
TINY = {  # one for each way in which pipelines call
    "mochi": {**SMALL, "num_layers": 4, "pooled_projection_dim": 16, "text_embed_dim": 32, "max_sequence_length": 16},
    "wan-14b": {**SMALL, "num_layers": 4, "text_dim": 32, "ffn_dim": 64},
    "hunyuan-video": {
        **{**SMALL, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)},
        **{"text_embed_dim": 32, "pooled_projection_dim": 16},
    },
}


@pytest.fixture(params=TINY)
def tiny(request, monkeypatch):
    model = steps.MODELS[request.param]
    changes = {"narrow": TINY[request.param], "layer": 2, "sizes": {"small": (32, 32, 7)}}
    monkeypatch.setitem(steps.MODELS, request.param, dataclasses.replace(model, **changes))
    monkeypatch.setattr(steps, "BACKEND", "eager")
    arguments = ["steps.py", "--models", request.param, "--rounds", "1", "--variants", *steps.VARIANTS]
    monkeypatch.setattr(sys, "argv", arguments)
    return request.param


def test_steps(tiny, capsys):
    torch.compiler.reset()
    assert steps.main() == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row["seconds"]) == list(steps.VARIANTS)
    exact = [row["distance"][variant] for variant in ("paper", "passes", "compiled")]
    assert max(exact) <= 1e-5
    assert min(row["distance"][variant] for variant in ("stock", "reuse")) > 1e-5
    # The weak branch is computed in one block of four, and in one step of two where it is reused.
    stock, unshared = (4, 8) if tiny == "hunyuan-video" else (8, 12)
    rows = {"stock": stock, "paper": unshared, "passes": unshared, "stgfast": stock + 1, "reuse": stock + 0.5}
    for variant, count in rows.items():
        assert row["block-rows over stgfast"][variant] == round(count / (stock + 1), 3)


def test_steps_prints_no_number_when_sides_disagree(tiny, capsys, monkeypatch):
    made = steps.stgfast.Perturbation

    def other(layers, scale):
        return made(layers, scale=1.01)

    monkeypatch.setattr(steps.stgfast, "Perturbation", other)
    assert steps.main() == 1
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed
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
