"""Wan and models based on it: one call for cond, then one for uncond, with one transformer or two; a timestep for each
token; control hints; faces; clips made part by part.
"""

import inspect
from dataclasses import replace

import diffusers
import PIL.Image
import torch
import transformers

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, Part, lying, parts_of

TWO = ("transformer", "transformer_2")
TEXT_TOKENS = 512  # the model requires this number if tokens of an image encoder are added


def transformer(seed, cls=diffusers.WanTransformer3DModel, **changes):
    torch.manual_seed(seed)
    known = inspect.signature(cls.__init__).parameters
    config = {name: value for name, value in models.config("wan").items() if name in known}
    model = cls(**{**config, "num_layers": 4, **changes})
    models.spread(model)
    return model.eval()


def image_encoder(width):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPVisionConfig(hidden_size=width, intermediate_size=width, **sizes)
    return transformers.CLIPVisionModel(config).eval()


def image_processor():
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def builder(cls=diffusers.WanPipeline, model=diffusers.WanTransformer3DModel, two=False, settings=None, **changes):
    def build(other=False):
        parts = models.pipeline("wan").components
        parts = {name: part for name, part in parts.items() if name not in TWO}
        if other:
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if "image_dim" in changes:
            parts |= {"image_encoder": image_encoder(changes["image_dim"]), "image_processor": image_processor()}
        if two:
            parts["transformer_2"] = transformer(2, model, **changes)
        pipe = cls(**parts, **(settings or {}), transformer=transformer(1, model, **changes))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def caller(**more):
    """Arguments of a call. Random arguments in `more` are made with a seed."""

    def arguments(prompts, cfg=True):
        sizes = models.sizes("wan", num_inference_steps=2, guidance_scale=4.0 if cfg else 1.0)
        made = {name: value() if callable(value) else value for name, value in more.items()}
        if "strength" in more:
            del sizes["num_frames"]  # the number of the video's frames is fixed
        return {**sizes, **models.prompt("wan", prompts), "generator": models.generators(prompts), **made}

    return arguments


def image(seed=0):
    pixels = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(seed))
    return PIL.Image.fromarray((pixels * 255).byte().numpy())


