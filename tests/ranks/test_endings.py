"""However one process of a clip ends, no other waits for it, and all report the reason in one sentence."""

import signal

import pytest
import torch

from tests.processes import ended, printed, result, results, started
from tests.ranks import jobs

pytestmark = pytest.mark.xdist_group("processes")  # one after the other

OF = "a clip over 2 processes: "
SAME = "expected the same on all: give every rank the same arguments and seeds"
# What rank 1 reports, and what the others do.
WAYS = {
    "raises": ("ValueError: a sentence of the callback", "rank 1 failed: ValueError: a sentence of the callback"),
    "is interrupted": ("KeyboardInterrupt: ", "rank 1 failed: KeyboardInterrupt"),
    "stops": ("", "rank 1 at the end of the call"),
    "has another seed": ("", "on latents"),
    "draws noise": ("", "on latents"),
    "has other steps": ("", "rank 1 at step 0 of 5"),
    "has bad settings": ("SettingsError: layers", "rank 1 failed: SettingsError: layers"),
}


def test_all_end_and_can_begin_again():
    ended = results(2, jobs.endings, list(WAYS))
    for (own, others), (said, took, clip), (of_one, _, other) in zip(WAYS.values(), *ended, strict=True):
        assert said.startswith(f"RankError: {OF}")
        assert others in said
        assert of_one.startswith(own) if own else of_one == said
        assert own or SAME in said
        assert "\n" not in said
        assert took < 20
        assert clip is None or torch.equal(clip, other)


@pytest.mark.parametrize("how", ["is killed", "is killed as it sends", "exits"])
@pytest.mark.parametrize("size", [2, 4])
def test_one_that_has_gone(tmp_path, how, size):
    running = started(size, jobs.ending, how, folder=tmp_path)
    codes = ended(running, 60)
    assert codes[1] == (0 if how == "exits" else -signal.SIGKILL), printed(tmp_path, 1)
    for rank in {0, 2, 3} & set(range(size)):
        said, took, _ = result(tmp_path, rank)
        assert said.startswith(f"RankError: a clip over {size} processes: rank 1 ")
        assert "is gone: its process ended" in said or how == "exits"
        assert took < 20


def test_one_that_hangs():
    """No process waits longer than the limit, here 2 s."""
    (said, took, _), (late, _, _) = results(2, jobs.ending, "hangs")
    assert said == f"RankError: {OF}rank 1 did not answer within 2 s"
    assert 2 < took < 6
    assert late.startswith(f"RankError: {OF}")
