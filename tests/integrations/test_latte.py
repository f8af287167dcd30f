"""Special to Latte."""

import dataclasses

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.integrations.families.latte import LATTE
from tests.integrations.families.latte import FAMILIES, transformer
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

(FAMILY,) = FAMILIES


def test_a_layer_is_a_pair_of_blocks():
    found = LATTE.blocks.units(transformer())
    assert [unit.layer for unit in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [unit.axes for unit in found] == [{"spatial"}, {"temporal"}] * 4
    assert {part.axis for part in LATTE.defaults.perturbations} == {"spatial", "temporal"}


@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_one_of_the_pair_may_be_skipped(axis):
    guidance = Guidance(Perturbation([1, 3], axis=axis, scale=1.5), rescale=0.5)
    made = FAMILY.run(stgfast.accelerate(FAMILY.pipe(), guidance), 2)
    same(made, FAMILY.plain(guidance, 2))
    assert distance(made, FAMILY.run(stgfast.accelerate(FAMILY.pipe(), guidance), 2, stg_mode="attention")) > 1e-3


def test_several_videos_of_a_prompt():
    def arguments(prompts, cfg=True):
        return {
            **FAMILY.arguments(prompts, cfg),
            "num_images_per_prompt": 2,
            "generator": torch.Generator().manual_seed(0),
        }

    family = dataclasses.replace(FAMILY, arguments=arguments)
    guidance = Guidance(Perturbation([2], kind="attention", axis="temporal"))
    made = family.run(stgfast.accelerate(FAMILY.pipe(), guidance), 2)
    assert len(made) == 4
    same(made, family.plain(guidance, 2))


def test_a_callback_cannot_change_the_scale():
    """The pipeline combines with the argument of the call."""

    def lower(pipe, step, timestep, values):
        pipe._guidance_scale = 1.0
        return {}

    guidance = Guidance(Perturbation([2], scale=1.5))
    pipe = stgfast.accelerate(FAMILY.pipe(), guidance)
    assert torch.equal(FAMILY.run(pipe, callback_on_step_end=lower), FAMILY.run(pipe))


def test_without_temporal_blocks_guidance_says_so_at_once():
    pipe = stgfast.accelerate(FAMILY.pipe(), Guidance(Perturbation([2])))
    with pytest.raises(SettingsError, match="enable_temporal_attentions=False"):
        FAMILY.run(pipe, enable_temporal_attentions=False)
    stock = FAMILY.run(FAMILY.pipe(), enable_temporal_attentions=False)
    assert torch.equal(FAMILY.run(pipe, enable_temporal_attentions=False, stg_scale=0.0), stock)
