"""LTX-Video."""

from __future__ import annotations

from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.spec import Adapter

LTX = Adapter(
    pipeline="LTXPipeline",
    protocol="stacked",
    blocks=("transformer_blocks",),
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
    float32=True,
    defaults=Guidance(Perturbation([19], scale=1.0), rescale=0.7),
)
