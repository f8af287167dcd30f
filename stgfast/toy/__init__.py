"""A pipeline that needs no download: Mochi in its real depth, 48 blocks, but narrow, with random weights from a seed.

What it renders is noise. What it computes, block by block and row by row, is what the real model computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEADS, WIDTH, TEXT = 4, 32, 32  # heads, channels of a head, text tokens
CALL = {"height": 64, "width": 64, "num_frames": 13, "num_inference_steps": 6, "guidance_scale": 4.5}


def pipeline(seed: int = 0) -> Any:
    """A `diffusers.MochiPipeline` without a text encoder: it takes prompts as embeddings."""
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        pooled_projection_dim=HEADS * WIDTH // 2,
        text_embed_dim=TEXT,
        time_embed_dim=TEXT,
        max_sequence_length=TEXT,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = MochiPipeline(scheduler, vae.eval(), text_encoder=None, tokenizer=None, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(seed: int = 0) -> dict[str, Tensor]:
    """What a text encoder would give for a prompt and for a negative one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for side, length in (("", TEXT // 2), ("negative_", TEXT // 8)):
        made[f"{side}prompt_embeds"] = torch.randn(1, TEXT, TEXT, generator=generator)
        made[f"{side}prompt_attention_mask"] = torch.arange(TEXT)[None] < length
    return made
