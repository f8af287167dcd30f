"""Special to Kandinsky 5: sparse attention in another order of tokens, and CFG that may end during the run."""

import dataclasses
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.families import kandinsky5
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {family.name: family for family in kandinsky5.FAMILIES}
SPARSE = {"attention_type": "nabla", "attention_P": 0.9, "attention_wT": 1, "attention_wW": 3, "attention_wH": 3}


def test_sparse_attention():
    family = FAMILIES["Kandinsky 5"]

    def build(other=False):
        pipe = kandinsky5.builder(diffusers.Kandinsky5T2VPipeline, **SPARSE)(other)
        for block in pipe.transformer.visual_transformer_blocks:  # if it were set on the model, all tests would have it
            block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
        return pipe

    def arguments(prompts, cfg=True):
        return {**family.arguments(prompts, cfg), "height": 128, "width": 128}  # squares of 8 x 8 tokens

    guidance = Guidance(Perturbation([1, 3], scale=1.5), rescale=0.7)
    sparse = dataclasses.replace(family, build=build, arguments=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that flex attention is slow where it is not compiled
        made = sparse.run(stgfast.accelerate(build(), guidance), 2)
        same(made, sparse.plain(guidance, 2))


def test_cfg_may_end_on_the_way():
    family = FAMILIES["Kandinsky 5"]

    def end(pipe, step, time, tensors):
        pipe._guidance_scale = 1.0
        return {}

    def clip(pipe):
        with torch.no_grad():
            return family.result(pipe(**family.arguments(1), callback_on_step_end=end))

    expected = clip(family.pipe())
    made = clip(stgfast.accelerate(family.pipe(), Guidance(Perturbation([1], scale=[0.0, 1e-14]))))
    same(made, expected)
    made = clip(stgfast.accelerate(family.pipe(), Guidance(Perturbation([1], scale=[0.0, 1.0]))))
    assert distance(made, expected) > 1e-3
