"""Motif Video, under a guider."""

from __future__ import annotations

import dataclasses

from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.guiders import guided_by
from stgfast.integrations.spec import Adapter
from stgfast.perturbation import Perturbation

FACTS = Adapter(
    pipeline="",
    protocol="sequential",
    blocks=Blocks(
        lists=("transformer_blocks", "single_transformer_blocks"),
        state=("hidden_states", "encoder_hidden_states"),
        rows=frozenset(
            {
                "hidden_states",
                "timestep",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "image_embeds",
                "temb",
                "attention_mask",
            }
        ),
        attention="attn",
        full=True,  # the last ones are decoder blocks, which use outputs of earlier ones
    ),
    early=True,  # predictions are copied at once
    # 70% of its 60 blocks.
    defaults=Guidance(Perturbation([42], scale=1.0)),
)
MOTIF_VIDEO = guided_by(FACTS, "MotifVideoPipeline")
MOTIF_VIDEO_IMAGE = dataclasses.replace(MOTIF_VIDEO, pipeline="MotifVideoImage2VideoPipeline")  # one clip in a call
