"""Measuring a step over several processes."""

import pytest

from stgfast import cli
from stgfast.bench import command
from stgfast.bench.ranks import over_ranks
from tests.processes import results

pytestmark = pytest.mark.xdist_group("processes")  # one after the other


def measured():
    return over_ranks("mochi", size="tiny", device="cpu", steps=2, rounds=1)


def test_a_row():
    first, second = results(2, measured)
    assert first["block_rows"] == second["block_rows"] == {1: [18], 2: [8, 10]}
    assert first["predicted"] == {1: 1.0, 2: 0.5556}
    assert first["over_one"][1] == 1.0
    # One prediction for every branch that is not a rank's own.
    sent = first["received"][2]
    assert first["received"][1] == [0]
    assert sent[0] == 2 * sent[1] > 0
    assert max(first["distance"].values()) < 1e-4
    assert "2 ranks" in command.SUMMARIES["ranks"](first)


def test_one_process_is_none(capsys):
    assert cli.main(["bench", "--ranks"]) == command.WRONG
    assert "--ranks: got 'one process', expected several: torchrun --nproc-per-node" in capsys.readouterr().err
