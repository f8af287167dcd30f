"""Allegro: a stacked call on a list of blocks, with text in cross-attention."""

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, lying

SIZES = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


def build(other=False):
    torch.manual_seed(1)
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=5,
        cross_attention_dim=24,
        caption_channels=16,
        sample_height=4,
        sample_width=4,
        sample_frames=3,
    )
    models.spread(model, gain=1.2)
    scheduler = diffusers.DPMSolverMultistepScheduler() if other else diffusers.EulerAncestralDiscreteScheduler()
    pipe = diffusers.AllegroPipeline(None, None, None, model.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(prompts, cfg=True):
    made = []
    for number in range(prompts):
        generator = torch.Generator().manual_seed(number)
        one = {}
        for side in ("", "negative_"):
            one[f"{side}prompt_embeds"] = torch.randn(1, 8, 16, generator=generator)
            length = torch.randint(3, 9, (1, 1), generator=generator)
            one[f"{side}prompt_attention_mask"] = (torch.arange(8)[None] < length).long()
        made.append(one)
    given = {name: torch.cat([one[name] for one in made]) for name in made[0]}
    return {
        **SIZES,
        **given,
        "negative_prompt": None,
        "guidance_scale": 7.5 if cfg else 1.0,
        "generator": models.generators(prompts),
    }


FAMILIES = [
    Family("Allegro", build, arguments, Facts(stacked=True, oblong={"width": 48}, lies=lying((3, 2, 3))), cfg=7.5)
]
