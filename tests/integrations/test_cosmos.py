"""Special to Cosmos: its formula of CFG, x0 computed between the calls, one mask for all samples."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.by_calls import ByCalls
from tests.integrations.families import cosmos
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {family.name: family for family in cosmos.FAMILIES}
GUIDANCE = Guidance(Perturbation([1], scale=1.5), rescale=0.7)
every = pytest.mark.parametrize("name", FAMILIES)


def clip(family, pipe, **changes):
    with torch.no_grad():
        return family.result(pipe(**{**family.arguments(1), **changes}))


@every
def test_a_scale_of_its_own_counts_as_one_more(name):
    """c + s (c - u) is u + (1 + s) (c - u)."""
    family = FAMILIES[name]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    assert stgfast.explain(pipe, **family.arguments(1)).cfg == 4.0  # of guidance_scale=3.0
    pipe = stgfast.accelerate(family.pipe(), Guidance(cfg=4.0))
    same(family.run(pipe), family.run(family.pipe()))
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1], scale=1.5), rescale=0.7, cfg=3.5))
    expected = dataclasses.replace(family, cfg=3.5).plain(GUIDANCE)
    same(family.run(pipe), expected)


@every
def test_a_callback_may_change_the_scale(name):
    family = FAMILIES[name]

    def change(pipe, step, time, tensors):
        pipe._guidance_scale = 2.0
        return {}

    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1]), cfg=[4.0, 3.0]))
    expected = family.run(pipe)
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1])))
    same(clip(family, pipe, callback_on_step_end=change), expected)


@pytest.mark.parametrize("prompts", [1, 2])
def test_the_padding_mask_is_one_for_all_samples(monkeypatch, prompts):
    monkeypatch.setattr(transformer_cosmos, "transforms", cosmos.TRANSFORMS, raising=False)
    build = cosmos.builder(diffusers.Cosmos2TextToImagePipeline, cosmos.flow, concat_padding_mask=True)
    images = FAMILIES["Cosmos 2 for images"]
    family = ByCalls("padded", build, images.arguments, images.facts, cfg=4.0, result=images.result)
    made = family.run(stgfast.accelerate(family.pipe(), GUIDANCE), prompts)
    same(made, family.plain(GUIDANCE, prompts))
