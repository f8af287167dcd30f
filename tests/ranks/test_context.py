"""Guidance with tokens or weights that diffusers splits over processes; also with branches split."""

import pytest
import torch

import stgfast
from tests.precision import computing_in, near, same
from tests.processes import results
from tests.ranks import jobs

pytestmark = pytest.mark.xdist_group("processes")  # one after the other

KINDS = ["attention", "residual", "blur", "carried on"]
OTHERS = ["Wan of two transformers", "Wan, a time for every token", "modular Wan", "Lucy Edit", "ChronoEdit"]
REFUSED = {
    ("LTX", "context", "residual"): (
        "LTXPipeline: got pipe.transformer with its tokens split over processes, which diffusers cannot do for this "
        "model: it does not split the text mask"
    ),
    ("Flux", "context", "blur"): (
        "blur of the queries: got pipe.transformer with its tokens split over processes, including text tokens"
    ),
}


def as_one_process(cases, size):
    made = results(size, jobs.spread, cases)
    for name, how, guided in cases:
        family = jobs.FAMILIES[name]
        clips = [by_case[name, how, guided] for by_case in made]
        if (name, how, guided) in REFUSED:
            assert all(clip.startswith(REFUSED[name, how, guided]) for clip in clips), clips
            continue
        assert isinstance(clips[0], torch.Tensor), clips[0]
        assert all(torch.equal(clip, clips[0]) for clip in clips)
        if guided == "compiled":
            near(clips[0], family.plain(jobs.GUIDED[guided], **jobs.call_of(family, guided)))
            continue
        with computing_in(torch.float64):
            if guided == "carried on":
                same(clips[0], family.run(stgfast.accelerate(family.pipe(), jobs.GUIDED[guided])))
            else:
                same(clips[0], family.plain(jobs.GUIDED[guided], **jobs.call_of(family, guided)))
    return made


def test_equals_the_plain_method():
    cases = [("Wan", "context", kind) for kind in KINDS]
    cases += [("Flux", how, kind) for how in ("context", "tensors") for kind in KINDS[:2]]
    made = as_one_process([*cases, *REFUSED], 2)
    # Of the two layers with identity rows, only one has all its rows in one call.
    assert [by_case["ways"] for by_case in made] == [{(1,)}] * 2


@pytest.mark.again
def test_equals_the_plain_method_for_others_too():
    cases = [(name, "context", kind) for name in OTHERS for kind in KINDS]
    as_one_process([*cases, ("Wan", "context", "compiled"), ("Flux", "tensors", "blur")], 2)


@pytest.mark.again
def test_branches_beside_tokens():
    """A mesh of two dimensions: branches over one, tokens over the other."""
    cases = [("Wan", "both", kind) for kind in (*KINDS, "compiled")]
    as_one_process([*cases, *(("Flux", "both", kind) for kind in KINDS[:2])], 4)


@pytest.mark.again
@pytest.mark.parametrize("name", ["LTX"])
def test_what_is_refused_fails_in_diffusers_itself(name):
    assert all("must match the size" in said for said in results(2, jobs.stock_in_context, name))
