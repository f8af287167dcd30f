"""HunyuanVideo 1.5, under a guider."""

from __future__ import annotations

import dataclasses

from stgfast.batching.layout import Grid
from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.guiders import guided_by, steps_of_modular_call
from stgfast.integrations.spec import ONE, Adapter, even_sigmas, patches

FACTS = Adapter(
    pipeline="",
    protocol="sequential",
    blocks=("transformer_blocks",),
    state=("hidden_states", "encoder_hidden_states"),
    rows=frozenset(
        {
            "hidden_states",
            "timestep",
            "timestep_r",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
            "image_embeds",
            "temb",
            "attention_mask",
        }
    ),
    attention="attn",
    schedule=even_sigmas,
    grid=Grid(patches),
    # A late layer of its 54.
    defaults=Guidance(Perturbation([37], scale=1.0)),
)
HUNYUAN_VIDEO_15 = guided_by(FACTS, "HunyuanVideo15Pipeline")
HUNYUAN_VIDEO_15_IMAGE = dataclasses.replace(
    HUNYUAN_VIDEO_15, pipeline="HunyuanVideo15ImageToVideoPipeline", images=ONE
)
HUNYUAN_VIDEO_15_MODULAR = guided_by(FACTS, "HunyuanVideo15ModularPipeline", steps_asked=steps_of_modular_call)
