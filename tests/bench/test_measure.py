"""Agreement of variants, arithmetic, fits and result rows."""

import json
import subprocess

import pytest
import torch

from stgfast.bench import measure
from stgfast.bench.measure import Disagreement, agreeing, arithmetic, fitted, result, saved
from stgfast.bench.models import MODELS
from stgfast.bench.overhead import overhead
from stgfast.kernels import masked_attention
from tests.bench.test_steps import shallow


def test_agreement():
    right = torch.ones(4)
    assert agreeing("x", {"a": right, "b": right * 1.1, "c": right}, "a", 0.01, unlike=("b",))["b"] == pytest.approx(
        0.1
    )
    for wrong in (right * 1.1, right * torch.nan):
        with pytest.raises(Disagreement, match=r"x: relative distances .*'b'.*, allowed 0.01; nothing was timed"):
            agreeing("x", {"a": right, "b": wrong}, "a", 0.01)


def test_arithmetic_is_that_of_products_and_attention():
    x, q = torch.randn(3, 5), torch.randn(2, 4, 6, 8)
    made = arithmetic(lambda: (x @ x.T, torch.nn.functional.scaled_dot_product_attention(q, q, q)))
    assert made == (2 * 3 * 5 * 3 + made.attention, 2 * (2 * 2 * 4 * 6 * 6 * 8))


def test_identity_rows_are_no_arithmetic():
    q = torch.randn(3, 2, 6, 8)
    one = arithmetic(lambda: masked_attention(q[:1], q[:1], q[:1]))
    assert one.total > 0
    assert arithmetic(lambda: masked_attention(q, q, q, [False, True, True])) == one


def test_fits():
    x = [1, 2, 3, 5, 8]
    fit = fitted(x, [0.5 + 2 * n + 0.25 * n * n for n in x], 2)
    assert fit.coefficients == pytest.approx((0.5, 2, 0.25))
    assert fit.r2 == 1.0
    assert fitted(x, [1.0, 3.0, 2.0, 4.0, 1.0], 1).r2 < 0.2


def test_rows_say_what_was_measured_and_where(tmp_path):
    row = result("steps", "cpu", figure=1)
    assert row["torch"] == torch.__version__.split("+")[0] or row["torch"] == torch.__version__
    assert row["clock"] == "processor time"
    assert row["figure"] == 1
    file = tmp_path / "new" / "rows.jsonl"
    for _ in range(2):
        assert json.loads(saved(row, file)) == row
    assert file.read_text().splitlines() == [json.dumps(row)] * 2
    assert saved(row, None) == json.dumps(row)


def test_the_commit(monkeypatch, tmp_path):
    package = tmp_path / "stgfast" / "bench" / "measure.py"
    monkeypatch.setattr(measure, "__file__", str(package))
    assert measure.commit() is None  # installed without a checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    package.parent.mkdir(parents=True)
    package.write_text("")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = measure.commit()
    assert len(clean) == 12
    package.write_text("changed")
    assert measure.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("name", ["mochi", "hunyuan-video"])
def test_overhead(name, monkeypatch):
    """The measured code has no arithmetic of blocks, and the blocks are unchanged afterwards."""
    monkeypatch.setitem(MODELS, name, shallow(name))
    row = overhead(name, size="tiny", rounds=1)
    assert row["microseconds"].keys() == {"of a block's call", "of a step", "of a call of the pipeline"}
    assert row["step_seconds"] > 0
