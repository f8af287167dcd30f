"""Allegro."""

from __future__ import annotations

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import Clips
from stgfast.integrations.scales import live_requested
from stgfast.integrations.spec import Adapter, patches
from stgfast.perturbation import Perturbation

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
    live=live_requested,
    # About 70% of its 32 blocks.
    defaults=Guidance(Perturbation([22], scale=1.0)),
)
