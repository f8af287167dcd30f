"""Special to Wan: two transformers, two images, a part of a video, hints between the blocks."""

import inspect
from dataclasses import replace

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError, UnsupportedPipelineError
from tests.integrations.families import wan
from tests.integrations.family import Family
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {family.name: family for family in wan.FAMILIES}
GUIDANCE = Guidance(Perturbation([1], scale=1.5, of="uncond", base="guided"))


def clip(family, pipe, **changes):
    with torch.no_grad():
        return family.result(pipe(**{**family.arguments(1), **changes}))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "two transformers" in name])
def test_every_transformer_makes_its_step_with_its_own_scale(name):
    family = FAMILIES[name]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    with family.counted(pipe) as rows:
        made = family.run(pipe)
    assert all(rows)
    assert len(rows) == 2 * len(family.facts.parts(pipe.transformer))
    same(made, family.plain(GUIDANCE))
    assert distance(clip(family, pipe, guidance_scale_2=3.5), made) > 1e-3


def test_without_a_scale_of_its_own_the_second_transformer_has_that_of_the_first():
    family = FAMILIES["Wan of two transformers"]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    assert torch.equal(clip(family, pipe, guidance_scale_2=None), clip(family, pipe, guidance_scale_2=4.0))


def test_one_model_in_both_places_is_refused():
    pipe = FAMILIES["Wan of two transformers"].build()
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(UnsupportedPipelineError, match="one model as both transformer and transformer_2"):
        stgfast.accelerate(pipe)


def test_a_first_and_a_last_image_are_two_rows_of_one_sample():
    from_image = FAMILIES["Wan from an image"]

    def arguments(prompts, cfg=True):
        return {**from_image.arguments(prompts, cfg), "last_image": wan.image(seed=1)}

    build = wan.builder(wan.FROM_IMAGE, **wan.WITH_IMAGE, pos_embed_seq_len=10)
    family = Family("Wan from two images", build, arguments, wan.SEQUENTIAL, cfg=4.0)
    for prompts in (1, 2):
        made = family.run(stgfast.accelerate(family.pipe(), GUIDANCE), prompts)
        same(made, family.plain(GUIDANCE, prompts))


def test_a_schedule_has_a_number_for_every_step_that_is_left_of_a_video():
    family = FAMILIES["Wan from a video"]  # 4 steps, of which strength leaves 2
    schedule = Guidance(Perturbation([1], scale=[1.5, 0.0]))
    pipe = stgfast.accelerate(family.pipe(), schedule)
    same(family.run(pipe), family.plain(schedule))
    explained = stgfast.explain(pipe, **family.arguments(1))
    assert [phase.steps for phase in explained.phases] == [1, 1]
    with pytest.raises(SettingsError, match="got 4 numbers, expected 2, one for every step"):
        family.run(pipe, stg_scale=[1.0] * 4)


def test_all_that_has_a_row_for_every_sample_in_a_model_with_hints_is_known():
    """The pipeline takes one prompt at a time, so the model itself is called, on 5 samples."""
    pipe = stgfast.accelerate(FAMILIES["Wan VACE"].build(), GUIDANCE)
    adapter = pipe._stgfast.adapter
    layout = adapter.layouts(pipe)["transformer"]
    found = set()

    def look(module, args, kwargs):
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == 5:
                found.add(name)

    for module in (layout.denoiser, *(unit.module for unit in layout.units)):
        module.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        pipe.transformer(
            hidden_states=torch.randn(5, 16, 3, 4, 4),
            timestep=torch.full((5,), 500.0),
            encoder_hidden_states=torch.randn(5, 16, 32),
            control_hidden_states=torch.randn(5, 96, 3, 4, 4),
            control_hidden_states_scale=torch.ones(2),
        )
    assert found == adapter.blocks.rows - {"encoder_hidden_states_image"}


def test_hints_are_made_once_for_branches_that_differ_later():
    family = FAMILIES["Wan VACE"]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    explained = stgfast.explain(pipe, **family.arguments(1))
    assert explained.phases[0].rows == (2, 2, 2, 2, 3, 3)  # two hints, four blocks


def test_the_unconditional_branch_itself_weakened_costs_nothing():
    """g = u' + s (c - u'): one of the blocks runs on one row fewer than with CFG alone."""
    family, preset = FAMILIES["Wan"], Guidance.preset("wan-slg")
    (part,) = preset.perturbations
    guidance = replace(preset, perturbations=(replace(part, layers=(2,)),))  # the tiny model has 4 layers

    def formula(cond, uncond, perturbed, step):
        return perturbed[0] + (part.scale + 1) * (cond - perturbed[0])

    pipe = stgfast.accelerate(family.pipe(), guidance)
    with family.counted(pipe) as rows:
        made = family.run(pipe, 2)
    same(made, family.plain(guidance, 2, formula=formula))
    assert rows == [8, 8, 4, 8]  # two prompts, two steps
    assert stgfast.explain(pipe, **family.arguments(1)).block_rows == 2 * (2 * 4 - 1)
