"""EasyAnimate: a stacked call with text tokens in the blocks, which have projections for text in some blocks only."""

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, first_two

SIZES = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


def builder(cls, in_channels=4):
    def build(other=False):
        torch.manual_seed(1)
        model = diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            patch_size=2,
            num_layers=6,
            mmdit_layers=3,
            time_embed_dim=8,
            text_embed_dim=16,
            resize_inpaint_mask_directly=False,
            add_noise_in_inpaint_model=False,
        )
        models.spread(model)
        vae = diffusers.AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4
        )
        flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = cls(vae.eval(), None, None, model.eval(), diffusers.DDIMScheduler() if other else flow)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def arguments(prompts, cfg=True):
    made = []
    for number in range(prompts):
        generator = torch.Generator().manual_seed(number)
        made.append([torch.randn(1, 8, 16, generator=generator) for _ in range(2)])
    prompt, negative = map(torch.cat, zip(*made, strict=True))
    return {
        **SIZES,
        "prompt_embeds": prompt,
        "prompt_attention_mask": torch.ones(prompts, 8),
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": torch.ones(prompts, 8),
        "guidance_scale": 5.0 if cfg else 1.0,
        "generator": models.generators(prompts),
    }


def pixels(prompts):
    return torch.rand(prompts, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))


def from_first_frame(prompts, cfg=True):
    mask = torch.full((prompts, 1, 9, 32, 32), 255.0)
    mask[:, :, 0] = 0.0
    return {**arguments(prompts, cfg), "video": pixels(prompts), "mask_video": mask}


# Later blocks have the text before the video.
FACTS = Facts(stacked=True, unchanged=first_two, oblong={"width": 48}, lies=lambda tokens: (tokens - 18, (3, 2, 3)))
FAMILIES = [
    Family("EasyAnimate", builder(diffusers.EasyAnimatePipeline), arguments, FACTS, cfg=5.0, layers=(1, 4)),
    Family(
        "EasyAnimate from a frame",
        builder(diffusers.EasyAnimateInpaintPipeline, in_channels=12),
        from_first_frame,
        FACTS,
        cfg=5.0,
        layers=(1, 4),
    ),
]
