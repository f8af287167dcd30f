"""Stable Diffusion 3 and 3.5: images."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stgfast.batching.layout import Blocks, Grid, Unit
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments, schedule_of_call, shifted
from stgfast.presets import PRESETS


def units(denoiser: nn.Module) -> Sequence[Unit]:
    """Some blocks of 3.5 have a second self-attention, over the image only."""
    blocks = list(denoiser.get_submodule("transformer_blocks").children())
    found = []
    for number, block in enumerate(blocks):
        attentions = [module for name in ("attn", "attn2") if (module := getattr(block, name, None)) is not None]
        found.append(Unit(block, number, tuple(("", module) for module in attentions)))
    return found


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    layers = call["skip_guidance_layers"]
    if layers is None:
        return None
    return (
        f"skip_guidance_layers: got {layers}, expected None and the same as "
        f"stg=stgfast.Guidance(stgfast.Perturbation({layers}, scale=2.8), start=0.01, stop=0.2)"
    )


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    if call["mu"] is not None:
        return {**schedule_of_call(pipe, call), "mu": call["mu"]}
    size = pipe.default_sample_size * pipe.vae_scale_factor
    sides = [(call[name] or size) // pipe.vae_scale_factor // pipe.patch_size for name in ("height", "width")]
    return {**schedule_of_call(pipe, call), **shifted(pipe, sides[0] * sides[1], 256, 4096, 0.5, 1.16)}


STABLE_DIFFUSION_3 = Adapter(
    pipeline="StableDiffusion3Pipeline",
    protocol="stacked",
    blocks=Blocks(
        units=units,
        state=("encoder_hidden_states", "hidden_states"),
        rows=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "temb",
                "joint_attention_kwargs",
            }
        ),
        grid=Grid(functools.partial(patches, dims=(2, 3))),
    ),
    unfit=unfit,
    schedule=schedule,
    defaults=Guidance.preset("sd3.5-medium"),
    source=PRESETS["sd3.5-medium"].source,
)
