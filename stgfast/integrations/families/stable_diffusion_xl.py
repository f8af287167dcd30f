"""Stable Diffusion XL: images, by a UNet."""

from __future__ import annotations

import functools
from typing import Any

from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.scales import requested_scale
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments, schedule_of_call, scheduled, sigmas_of_scheduler, steps_of_call
from stgfast.integrations.unet import GRID, units
from stgfast.presets import PRESETS


def requested(call: CallArguments) -> float | None:
    """The CFG scale; None for a distilled model, which has the scale as an input."""
    return requested_scale(call) if call["self"].unet.config.time_cond_proj_dim is None else None


def steps_asked(call: CallArguments) -> int:
    """The number of steps; with `denoising_end`, of those whose timesteps come before it."""
    steps, end = steps_of_call(call), call["denoising_end"]
    if not isinstance(end, float) or not 0 < end < 1:
        return steps
    pipe = call["self"]
    scheduler = scheduled(pipe, schedule_of_call(pipe, call))
    train = scheduler.config.num_train_timesteps
    return int((scheduler.timesteps >= round(train - end * train)).sum())


def first_sigmas(pipe: Any, steps: int) -> list[float]:
    """The first sigmas: `denoising_end` leaves out the last steps."""
    return sigmas_of_scheduler(pipe)[:steps]


STABLE_DIFFUSION_XL = Adapter(
    pipeline="StableDiffusionXLPipeline",
    protocol="stacked",
    blocks=Blocks(
        units=functools.partial(units, lists={"": "transformer_blocks"}),
        rows=frozenset(
            {
                "sample",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "attention_mask",
                "added_cond_kwargs",
                "timestep_cond",
                "hidden_states",
                "input_tensor",
                "temb",
            }
        ),
        full=True,  # every block's output is kept for the way up
        grid=GRID,
    ),
    requested=requested,
    steps_asked=steps_asked,
    sigmas=first_sigmas,
    cfg_on="guidance_scale above 1 and a unet that is not distilled, with time_cond_proj_dim=None",
    denoisers=("unet",),
    sample="sample",
    defaults=Guidance.preset("sdxl"),
    source=PRESETS["sdxl"].source,
)
