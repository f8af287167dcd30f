"""Kandinsky 5: one call for cond, then one for uncond, with texts of different lengths; the first blocks process text
only.
"""

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, Part


def transformer(**changes):
    torch.manual_seed(1)
    widths = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 20, "time_dim": 16}
    sizes = {"model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (4, 6, 6)}
    model = diffusers.Kandinsky5Transformer3DModel(**widths, **sizes, **changes)
    models.spread(model)
    for name, parameter in model.named_parameters():
        # Queries and keys are rounded to bfloat16 in the model itself, so a difference in the last bit of float32 may
        # become one of 1e-3: small queries keep what comes of it far below what the tests look for.
        if "query_norm" in name:
            torch.nn.init.constant_(parameter, 0.1)
    return model.eval()


def encoder(cls):
    torch.manual_seed(0)
    wide = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    if cls is diffusers.Kandinsky5T2IPipeline:
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return diffusers.AutoencoderKL(**wide, **kinds).eval()
    return diffusers.AutoencoderKLHunyuanVideo(**wide, mid_block_add_attention=False).eval()


def builder(cls, **changes):
    def build(other=False):
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        scheduler = (
            diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
            if other
            else diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
        )
        pipe = cls(**dict.fromkeys(names), transformer=transformer(**changes), vae=encoder(cls), scheduler=scheduler)
        pipe.resolutions = [(32, 32)]  # the only ones that the pipeline for images makes
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def caller(**more):
    def arguments(prompts, cfg=True):
        generators = [torch.Generator().manual_seed(number) for number in range(prompts)]
        made = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", **more}
        for side, tokens in (("", 7), ("negative_", 5)):
            embeds = [torch.randn(tokens + 1, 24, generator=generator) for generator in generators]
            made[f"{side}prompt_embeds_qwen"] = torch.stack([one[:tokens] for one in embeds])
            made[f"{side}prompt_embeds_clip"] = torch.stack([one[tokens][:20] for one in embeds])
            made[f"{side}prompt_cu_seqlens"] = torch.arange(prompts + 1, dtype=torch.int32) * tokens
        if "image" in more:
            made["image"] = torch.rand(prompts, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {**made, "guidance_scale": 4.0 if cfg else 1.0, "generator": models.generators(prompts)}

    return arguments


def visual_blocks(model):
    return [Part(block, i, {"": block.self_attention}) for i, block in enumerate(model.visual_transformer_blocks)]


FACTS = Facts(stacked=False, parts=visual_blocks)
WITHOUT_FIRST = Facts(stacked=False, parts=visual_blocks, sent=lambda pipe, prediction: prediction[:, 1:])
HEUN = (2, 3)  # which evaluates each step but the last twice

FAMILIES = [
    Family(
        "Kandinsky 5",
        builder(diffusers.Kandinsky5T2VPipeline),
        caller(num_frames=9),
        FACTS,
        cfg=4.0,
        steps=HEUN,
    ),
    Family(
        "Kandinsky 5 with room for a first frame",
        builder(diffusers.Kandinsky5T2VPipeline, visual_cond=True),
        caller(num_frames=9),
        FACTS,
        cfg=4.0,
        steps=HEUN,
    ),
    Family(
        "Kandinsky 5 from an image",
        builder(diffusers.Kandinsky5I2VPipeline, visual_cond=True),
        caller(num_frames=21, image=None),
        WITHOUT_FIRST,
        cfg=4.0,
        steps=HEUN,
    ),
    Family(
        "Kandinsky 5 for images",
        builder(diffusers.Kandinsky5T2IPipeline),
        caller(),
        FACTS,
        cfg=4.0,
        steps=HEUN,
        result=lambda output: output.image,
    ),
]
