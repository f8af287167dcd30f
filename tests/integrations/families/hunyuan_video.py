"""HunyuanVideo: two kinds of blocks with text tokens in them; one call for cond and, with true CFG, one for uncond."""

import inspect

import diffusers
import torch
import transformers

from tests import models
from tests.integrations.families import wan
from tests.integrations.family import Family
from tests.oracle import Facts, first_two, lying


def builder(cls, **changes):
    def build(other=False):
        layers = {"num_layers": 3, "num_single_layers": 3}
        pipe = models.pipeline("hunyuan", models.transformer("hunyuan", seed=1, **layers, **changes))
        if other:
            pipe.scheduler = diffusers.FlowMatchLCMScheduler()
        parts = pipe.components
        if cls is diffusers.HunyuanVideoImageToVideoPipeline:
            parts["image_processor"] = None
        built = cls(**parts)
        built.set_progress_bar_config(disable=True)
        return built

    return build


def arguments(prompts, cfg=True):
    sizes = models.sizes("hunyuan", num_inference_steps=2, true_cfg_scale=4.0 if cfg else 1.0)
    return {**sizes, **models.prompt("hunyuan", prompts), "generator": models.generators(prompts)}


def from_image(prompts, cfg=True):
    image = torch.rand(prompts, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {**arguments(prompts, cfg), "image": image}


def packed(other=False):
    """The sections of a clip are made one after another, each with the earlier ones as input."""
    cls = diffusers.HunyuanVideoFramepackTransformer3DModel
    known = inspect.signature(cls.__init__).parameters
    sizes = {name: value for name, value in models.config("hunyuan").items() if name in known}
    torch.manual_seed(1)
    image = {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    model = cls(**{**sizes, "num_layers": 3, "num_single_layers": 3, **image})
    models.spread(model)
    parts = {**models.pipeline("hunyuan").components, "transformer": model.eval()}
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**vision, image_size=16, patch_size=8)
    parts["image_encoder"] = transformers.SiglipVisionModel(config).eval()
    parts["feature_extractor"] = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    if other:
        parts["scheduler"] = diffusers.FlowMatchLCMScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoFramepackPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_first_frame(prompts, cfg=True):
    """One clip with two sections."""
    made = {**arguments(1, cfg), "image": wan.image(), "latent_window_size": 2, "num_frames": 9}
    return {**made, "generator": models.generators(1)[0]}


LYING = {"oblong": {"width": 48}, "lies": lying((3, 2, 3))}  # text, where there is any, comes after the video
FACTS = Facts(stacked=False, unchanged=first_two, **LYING)
FAMILIES = [
    Family("HunyuanVideo", builder(diffusers.HunyuanVideoPipeline), arguments, FACTS, cfg=4.0),
    Family(
        "HunyuanVideo from an image as channels",
        builder(
            diffusers.HunyuanVideoImageToVideoPipeline,
            image_condition_type="latent_concat",
            in_channels=9,
            guidance_embeds=False,
        ),
        from_image,
        FACTS,
        cfg=4.0,
    ),
    Family(
        "HunyuanVideo from an image as tokens",
        builder(diffusers.HunyuanVideoImageToVideoPipeline, image_condition_type="token_replace"),
        from_image,
        Facts(stacked=False, unchanged=first_two, sent=lambda pipe, prediction: prediction[:, :, 1:], **LYING),
        cfg=4.0,
    ),
    Family(
        "SkyReels V1 from an image",
        builder(diffusers.HunyuanSkyreelsImageToVideoPipeline, in_channels=8, guidance_embeds=False),
        from_image,
        FACTS,
        cfg=4.0,
    ),
    Family(
        "HunyuanVideo, frames packed",
        packed,
        from_first_frame,
        Facts(stacked=False, unchanged=first_two),
        cfg=4.0,
        result=lambda output: torch.cat(list(output.frames), dim=2),
        steps=(4, 4),
    ),
]
