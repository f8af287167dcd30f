"""Stable Diffusion XL: images, by a UNet."""

from __future__ import annotations

import functools

from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, CallArguments, requested_scale
from stgfast.integrations.unet import GRID, units
from stgfast.presets import PRESETS


def requested(call: CallArguments) -> float | None:
    """A distilled model has the scale as an input, and no CFG."""
    return requested_scale(call) if call["self"].unet.config.time_cond_proj_dim is None else None


STABLE_DIFFUSION_XL = Adapter(
    pipeline="StableDiffusionXLPipeline",
    protocol="stacked",
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
    requested=requested,
    cfg_on="guidance_scale above 1 and a unet that is not distilled, with time_cond_proj_dim=None",
    grid=GRID,
    denoisers=("unet",),
    sample="sample",
    defaults=Guidance.preset("sdxl"),
    source=PRESETS["sdxl"].source,
)
