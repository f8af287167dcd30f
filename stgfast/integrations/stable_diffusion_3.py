"""Stable Diffusion 3 and 3.5: images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stgfast.batching.stack import Unit
from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.spec import Adapter, CallArguments


def units(denoiser: nn.Module) -> Sequence[Unit]:
    """Some blocks of 3.5 have a second self-attention, of the image alone."""
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


STABLE_DIFFUSION_3 = Adapter(
    pipeline="StableDiffusion3Pipeline",
    protocol="stacked",
    units=units,
    state=("encoder_hidden_states", "hidden_states"),
    rows=frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "temb"}),
    unfit=unfit,
    # As skip-layer guidance was published for 3.5 medium; there for the steps from 0.01 to 0.2 of the run alone.
    defaults=Guidance(Perturbation([7, 8, 9], scale=2.8), start=0.01, stop=0.2),
)
