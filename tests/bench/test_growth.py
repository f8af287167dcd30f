"""How the cost grows: the arithmetic follows the plan. No time is asserted."""

import pytest
import torch

from stgfast.bench import growth
from stgfast.bench.measure import Disagreement
from stgfast.bench.models import MODELS
from stgfast.bench.steps import ALLOWED
from stgfast.bench.variants import Bench
from tests.bench.test_steps import run, shallow


@pytest.fixture(params=["mochi", "wan-14b"])
def model(request, monkeypatch):
    monkeypatch.setitem(MODELS, request.param, shallow(request.param))
    return request.param


def test_arithmetic_follows_the_plan(model, monkeypatch):
    monkeypatch.setattr(growth, "TIMES", (1, 2, 3))
    monkeypatch.setattr(growth, "BRANCHES", (1, 2, 3))
    rows = {row["axis"]: row for row in growth.grown(model, rounds=1, steps=2)}
    assert list(rows) == [*growth.AXES, "block-rows"]
    for row in rows.values():
        assert max(point["distance"] for point in row["points"]) <= ALLOWED[torch.float32]
        assert row["fit"].keys() == {"seconds", "arithmetic"}
    assert min(rows[axis]["fit"]["arithmetic"]["r2"] for axis in ("tokens", "prompts")) > 0.999
    assert [point["tokens"] for point in rows["tokens"]["points"]] == list(growth.TIMES)
    latent = [(point["clip"][2] - 1) // MODELS[model].frames + 1 for point in rows["tokens"]["points"]]
    assert latent == [n * latent[0] for n in growth.TIMES]
    assert [point["block_rows"] for point in rows["prompts"]["points"]] == [9 * n for n in growth.TIMES]
    # Of four blocks: two rows everywhere, and one more after the block that is skipped.
    assert [point["block_rows"] for point in rows["layer"]["points"]] == [11, 10, 9, 8]
    for axis, falling in (("layer", True), ("branches", False)):
        for what in ("block_rows", "arithmetic"):
            values = [point[what] for point in rows[axis]["points"]]
            assert values == sorted(values, reverse=falling)


@pytest.mark.again
def test_the_command(model):
    code, (row,), said = run("--overhead", "--models", model, "--size", "tiny", "--rounds", "1")
    assert (code, row["bench"]) == (0, "overhead")
    assert "of a block's call" in said
    code, rows, said = run("--growth", "--models", model, "--rounds", "1")
    assert (code, len(rows)) == (0, len(growth.AXES) + 1)
    assert said.count("seconds by") == len(rows)


def test_a_model_that_guides_itself_is_refused():
    code, rows, said = run("--growth", "--models", "ltx-2")
    assert (code, rows) == (2, [])
    assert "got 'ltx-2', expected one that does not guide itself" in said


def test_nothing_is_timed_where_a_point_disagrees(model, monkeypatch):
    made = Bench.passes
    monkeypatch.setattr(Bench, "passes", lambda self: made(self) * (1.001 if self.prompts == 4 else 1))
    with pytest.raises(Disagreement, match="prompts 4"):
        list(growth.grown(model, rounds=1, steps=2, axes=["prompts"]))
