"""Special to Stable Video Diffusion."""

import dataclasses

import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.integrations.families.stable_video_diffusion import STABLE_VIDEO_DIFFUSION
from tests.integrations.families.stable_video_diffusion import FAMILIES, FRAMES
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

(FAMILY,) = FAMILIES
BOTH = Guidance([Perturbation([3], kind="attention", scale=2.0, axis=axis) for axis in ("spatial", "temporal")])


def test_layers_of_the_real_model():
    with torch.device("meta"):
        unet = diffusers.UNetSpatioTemporalConditionModel()
    found = STABLE_VIDEO_DIFFUSION.blocks.units(unet)
    assert [unit.layer for unit in found if unit.layer is not None] == list(range(16))
    names = {module: name for name, module in unet.named_modules()}
    layers = [names[unit.module] for unit in found if unit.layer is not None]
    assert layers[5:8] == ["down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.1.attentions.0"]
    assert all(unit.axes == ({"spatial", "temporal"} if unit.layer is not None else set()) for unit in found)
    assert {layer for part in STABLE_VIDEO_DIFFUSION.defaults.perturbations for layer in part.layers} == {8}


def test_several_transformer_blocks_in_a_layer():
    with torch.device("meta"):
        unet = diffusers.UNetSpatioTemporalConditionModel(transformer_layers_per_block=2)
    layer = next(unit for unit in STABLE_VIDEO_DIFFUSION.blocks.units(unet) if unit.layer == 3)
    assert [axis for axis, _ in layer.attentions] == ["spatial", "spatial", "temporal", "temporal"]


def test_several_videos_of_an_image():
    def arguments(prompts, cfg=True):
        return {
            **FAMILY.arguments(prompts, cfg),
            "num_videos_per_prompt": 2,
            "generator": torch.Generator().manual_seed(0),
        }

    family = dataclasses.replace(FAMILY, arguments=arguments)
    expected = family.plain(BOTH, 2)
    made = family.run(stgfast.accelerate(FAMILY.pipe(), BOTH), 2)
    assert len(made) == 4
    same(made, expected)


def test_a_perturbed_branch_may_be_held_against_the_cfg_result():
    guidance = Guidance(Perturbation([3], of="uncond", base="guided", scale=2.0))
    same(FAMILY.run(stgfast.accelerate(FAMILY.pipe(), guidance)), FAMILY.plain(guidance))


def test_a_cfg_schedule_replaces_the_scale_of_every_frame():
    plain = dataclasses.replace(FAMILY, cfg=2.5).plain(BOTH)
    made = FAMILY.run(stgfast.accelerate(FAMILY.pipe(), dataclasses.replace(BOTH, cfg=2.5)))
    same(made, plain)


def test_a_callback_may_change_the_scale():
    """The pipeline reads its scale in each step, and so does the guidance."""

    def lower(pipe, step, timestep, values):
        pipe._guidance_scale = pipe._guidance_scale * 0.5 + 1.0
        return {}

    now = dataclasses.replace(FAMILY, cfg=lambda pipe, denoiser: pipe.guidance_scale.double())
    expected = dataclasses.replace(
        now, arguments=lambda *given, **named: {**FAMILY.arguments(*given, **named), "callback_on_step_end": lower}
    ).plain(BOTH)
    made = FAMILY.run(stgfast.accelerate(FAMILY.pipe(), BOTH), callback_on_step_end=lower)
    same(made, expected)
    assert distance(FAMILY.run(stgfast.accelerate(FAMILY.pipe(), BOTH)), expected) > 1e-3


def test_sigmas_are_steps_but_for_the_last():
    arguments = {**FAMILY.arguments(1), "sigmas": [10.0, 1.0, 0.0]}
    pipe = stgfast.accelerate(FAMILY.pipe(), Guidance(Perturbation([3], scale=[1.0, 2.0])))
    assert pipe(**arguments).frames.isfinite().all()
    assert pipe.num_timesteps == 2
    assert stgfast.explain(pipe, **arguments).phases[-1].last == 1
    with pytest.raises(SettingsError, match="got 3 numbers, expected 2"):
        pipe(**arguments, stg_scale=[1.0, 2.0, 3.0])


def test_what_the_model_cannot_do_is_said_at_once():
    pipe = FAMILY.pipe()
    with pytest.raises(SettingsError, match="residual perturbation along an axis"):
        stgfast.accelerate(pipe, Guidance(Perturbation([3], axis="spatial")))
    with pytest.raises(SettingsError, match=r"layers.*got \[8\], expected numbers from 0 to 3"):
        stgfast.accelerate(pipe)  # of four layers
    stgfast.accelerate(pipe, Guidance(Perturbation([3], of="uncond")))
    with pytest.raises(SettingsError, match="max_guidance_scale above 1"):
        FAMILY.run(pipe, cfg=False)
    assert FAMILY.run(pipe).shape == (1, FRAMES, 4, 4, 4)
