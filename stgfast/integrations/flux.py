"""Flux: images."""

from __future__ import annotations

from typing import Any

from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.spec import Adapter, CallArguments


def requested(call: CallArguments) -> float | None:
    """`guidance_scale` is an input of the distilled model; CFG proper is `true_cfg_scale`, with a negative prompt."""
    negative = call["negative_prompt"] is not None or (
        call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    )
    return float(call["true_cfg_scale"]) if call["true_cfg_scale"] > 1 and negative else None


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    return requested(call)


FLUX = Adapter(
    pipeline="FluxPipeline",
    protocol="embedded",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    state=("encoder_hidden_states", "hidden_states"),
    rows=frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "temb"}),
    attention="attn",
    requested=requested,
    live=live,
    # No setting is published for this model; this is a late block of its 57.
    defaults=Guidance(Perturbation([40], scale=1.0)),
)
