"""CogVideoX: a stacked call with text tokens in the blocks. Conditions are extra channels, or the first frames."""

from dataclasses import replace

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, first_two, lying


def builder(cls, other_scheduler=diffusers.CogVideoXDPMScheduler, **changes):
    def build(other=False):
        pipe = models.pipeline("cogvideox", models.transformer("cogvideox", seed=1, **changes))
        if other:
            pipe.scheduler = other_scheduler()
        built = cls(**pipe.components)
        built.set_progress_bar_config(disable=True)
        return built

    return build


def arguments(prompts, cfg=True):
    sizes = models.sizes("cogvideox", num_inference_steps=2, guidance_scale=6.0 if cfg else 1.0)
    return {**sizes, **models.prompt("cogvideox", prompts), "generator": models.generators(prompts)}


def pixels(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def from_image(prompts, cfg=True):
    return {**arguments(prompts, cfg), "image": pixels(prompts, 3, 32, 32)}


def from_image_with_dynamic_cfg(prompts, cfg=True):
    """In the only size for which the model has positions."""
    size = {"width": 48, "image": pixels(prompts, 3, 32, 48)}
    return {**arguments(prompts, cfg), **size, "use_dynamic_cfg": True}


def from_video(prompts, cfg=True):
    """The last two of three steps."""
    given = {**arguments(prompts, cfg), "video": pixels(prompts, 9, 3, 32, 32)}
    del given["num_frames"]
    return {**given, "num_inference_steps": 3, "strength": 0.7}


def under_control(prompts, cfg=True):
    given = {**arguments(prompts, cfg), "control_video": pixels(prompts, 9, 3, 32, 32)}
    del given["num_frames"]
    return given


def live(pipe, denoiser):
    return pipe.guidance_scale


FACTS = Facts(stacked=True, unchanged=first_two, oblong={"width": 48}, lies=lying((3, 2, 3), after=16))
TWO_FRAMES_A_TOKEN = replace(
    FACTS, oblong={"width": 48, "image": pixels(1, 3, 32, 48)}, lies=lying((2, 2, 3), after=16)
)
FAMILIES = [
    Family("CogVideoX", builder(diffusers.CogVideoXPipeline), arguments, FACTS, cfg=6.0),
    Family(
        "CogVideoX from an image",
        builder(
            diffusers.CogVideoXImageToVideoPipeline,
            in_channels=8,
            use_learned_positional_embeddings=True,
            sample_width=6,
        ),
        from_image_with_dynamic_cfg,
        FACTS,
        cfg=live,
    ),
    Family(
        "CogVideoX 1.5 from an image",
        builder(
            diffusers.CogVideoXImageToVideoPipeline, in_channels=8, patch_size_t=2, ofs_embed_dim=2, sample_width=6
        ),
        from_image,
        TWO_FRAMES_A_TOKEN,
        cfg=6.0,
    ),
    Family("CogVideoX from a video", builder(diffusers.CogVideoXVideoToVideoPipeline), from_video, FACTS, cfg=6.0),
    Family(
        "CogVideoX-Fun",
        builder(diffusers.CogVideoXFunControlPipeline, diffusers.EulerDiscreteScheduler, in_channels=8),
        under_control,
        FACTS,
        cfg=6.0,
    ),
]
