"""Sana-Video: from text, and from an image. Its attention is linear, so there are no scores to replace by the
identity.
"""

from __future__ import annotations

from dataclasses import replace

from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.clips import ONE, Clips
from stgfast.integrations.spec import Adapter
from stgfast.perturbation import Perturbation

SANA_VIDEO = Adapter(
    pipeline="SanaVideoPipeline",
    protocol="stacked",
    clips=Clips(fps=16.0),
    blocks=Blocks(
        lists=("transformer_blocks",),
        attention="",
        rows=frozenset(
            {"hidden_states", "encoder_hidden_states", "encoder_attention_mask", "attention_mask", "timestep"}
        ),
    ),
    # 70% of its 20 blocks.
    defaults=Guidance(Perturbation([14], scale=1.0)),
)
SANA_VIDEO_IMAGE = replace(SANA_VIDEO, pipeline="SanaImageToVideoPipeline", clips=replace(SANA_VIDEO.clips, images=ONE))
