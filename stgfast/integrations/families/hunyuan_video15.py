"""HunyuanVideo 1.5, under a guider."""

from __future__ import annotations

import dataclasses

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import ONE
from stgfast.integrations.guiders import guided_by, steps_of_modular_call
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import even_sigmas
from stgfast.perturbation import Perturbation

FACTS = Adapter(
    pipeline="",
    protocol="sequential",
    blocks=Blocks(
        lists=("transformer_blocks",),
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
        grid=Grid(patches),
    ),
    schedule=even_sigmas,
    # A late one of its 54 layers.
    defaults=Guidance(Perturbation([37], scale=1.0)),
)
HUNYUAN_VIDEO_15 = guided_by(FACTS, "HunyuanVideo15Pipeline")
HUNYUAN_VIDEO_15_IMAGE = dataclasses.replace(
    HUNYUAN_VIDEO_15,
    pipeline="HunyuanVideo15ImageToVideoPipeline",
    clips=dataclasses.replace(HUNYUAN_VIDEO_15.clips, images=ONE),
)
HUNYUAN_VIDEO_15_MODULAR = guided_by(FACTS, "HunyuanVideo15ModularPipeline", steps_asked=steps_of_modular_call)
