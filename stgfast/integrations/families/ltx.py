"""LTX-Video: from text, from an image, from images and videos at any frame, and long ones from several prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import EACH
from stgfast.integrations.guiders import guided_by, steps_of_modular_call
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments, even_sigmas, latent_tokens, shifted, steps_of_call
from stgfast.presets import PRESETS


def size(call: CallArguments, denoiser: Arguments, block: Arguments) -> tuple[int, int, int]:
    return denoiser["num_frames"], denoiser["height"], denoiser["width"]


def size_with_conditions(call: CallArguments, denoiser: Arguments, block: Arguments) -> tuple[int, int, int]:
    """The size with conditions at later frames, which come before the video as further frames of the same size."""
    height, width = (call[name] // call["self"].vae_spatial_compression_ratio for name in ("height", "width"))
    return denoiser["hidden_states"].shape[1] // (height * width), height, width


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    return {**even_sigmas(pipe, call), **shifted(pipe, latent_tokens(pipe, call), 256, 4096, 0.5, 1.15)}


def condition_schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    own = call["timesteps"]
    return {"timesteps": linear_quadratic_schedule(call["num_inference_steps"]) * 1000 if own is None else own}


LTX = Adapter(
    pipeline="LTXPipeline",
    protocol="stacked",
    blocks=Blocks(
        lists=("transformer_blocks",),
        rows=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "encoder_attention_mask",
                "video_coords",
                "temb",
                "image_rotary_emb",
            }
        ),
        grid=Grid(size),
        unspread="it does not split the text mask",
    ),
    float32=True,
    # Of the 2B model, which has 28 blocks; the 13B model has 48, and is guided by schedules of its own.
    defaults=Guidance.preset("ltx"),
    source=PRESETS["ltx"].source,
    schedule=schedule,
)

# A timestep for every token; the frame that is given takes no part in the scheduler's step, but in the rescale.
LTX_IMAGE = replace(LTX, pipeline="LTXImageToVideoPipeline", clips=replace(LTX.clips, images=EACH))

LTX_CONDITION = replace(
    LTX,
    pipeline="LTXConditionPipeline",
    float32=False,
    blocks=replace(LTX.blocks, grid=Grid(size_with_conditions)),
    steps_asked=functools.partial(steps_of_call, strength="denoise_strength"),
    schedule=condition_schedule,
    own_solver="it has a timestep for every token",
)
LTX_MODULAR = guided_by(LTX, "LTXModularPipeline", steps_asked=steps_of_modular_call)


def steps_of_window(pipe: Any) -> int:
    """The number of steps without the scheduler's last timestep, which ends a window and is not a step."""
    return len(pipe.scheduler.timesteps) - 1


def steps_asked_of_window(call: CallArguments) -> int:
    return steps_of_call(call) - 1


def long_unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    skipped = call["skip_steps_sigma_threshold"]
    if skipped is not None and 0 < skipped < 1 and not guidance.inert:
        return f"skip_steps_sigma_threshold, which leaves out steps: got {skipped}, expected 1 or None"
    return None


LTX_LONG = replace(
    LTX,
    pipeline="LTXI2VLongMultiPromptPipeline",
    float32=False,
    blocks=replace(LTX.blocks, grid=None),
    steps=steps_of_window,
    steps_asked=steps_asked_of_window,
    windowed=True,
    unfit=long_unfit,
    own_solver="it drops the last timestep of its scheduler",
)
