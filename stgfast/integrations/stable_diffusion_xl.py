"""Stable Diffusion XL: images, by a UNet."""

from __future__ import annotations

import functools

from stgfast.guidance import ATTENTION, Guidance, Perturbation
from stgfast.integrations.spec import Adapter, CallArguments, requested_scale
from stgfast.integrations.unet import units


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
    denoisers=("unet",),
    sample="sample",
    # As perturbed-attention guidance was published: the middle of the UNet, scale 3.
    defaults=Guidance(Perturbation([4], kind=ATTENTION, scale=3.0)),
)
