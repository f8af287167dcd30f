"""Motif Video: with a guider; decoder blocks get the output of an earlier block."""

import diffusers
import torch

from tests import models
from tests.integrations.families import wan
from tests.integrations.family import Family
from tests.oracle import Facts, first_two


def builder(cls, **changes):
    def build(other=False):
        return made(cls, other, **changes)

    return build


def made(cls, other, **changes):
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "patch_size": 2, "rope_axes_dim": (4, 4, 4)}
    depths = {"num_layers": 2, "num_single_layers": 4, "num_decoder_layers": 2, "text_embed_dim": 16}
    text = {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=33, out_channels=16, **sizes, **depths, **text, **changes
    )
    models.spread(model)
    pipe = cls(
        scheduler=diffusers.FlowMatchLCMScheduler() if other else diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=models.pipeline("wan").vae,
        text_encoder=None,
        tokenizer=None,
        transformer=model.eval(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        feature_extractor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(prompts, cfg=True):
    made = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    for number, side in enumerate(("", "negative_")):
        one = [torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(10 * number + n)) for n in range(prompts)]
        mask = torch.ones(prompts, 8).long()
        made |= {f"{side}prompt_embeds": torch.cat(one), f"{side}prompt_attention_mask": mask}
    return {**made, "generator": models.generators(prompts)}


def from_image(prompts, cfg=True):
    return {**arguments(1, cfg), "prompt": None, "image": wan.image()}


FACTS = Facts(stacked=False, unchanged=first_two)
FAMILIES = [
    Family("Motif Video", builder(diffusers.MotifVideoPipeline), arguments, FACTS, cfg=4.0, cfg_asked=False),
    Family(
        "Motif Video from an image",
        builder(diffusers.MotifVideoImage2VideoPipeline),
        from_image,
        FACTS,
        cfg=4.0,
        cfg_asked=False,
    ),
]
