"""HunyuanVideo: from text, and from an image (its own model, and SkyReels V1)."""

from __future__ import annotations

from dataclasses import replace

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import EACH
from stgfast.integrations.scales import live_true_cfg_scale, true_cfg_scale
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import even_sigmas
from stgfast.presets import PRESETS

HUNYUAN_VIDEO = Adapter(
    pipeline="HunyuanVideoPipeline",
    protocol="embedded",
    blocks=Blocks(
        lists=("transformer_blocks", "single_transformer_blocks"),
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
        grid=Grid(patches),
    ),
    requested=true_cfg_scale,
    cfg_on="true_cfg_scale above 1 and a negative_prompt, or both of its embeds",
    live=live_true_cfg_scale,
    schedule=even_sigmas,
    # Of 60 blocks: 20 with two streams, then 40 with one.
    defaults=Guidance.preset("hunyuan-video"),
    source=PRESETS["hunyuan-video"].source,
)

# The image comes as further channels or as the first frame's tokens, which have a modulation of their own.
HUNYUAN_VIDEO_IMAGE = replace(
    HUNYUAN_VIDEO,
    pipeline="HunyuanVideoImageToVideoPipeline",
    clips=replace(HUNYUAN_VIDEO.clips, images=EACH),
    blocks=replace(HUNYUAN_VIDEO.blocks, rows=HUNYUAN_VIDEO.blocks.rows | {"token_replace_emb"}),
)

HUNYUAN_SKYREELS_IMAGE = replace(
    HUNYUAN_VIDEO, pipeline="HunyuanSkyreelsImageToVideoPipeline", clips=replace(HUNYUAN_VIDEO.clips, images=EACH)
)

# What was made before comes as tokens beside those of the part that is made; one clip in a call.
FRAMEPACK_ROWS = {"image_embeds", "latents_clean", "latents_history_2x", "latents_history_4x"}
HUNYUAN_VIDEO_FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    pipeline="HunyuanVideoFramepackPipeline",
    blocks=replace(HUNYUAN_VIDEO.blocks, rows=HUNYUAN_VIDEO.blocks.rows | FRAMEPACK_ROWS, grid=None),
    windowed=True,
)
