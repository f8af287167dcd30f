"""Allegro."""

from __future__ import annotations

from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.scales import requested_scale
from stgfast.integrations.spec import Adapter, Clips, patches
from stgfast.integrations.steps import CallArguments
from stgfast.perturbation import Perturbation


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """The pipeline combines with what it was called with, whatever a callback does to its `guidance_scale`."""
    return requested_scale(call)


ALLEGRO = Adapter(
    pipeline="AllegroPipeline",
    protocol="stacked",
    clips=Clips(fps=15.0, exact=("vae",), tiled=True),
    blocks=Blocks(
        lists=("transformer_blocks",),
        rows=frozenset(
            {"hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask", "temb"}
        ),
        grid=Grid(patches),
    ),
    live=live,
    # About 70% of the way through its 32 blocks.
    defaults=Guidance(Perturbation([22], scale=1.0)),
)