def video():
    return torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def long_prompts(arguments):
    """The same, with the number of text tokens of a model with image embeddings."""

    def longer(prompts, cfg=True):
        made = arguments(prompts, cfg)
        embeds = {name: value for name, value in made.items() if name.endswith("prompt_embeds")}
        return {**made, **{name: value.repeat(1, TEXT_TOKENS // 16, 1) for name, value in embeds.items()}}

    return longer


def two_scales(pipe, denoiser):
    return 2.5 if denoiser == "transformer_2" else 4.0


def control(prompts, cfg=True):
    """The pipeline takes one clip at a time and one generator."""
    made = caller(video=video, mask=video().round(), conditioning_scale=[1.0, 0.7])(1, cfg)
    return {**made, "generator": models.generators(1)[0]}


def hints_and_blocks(model):
    return [*(Part(block, None, {}) for block in model.vace_blocks), *parts_of(model)]


def animated(other=False):
    faces = {"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16, "motion_dim": 4}
    faces |= {"motion_style_dim": 8, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16}
    faces |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "latent_channels": 16}
    return builder(diffusers.WanAnimatePipeline, diffusers.WanAnimateTransformer3DModel, **WITH_IMAGE, **faces)(other)


def with_faces(prompts, cfg=True):
    """Two segments of one clip."""
    made = long_prompts(caller(image=image))(1, cfg)
    del made["num_frames"]
    frames = [image(seed) for seed in range(7)]
    segments = {"segment_frame_length": 5, "prev_segment_conditioning_frames": 1}
    return {**made, **segments, "pose_video": frames, "face_video": frames, "generator": models.generators(1)[0]}


def frames():
    return [image(seed) for seed in range(9)]


def edited(prompts, cfg=True):
    """The pipeline takes one clip at a time."""
    return {**caller(video=frames)(1, cfg), "generator": models.generators(1)[0]}


def flow_map(other=False):
    pipe = builder(diffusers.AnyFlowPipeline, diffusers.AnyFlowTransformer3DModel)(False)
    pipe.scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0 if other else 1.0)
    return pipe


def without_cfg_without_negative(prompts, cfg=True):
    """Negative prompts are stacked on the others even without CFG."""
    made = caller()(prompts, cfg)
    return {name: value for name, value in made.items() if cfg or not name.startswith("negative")}


def in_chunks(other=False):
    pipe = builder(diffusers.HeliosPipeline, diffusers.HeliosTransformer3DModel, rope_dim=(4, 4, 4))(False)
    whole = {"stages": 1, "stage_range": [0, 1]}
    pipe.scheduler = diffusers.HeliosScheduler(**whole, scheduler_type="euler" if other else "unipc")
    return pipe


def of_chunks(prompts, cfg=True):
    """Two chunks of one clip."""
    return {**caller(num_frames=17, num_latent_frames_per_chunk=3)(1, cfg), "generator": models.generators(1)[0]}


SEQUENTIAL = Facts(stacked=False, oblong={"width": 48}, lies=lying((3, 2, 3)))
BOTH = replace(SEQUENTIAL, denoisers=TWO)
BOUNDARY = {"boundary_ratio": 0.9}  # between the first step and the second
EVERY_TOKEN = {"expand_timesteps": True}
CONDITIONED = {"in_channels": 36}  # the latents, their condition, and a mask
WITH_IMAGE = {**CONDITIONED, "image_dim": 20, "added_kv_proj_dim": 24}
FROM_IMAGE = diffusers.WanImageToVideoPipeline
HINTS = {"vace_layers": [0, 2], "vace_in_channels": 96}

FAMILIES = [
    Family("Wan", builder(), caller(), SEQUENTIAL, cfg=4.0),
    Family(
        "Wan of two transformers",
        builder(two=True, settings=BOUNDARY),
        caller(guidance_scale_2=2.5),
        BOTH,
        cfg=two_scales,
    ),
    Family("Wan, a time for every token", builder(settings=EVERY_TOKEN), caller(), SEQUENTIAL, cfg=4.0),
    Family(
        "Wan from an image",
        builder(FROM_IMAGE, **WITH_IMAGE),
        long_prompts(caller(image=image)),
        SEQUENTIAL,
        cfg=4.0,
    ),
    Family(
        "Wan from an image, of two transformers",
        builder(FROM_IMAGE, two=True, settings=BOUNDARY, **CONDITIONED),
        caller(image=image, guidance_scale_2=2.5),
        BOTH,
        cfg=two_scales,
    ),
    Family(
        "Wan from an image, a time for every token",
        builder(FROM_IMAGE, settings=EVERY_TOKEN),
        caller(image=image),
        SEQUENTIAL,
        cfg=4.0,
    ),
    Family(
        "Wan from a video",
        builder(diffusers.WanVideoToVideoPipeline),
        caller(video=video, num_inference_steps=4, strength=0.5),
        SEQUENTIAL,
        cfg=4.0,
    ),
    Family(
        "Wan VACE",
        builder(diffusers.WanVACEPipeline, diffusers.WanVACETransformer3DModel, **HINTS),
        control,
        replace(SEQUENTIAL, parts=hints_and_blocks),
        cfg=4.0,
    ),
    Family(
        "Wan VACE of two transformers",
        builder(diffusers.WanVACEPipeline, diffusers.WanVACETransformer3DModel, two=True, settings=BOUNDARY, **HINTS),
        lambda prompts, cfg=True: {**control(prompts, cfg), "guidance_scale_2": 2.5},
        replace(BOTH, parts=hints_and_blocks),
        cfg=two_scales,
    ),
    Family("Wan Animate", animated, with_faces, replace(SEQUENTIAL, lies=None), cfg=4.0, steps=(4, 4)),
    Family(
        "Lucy Edit",
        builder(diffusers.LucyEditPipeline, in_channels=32),
        edited,
        SEQUENTIAL,
        cfg=4.0,
    ),
    Family(
        "ChronoEdit",
        builder(diffusers.ChronoEditPipeline, diffusers.ChronoEditTransformer3DModel, **WITH_IMAGE),
        long_prompts(caller(image=image, num_frames=5)),
        replace(SEQUENTIAL, lies=lying((2, 2, 3))),
        cfg=4.0,
    ),
    Family("AnyFlow", flow_map, without_cfg_without_negative, replace(SEQUENTIAL, stacked=True), cfg=4.0),
    Family("Helios", in_chunks, of_chunks, replace(SEQUENTIAL, lies=None), cfg=4.0, steps=(4, 4)),
]
