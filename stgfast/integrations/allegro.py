"""Allegro."""

from __future__ import annotations

from typing import Any

from stgfast.batching.layout import Grid
from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.spec import Adapter, CallArguments, patches, requested_scale


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """The pipeline combines with what it was called with, whatever a callback does to its `guidance_scale`."""
    return requested_scale(call)


ALLEGRO = Adapter(
    pipeline="AllegroPipeline",
    protocol="stacked",
    fps=15.0,
    blocks=("transformer_blocks",),
    rows=frozenset(
        {
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "attention_mask",
            "encoder_attention_mask",
            "temb",
        }
    ),
    live=live,
    grid=Grid(patches),
    # About 70% of the way through its 32 blocks.
    defaults=Guidance(Perturbation([22], scale=1.0)),
    exact=("vae",),
    tiled=True,
)
