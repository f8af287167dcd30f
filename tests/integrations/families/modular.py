"""Modular pipelines: blocks put together, under a guider. Without those that encode prompts and decode videos."""

from dataclasses import replace

import diffusers
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15Blocks
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks
from diffusers.modular_pipelines.wan.modular_pipeline import Wan22ModularPipeline

from tests import models
from tests.integrations.families import hunyuan_video15
from tests.integrations.family import Family
from tests.oracle import Facts, lying

SCHEDULERS = {False: diffusers.FlowMatchEulerDiscreteScheduler, True: diffusers.FlowMatchLCMScheduler}


def assembled(blocks, cls=None, **components):
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline() if cls is None else cls(blocks=blocks)
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guider(scale=4.0):
    return diffusers.ClassifierFreeGuidance(guidance_scale=scale)


def wan(other=False):
    stock = models.pipeline("wan", models.transformer("wan", seed=1))
    scheduler = SCHEDULERS[True]() if other else stock.scheduler
    return assembled(WanBlocks(), transformer=stock.transformer, vae=stock.vae, scheduler=scheduler, guider=guider())


def wan22(other=False):
    """Of two steps, one is made with each of the two models, and each has a guider of its own."""
    stock = models.pipeline("wan", models.transformer("wan", seed=1))
    pipe = assembled(
        Wan22Blocks(),
        cls=Wan22ModularPipeline,
        transformer=stock.transformer,
        transformer_2=models.transformer("wan", seed=2),
        vae=stock.vae,
        scheduler=SCHEDULERS[other](shift=3.0),
        guider=guider(),
        guider_2=guider(3.0),
    )
    pipe.update_components(boundary_ratio=0.875)
    return pipe


def ltx(other=False):
    stock = models.pipeline("ltx", models.transformer("ltx", seed=1))
    scheduler = SCHEDULERS[True]() if other else stock.scheduler
    return assembled(LTXBlocks(), transformer=stock.transformer, vae=stock.vae, scheduler=scheduler, guider=guider())


def hunyuan(other=False):
    stock = hunyuan_video15.build(other)
    parts = {"transformer": stock.transformer, "scheduler": stock.scheduler, "guider": guider()}
    pipe = assembled(HunyuanVideo15Blocks(), **parts)
    pipe.vae = stock.vae  # which none of its blocks asks for any more, but sizes are taken from it
    return pipe


def sized(family):
    return {name: models.sizes(family)[name] for name in ("height", "width", "num_frames")}


def of(family):
    def arguments(prompts, cfg=True):
        given = {"num_inference_steps": 2, "generator": models.generators(prompts), "output": "latents"}
        return {**models.prompt(family, prompts), **sized(family), **given}

    return arguments


def hunyuan_arguments(prompts, cfg=True):
    given = hunyuan_video15.arguments(prompts)
    given.pop("output_type")
    return {**given, "output": "latents"}


def latents(output):
    return output


WAN = Facts(stacked=False, oblong={"width": 48}, lies=lying((3, 2, 3)))
LTX = Facts(stacked=False, oblong={"height": 64, "width": 96}, lies=lying((2, 2, 3)))
FAMILIES = [
    Family("modular Wan", wan, of("wan"), WAN, 4.0, latents, cfg_asked=False),
    Family(
        "modular Wan 2.2",
        wan22,
        of("wan"),
        replace(WAN, denoisers=("transformer", "transformer_2")),
        lambda pipe, denoiser: 3.0 if denoiser.endswith("_2") else 4.0,
        latents,
        cfg_asked=False,
    ),
    Family("modular LTX", ltx, of("ltx"), LTX, 4.0, latents, cfg_asked=False),
    Family(
        "modular HunyuanVideo15",
        hunyuan,
        hunyuan_arguments,
        hunyuan_video15.FACTS,
        4.0,
        latents,
        cfg_asked=False,
    ),
]
