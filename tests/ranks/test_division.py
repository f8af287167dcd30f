"""Which rank computes what: pure functions, compared with all possible divisions."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stgfast.batching.plan import Branch, make_plan
from stgfast.kinds import Mark
from stgfast.ranks.division import TRIES, divide

SKIPPED, IDENTITY = Mark("residual"), Mark("attention")
UNCOND, COND = Branch("uncond", "uncond"), Branch("cond", "cond")
DEPTH = 5
perturbed = st.builds(
    lambda source, marks: (source, marks),
    source=st.sampled_from(["uncond", "cond"]),
    marks=st.dictionaries(st.integers(0, DEPTH - 1), st.sampled_from([SKIPPED, IDENTITY]), max_size=3),
)


def load(branches, names):
    return sum(make_plan([branch for branch in branches if branch.name in names], DEPTH).computed) if names else 0


def best_of_all(branches, ranks):
    """The smallest load of the busiest rank, and among these the smallest total."""
    loads = []
    for places in itertools.product(range(ranks), repeat=len(branches)):
        shares = [
            {one.name for one, place in zip(branches, places, strict=True) if place == rank} for rank in range(ranks)
        ]
        each = [load(branches, share) for share in shares]
        loads.append((max(each), sum(each)))
    return min(loads)


@settings(max_examples=50)
@given(parts=st.lists(perturbed, max_size=3), ranks=st.integers(1, 4), full=st.booleans())
def test_no_division_is_better(parts, ranks, full):
    branches = [UNCOND, COND, *(Branch(f"perturbed{n}", *part) for n, part in enumerate(parts))]
    by_source = [[one for one in branches if one.source == source] for source in ("uncond", "cond")]
    for calls in ([branches], by_source):
        division = divide(calls, DEPTH, ranks, full=full)
        assert sorted(name for share in division.shares for name in share) == sorted(one.name for one in branches)
        assert (division.longest, sum(division.loads)) == best_of_all(branches, ranks)
        assert [load(branches, share) for share in division.shares] == list(division.loads)
        assert len(division.shares) <= ranks


def test_mochi_on_two_ranks():
    division = divide([[UNCOND, COND, Branch("perturbed0", "cond", {34: SKIPPED})]], 48, 2)
    assert division.shares == (frozenset({"uncond"}), frozenset({"cond", "perturbed0"}))
    assert division.loads == (48, 61)


def test_prompts_are_divided_first():
    branches = [UNCOND, COND, Branch("perturbed0", "cond", {34: SKIPPED})]
    two = divide([branches], 48, 2, prompts=2)
    assert [two.part(rank) for rank in range(2)] == [0, 1]
    assert two.share(0) == two.share(1) == {"uncond", "cond", "perturbed0"}
    assert two.senders == (0, 1)
    four = divide([branches], 48, 4, prompts=6)
    assert [four.part(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [four.load(rank) for rank in range(4)] == [48, 61, 48, 61]
    assert four.senders == (0, 1, 2, 3)


def test_ranks_that_gain_nothing_compute_what_others_do():
    """Every rank computes something, because it needs an output for its shape."""
    division = divide([[COND]], 4, 3)
    assert division.shares == (frozenset({"cond"}),)
    assert [division.share(rank) for rank in range(3)] == [{"cond"}] * 3
    assert division.senders == (0,)


@pytest.mark.parametrize("count", [12, 40])
def test_many_branches_take_no_time(count):
    """The best of a fixed number of tries, which is the same on every rank."""
    perturbed = [Branch(f"perturbed{n}", "cond", {n % 40: SKIPPED, (n * 7) % 40: IDENTITY}) for n in range(count)]
    one, other = (divide([[UNCOND, COND, *perturbed]], 40, 8) for _ in range(2))
    assert one == other
    alone = sum(make_plan([UNCOND, COND, *perturbed], 40).computed)
    assert alone / 8 <= one.longest < alone / 2
    assert TRIES <= 20_000
