"""A clip whose branches are split over processes, against the plain method and against one process."""

import pytest
import torch

import stgfast
from tests.integrations import test_ltx2 as ltx2
from tests.precision import computing_in, same
from tests.processes import results
from tests.ranks import jobs

pytestmark = pytest.mark.xdist_group("processes")  # one after the other

# One for each protocol: one call of the denoiser, one for each source, an embedded scale, the pipeline's own passes.
SOME = ["Mochi", "LTX", "CogVideoX", "HunyuanVideo", "Wan", "Stable Video Diffusion", "Motif Video", "HunyuanVideo15"]
CASES = [
    {"names": SOME, "settings": {"rescale": 0.7}},
    {"names": ["Mochi", "Wan"], "prompts": 2, "dtype": "float32", "max_rows": 1},
]
# These are not compared with the plain method.
LONG = ["LTX", "Wan", "HunyuanVideo15"]
STEPS = {"num_inference_steps": 6}
CARRIED = [
    {"names": LONG, "call": STEPS, "settings": {"reuse": 2, "reuse_cfg": 2, "reuse_order": 1}},
    {"names": LONG, "call": STEPS, "settings": {"reuse_blocks": 2, "stop": 0.7}},
    # A branch that is absent in some steps: the others stay on the rank that keeps their block residuals.
    {"names": ["LTX"], "call": STEPS, "settings": {"reuse_blocks": 2, "scale": [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]}},
    {"names": ["Wan", "LTX", "Cosmos"], "settings": {"start": 0.5}},
    {"names": ["LTX"], "attention": "auto", "max_rows": "all"},
]


def against_the_plain_method(made, case):
    prompts, dtype = case.get("prompts", 1), getattr(torch, case.get("dtype", "float64"))
    with computing_in(dtype):
        for name in case["names"]:
            family = jobs.FAMILIES[name]
            clips = [by_name[name] for by_name in made]
            assert all(torch.equal(clip, clips[0]) for clip in clips), name
            family.check(clips[0], jobs.guidance_of(family, **case.get("settings", {})), prompts)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.again)])
def test_equals_the_plain_method(size):
    for made, case in zip(zip(*results(size, jobs.many_clips, CASES), strict=True), CASES, strict=True):
        against_the_plain_method(made, case)


@pytest.mark.again
@pytest.mark.parametrize("size", [2, 4])
def test_every_family(size):
    case = {"names": list(jobs.FAMILIES)}
    (made,) = zip(*results(size, jobs.many_clips, [case]), strict=True)
    against_the_plain_method(made, case)


@pytest.mark.again
def test_what_is_carried_on_is_what_one_process_carries_on():
    for made, case in zip(zip(*results(2, jobs.many_clips, CARRIED), strict=True), CARRIED, strict=True):
        with computing_in(torch.float64):
            for name in case["names"]:
                family = jobs.FAMILIES[name]
                pipe = stgfast.accelerate(family.pipe(), jobs.guidance_of(family, **case.get("settings", {})))
                alone = family.run(pipe, **case.get("call", {}))
                for by_name in made:
                    same(by_name[name], alone)


def test_the_passes_of_a_pipeline_itself():
    """LTX-2 requests its perturbed branches itself, for video and audio."""
    with computing_in(torch.float64):
        expected = ltx2.call(ltx2.pipeline(version="2.0"), prompts=1)
    for made in results(3, jobs.four_passes, "2.0", 1):
        same(made, expected)


def test_loads_are_as_planned():
    """Counted on the real modules: of 109 block-rows in a step of Mochi."""
    assert results(2, jobs.loads_of_mochi) == [(48, 2), (61, 1)]


@pytest.mark.again
def test_loads_of_ltx2_are_as_planned():
    """Of 164 block-rows in a step."""
    assert results(3, jobs.loads_of_ltx2) == [(48, 3), (68, 2), (48, 3)]
