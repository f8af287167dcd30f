"""The planner, without models, checked against complete histories."""

from hypothesis import given
from hypothesis import strategies as st

from stgfast.batching.plan import Branch, make_plan
from stgfast.batching.rows import chunks, spans
from stgfast.kinds import Mark

DEPTH = 5
SKIPPED = Mark("residual")
branches = st.lists(
    st.builds(
        Branch,
        name=st.just(""),
        source=st.sampled_from(["uncond", "cond"]),
        marks=st.dictionaries(st.integers(0, DEPTH - 1), st.sampled_from([SKIPPED, Mark("attention")]), max_size=3),
    ),
    min_size=1,
    max_size=6,
)


def run(plan):
    """Run a plan on histories instead of tensors. Each block records what it did."""
    stack = [(branch.source,) for branch in plan.branches]
    computed = []
    for number, step in enumerate(plan.steps):
        results = [(*stack[group], (number, mark)) for group, mark in zip(step.run, step.marks, strict=True)]
        computed += results
        assert [plan.branches[n].source for n in step.rows_of] == [stack[group][0] for group in step.run]
        both = results + [stack[group] for group in step.keep]
        stack = [both[group] for group in step.order]
    return stack, computed


def history(branch, blocks):
    run_blocks = [(k, branch.marks.get(k)) for k in range(blocks) if branch.marks.get(k) != SKIPPED]
    return (branch.source, *run_blocks)


@given(branches)
def test_every_branch_ends_with_its_own_history(made):
    stack, _ = run(make_plan(made, DEPTH))
    assert stack == [history(branch, DEPTH) for branch in made]


@given(branches)
def test_no_block_computes_the_same_history_twice(made):
    plan = make_plan(made, DEPTH)
    _, computed = run(plan)
    # A skipped block adds nothing to `history`, so branches that skip different blocks may be equal again there. The
    # plan compares what was done at every block, including skips.
    different = {
        (branch.source, *(branch.marks.get(j) for j in range(k + 1)))
        for branch in made
        for k in range(DEPTH)
        if branch.marks.get(k) != SKIPPED
    }
    assert len(computed) == sum(plan.computed) == len(different)


def test_mochi():
    made = [Branch("uncond", "uncond"), Branch("cond", "cond"), Branch("perturbed0", "cond", {34: SKIPPED})]
    plan = make_plan(made, 48)
    assert plan.computed == (2,) * 35 + (3,) * 13
    assert sum(plan.computed) == 109


def test_what_runs_is_a_leading_slice():
    """No copy before the fork, at the fork, or at a later skip of the same branch."""
    made = [
        Branch("uncond", "uncond"),
        Branch("cond", "cond"),
        Branch("perturbed0", "cond", {2: SKIPPED, 4: SKIPPED}),
    ]
    for step in make_plan(made, 6).steps:
        assert len(spans(step.run, 2)) == 1
        assert spans(step.run, 2)[0].start == 0


def test_no_branch_that_runs():
    plan = make_plan([Branch("perturbed0", "uncond", {0: SKIPPED})], 1)
    assert plan.computed == (0,)
    assert run(plan)[0] == [("uncond",)]


def test_spans_merge_neighbours():
    assert spans([0, 1, 3], 2) == [slice(0, 4), slice(6, 8)]
    assert spans([1, 0], 1) == [slice(1, 2), slice(0, 1)]


@given(st.integers(1, 50), st.integers(1, 10))
def test_chunks_are_few_and_even(rows, limit):
    sizes = [part.stop - part.start for part in chunks(rows, limit)]
    assert sum(sizes) == rows
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-rows // limit)
    assert chunks(rows, None) == [slice(0, rows)]
