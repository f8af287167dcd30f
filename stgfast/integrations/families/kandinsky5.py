"""Kandinsky 5: text to video, image to video, text to image."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.batching.values import identity_of_scores
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments
from stgfast.kinds import BLUR
from stgfast.perturbation import Perturbation


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """Whether there is CFG is decided in each step. The scale is fixed when the call begins."""
    return float(call["guidance_scale"]) if pipe.guidance_scale > 1 else None


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    if pipe.transformer.config.attention_type == "nabla" and any(p.kind == BLUR for p in guidance.perturbations):
        return "a blur of queries: expected a model of full attention, got nabla, which reorders tokens"
    return None


KANDINSKY5 = Adapter(
    pipeline="Kandinsky5T2VPipeline",
    protocol="sequential",
    blocks=Blocks(
        # The blocks of the text before these are small: they run for all rows, so that these need not.
        lists=("visual_transformer_blocks",),
        attention="self_attention",
        state=("visual_embed",),
        rows=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "pooled_projections",
                "visual_embed",
                "text_embed",
                "time_embed",
                "rope",
                "rotary_emb",
            }
        ),
        identity=identity_of_scores,
        grid=Grid(functools.partial(patches, dims=(1, 2, 3)), query="to_query"),
    ),
    live=live,
    unfit=unfit,
    # 70% of the depth of the Lite models, which have 32 blocks; Pro has 60.
    defaults=Guidance(Perturbation([22], scale=1.0)),
)
# The first frame is given, and takes no part in the scheduler's step, but in the rescale.
KANDINSKY5_IMAGE = replace(KANDINSKY5, pipeline="Kandinsky5I2VPipeline")
KANDINSKY5_TO_IMAGE = replace(KANDINSKY5, pipeline="Kandinsky5T2IPipeline")
