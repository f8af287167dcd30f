"""Sana-Video: a stacked call; its attention is linear."""

from dataclasses import replace

import diffusers
import torch

from tests import models
from tests.integrations.families import wan
from tests.integrations.family import Family
from tests.oracle import Facts, Part


def builder(cls):
    def build(other=False):
        torch.manual_seed(1)
        heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_cross_attention_heads": 2}
        cross = {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8}
        sizes = {"in_channels": 16, "out_channels": 16, "num_layers": 4, "sample_size": None}
        model = diffusers.SanaVideoTransformer3DModel(**sizes, **heads, **cross)
        models.spread(model)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
        multistep = diffusers.DPMSolverMultistepScheduler(**flow)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0) if other else multistep
        pipe = cls(None, None, models.pipeline("wan").vae, model.eval(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def arguments(prompts, cfg=True):
    made = {"negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}
    made |= {"height": 32, "width": 32, "frames": 9, "num_inference_steps": 2, "guidance_scale": 4.0 if cfg else 1.0}
    for number, side in enumerate(("", "negative_")):
        one = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(10 * number + n)) for n in range(prompts)]
        made |= {f"{side}prompt_embeds": torch.cat(one), f"{side}prompt_attention_mask": torch.ones(prompts, 8)}
    return {**made, "generator": models.generators(prompts)}


def from_image(prompts, cfg=True):
    return {**arguments(prompts, cfg), "image": wan.image()}


def parts(model):
    return [Part(block, number, {"": block.attn1}) for number, block in enumerate(model.transformer_blocks)]


def without_first_frame(pipe, prediction):
    return prediction[:, :, 1:]


FACTS = Facts(stacked=True, parts=parts)
FAMILIES = [
    Family("Sana-Video", builder(diffusers.SanaVideoPipeline), arguments, FACTS, cfg=4.0, kinds=("residual",)),
    Family(
        "Sana-Video from an image",
        builder(diffusers.SanaImageToVideoPipeline),
        from_image,
        replace(FACTS, sent=without_first_frame),
        cfg=4.0,
        kinds=("residual",),
    ),
]
