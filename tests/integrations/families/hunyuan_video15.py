"""HunyuanVideo 1.5: a guider makes a call for cond and one for uncond."""

import copy
import functools
from dataclasses import replace

import diffusers
import PIL.Image
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, first_two, lying

TRANSFORMER = {
    **{"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 5},
    **{"num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8},
    **{"image_embed_dim": 12, "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v"},
}
VAE = {
    **{
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (16, 16, 16),
        "layers_per_block": 1,
    },
    **{"spatial_compression_ratio": 4, "temporal_compression_ratio": 4},
}


@functools.cache
def _vae(dtype):
    return diffusers.AutoencoderKLHunyuanVideo15(**VAE).eval()


def vae():
    """Sizes are read from it, and it takes long to build."""
    return copy.deepcopy(_vae(torch.get_default_dtype()))


def without_cfg(other=False):
    return build(other, diffusers.ClassifierFreeGuidance(guidance_scale=1.0))


def build(other=False, guider=None, cls=diffusers.HunyuanVideo15Pipeline, **changes):
    torch.manual_seed(0)
    model = diffusers.HunyuanVideo15Transformer3DModel(**TRANSFORMER)
    models.spread(model)
    pipe = cls(
        transformer=model.eval(),
        vae=vae(),
        scheduler=(diffusers.FlowMatchLCMScheduler if other else diffusers.FlowMatchEulerDiscreteScheduler)(shift=7.0),
        guider=guider or diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        **changes,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.vision_num_semantic_tokens = 3
    return pipe


def from_image(other=False):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=12, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    parts = {"image_encoder": SiglipVisionModel(vision).eval()}
    parts["feature_extractor"] = SiglipImageProcessor(size={"height": 32, "width": 32})
    return build(other, cls=diffusers.HunyuanVideo15ImageToVideoPipeline, **parts)


def arguments_of_image(prompts, cfg=True):
    """The image sets the size."""
    given = {name: value for name, value in arguments(prompts).items() if name not in ("height", "width")}
    return {**given, "image": image(16, 16)}


def image(height, width):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def prompts_of(prompts):
    made = {}
    for number, side in enumerate(("", "negative_")):
        for suffix, width, length in (("", 16, 6), ("_2", 8, 4)):
            seeds = [torch.Generator().manual_seed(10 * prompt + number) for prompt in range(prompts)]
            embeds = [torch.randn(1, length, width, generator=seed) for seed in seeds]
            masks = [(torch.arange(length) < length - 1 - prompt % 2)[None].long() for prompt in range(prompts)]
            made |= {f"{side}prompt_embeds{suffix}": torch.cat(embeds)}
            made |= {f"{side}prompt_embeds_mask{suffix}": torch.cat(masks)}
    return made


def arguments(prompts, cfg=True):
    sizes = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    return {**prompts_of(prompts), **sizes, "generator": models.generators(prompts)}


FACTS = Facts(stacked=False, unchanged=first_two, oblong={"width": 24}, lies=lying((2, 4, 6)))
FROM_IMAGE = replace(FACTS, oblong={"image": image(12, 20)}, lies=lying((2, 3, 5)))
FAMILIES = [
    Family("HunyuanVideo15", build, arguments, FACTS, cfg=4.0, cfg_asked=False),
    Family("HunyuanVideo15 without CFG", without_cfg, arguments, FACTS, cfg=None),
    Family("HunyuanVideo15 from an image", from_image, arguments_of_image, FROM_IMAGE, cfg=4.0, cfg_asked=False),
]
