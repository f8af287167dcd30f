"""HunyuanVideo: from text, and from an image (its own model, and SkyReels V1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stgfast.batching.layout import Grid
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, CallArguments, even_sigmas, patches
from stgfast.presets import PRESETS


def requested(call: CallArguments) -> float | None:
    """`guidance_scale` is an input of the distilled model; CFG proper is `true_cfg_scale`, with a negative prompt."""
    negative = call["negative_prompt"] is not None or (
        call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    )
    return float(call["true_cfg_scale"]) if call["true_cfg_scale"] > 1 and negative else None


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    return requested(call)


HUNYUAN_VIDEO = Adapter(
    pipeline="HunyuanVideoPipeline",
    protocol="embedded",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    state=("hidden_states", "encoder_hidden_states"),
    rows=frozenset(
        {
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "pooled_projections",
            "guidance",
            "temb",
            "attention_mask",
        }
    ),
    attention="attn",
    requested=requested,
    cfg_on="true_cfg_scale above 1 and a negative_prompt, or both of its embeds",
    live=live,
    schedule=even_sigmas,
    grid=Grid(patches),
    # Of 60 blocks: 20 with two streams, then 40 with one.
    defaults=Guidance.preset("hunyuan-video"),
    source=PRESETS["hunyuan-video"].source,
)

# The image comes as further channels or as the first frame's tokens, which have a modulation of their own.
HUNYUAN_VIDEO_IMAGE = replace(
    HUNYUAN_VIDEO,
    pipeline="HunyuanVideoImageToVideoPipeline",
    rows=HUNYUAN_VIDEO.rows | {"token_replace_emb"},
)

HUNYUAN_SKYREELS_IMAGE = replace(HUNYUAN_VIDEO, pipeline="HunyuanSkyreelsImageToVideoPipeline")
