"""LTX-Video: a stacked call. With images, each token has a timestep, and the scheduler does not step some tokens."""

from dataclasses import replace

import diffusers
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, lying
from tests.render import pipes


def builder(cls):
    def build(other=False):
        pipe = models.pipeline("ltx", models.transformer("ltx", seed=1))
        if other and cls is diffusers.LTXConditionPipeline:  # no other class has a timestep for each token
            pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        elif other:
            pipe.scheduler = diffusers.FlowMatchLCMScheduler()
        built = cls(**pipe.components)
        built.set_progress_bar_config(disable=True)
        return built

    return build


def arguments(prompts, cfg=True):
    sizes = models.sizes("ltx", num_inference_steps=2, guidance_scale=3.0 if cfg else 1.0)
    return {**sizes, **models.prompt("ltx", prompts), "generator": models.generators(prompts)}


def images(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def from_image(prompts, cfg=True):
    return {**arguments(prompts, cfg), "image": images(prompts)}


def from_conditions(prompts, cfg=True):
    """A fixed image at the start, and one at a later frame, as extra tokens with a lower strength."""
    conditions = [
        LTXVideoCondition(image=images(prompts), frame_index=0, strength=1.0),
        LTXVideoCondition(image=images(prompts, seed=1), frame_index=8, strength=0.8),
    ]
    return {**arguments(prompts, cfg), "conditions": conditions}


def long(other=False):
    pipe = models.pipeline("ltx", models.transformer("ltx", seed=1))
    if other:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    encoder = pipes.text_encoder(models.config("ltx")["caption_channels"], "t5")
    read = {"text_encoder": encoder, "tokenizer": pipes.tokenizer()}
    built = diffusers.LTXI2VLongMultiPromptPipeline(**{**pipe.components, **read})
    built.set_progress_bar_config(disable=True)
    return built


def of_windows(prompts, cfg=True):
    """One clip, in windows of two steps each."""
    windows = {"num_frames": 17, "temporal_tile_size": 16, "temporal_overlap": 8, "max_sequence_length": 16}
    sizes = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    given = {"prompt": "a red kite | the grey sea", "negative_prompt": "", "guidance_scale": 3.0 if cfg else 1.0}
    return {**windows, **sizes, **given, "generator": models.generators(1)[0]}


def without_first_frame(pipe, prediction):
    """The pipeline from an image passes all frames but the given one to its scheduler."""
    frames, height = (9 - 1) // pipe.vae_temporal_compression_ratio + 1, 32 // pipe.vae_spatial_compression_ratio
    return prediction.unflatten(1, (frames, height, -1)).permute(0, 4, 1, 2, 3)[:, :, 1:]


FACTS = Facts(stacked=True, oblong={"width": 64}, lies=lying((3, 8, 16)))
FAMILIES = [
    Family("LTX", builder(diffusers.LTXPipeline), arguments, FACTS, cfg=3.0),
    Family(
        "LTX from an image",
        builder(diffusers.LTXImageToVideoPipeline),
        from_image,
        replace(FACTS, sent=without_first_frame),
        cfg=3.0,
    ),
    Family(
        "LTX from conditions",
        builder(diffusers.LTXConditionPipeline),
        from_conditions,
        replace(FACTS, sent=lambda pipe, prediction: -prediction, lies=lying((4, 8, 16))),
        cfg=3.0,
    ),
    Family("LTX, long", long, of_windows, replace(FACTS, lies=None, oblong={}), cfg=3.0, steps=(4, 4)),
]
