"""Modular pipelines: blocks with a guider, without those that encode prompts and decode videos."""

from dataclasses import replace

import diffusers
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15Blocks
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22_i2v import Wan22Image2VideoBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan_i2v import WanImage2VideoAutoBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan_vace import Wan22VaceBlocks
from diffusers.modular_pipelines.wan.modular_pipeline import Wan22ModularPipeline

from tests import models
from tests.integrations.families import hunyuan_video15
from tests.integrations.families import wan as wans
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
    """Each of the two models makes one of two steps, with a guider of its own."""
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


def wan_from_an_image(other=False):
    stock = wans.builder(wans.FROM_IMAGE, **wans.WITH_IMAGE)(other)
    names = ("transformer", "vae", "scheduler", "image_encoder", "image_processor")
    parts = {name: getattr(stock, name) for name in names}
    return assembled(WanImage2VideoAutoBlocks(), cls=diffusers.WanImage2VideoModularPipeline, **parts, guider=guider())


def of_two_models(blocks, cls, stock):
    """Each of the two models makes one of two steps, with a guider of its own."""

    def build(other=False):
        made = stock(other)
        parts = {name: getattr(made, name) for name in ("transformer", "transformer_2", "vae")}
        guiders = {"guider": guider(), "guider_2": guider(3.0)}
        pipe = assembled(blocks(), cls=cls, **parts, **guiders, scheduler=SCHEDULERS[other](shift=3.0))
        pipe.update_components(boundary_ratio=0.875)
        return pipe

    return build


def ltx(other=False):
    stock = models.pipeline("ltx", models.transformer("ltx", seed=1))
    scheduler = SCHEDULERS[True]() if other else stock.scheduler
    return assembled(LTXBlocks(), transformer=stock.transformer, vae=stock.vae, scheduler=scheduler, guider=guider())


def hunyuan(other=False):
    stock = hunyuan_video15.build(other)
    parts = {"transformer": stock.transformer, "scheduler": stock.scheduler, "guider": guider()}
    pipe = assembled(HunyuanVideo15Blocks(), **parts)
    pipe.vae = stock.vae  # no block calls it any more, but sizes are read from it
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


def one(arguments, **more):
    """These pipelines take one prompt at a time."""

    def given(prompts, cfg=True):
        made = arguments(1)
        made = {name: made[name] for name in made if name not in ("output_type", "guidance_scale")}
        seeded = models.generators(1)[0]
        return {**made, **sized("wan"), "num_inference_steps": 2, "generator": seeded, "output": "latents", **more}

    return given


def latents(output):
    return output


WAN, BOTH = wans.SEQUENTIAL, wans.BOTH
# Frames have the width of the image.
AS_THE_IMAGE = {"oblong": {}, "lies": None}
LTX = Facts(stacked=False, oblong={"height": 64, "width": 96}, lies=lying((2, 2, 3)))


def two_scales(pipe, denoiser):
    return 3.0 if denoiser.endswith("_2") else 4.0


FAMILIES = [
    Family("modular Wan", wan, of("wan"), WAN, 4.0, latents, cfg_asked=False),
    Family(
        "modular Wan 2.2",
        wan22,
        of("wan"),
        BOTH,
        two_scales,
        latents,
        cfg_asked=False,
    ),
    Family(
        "modular Wan from an image",
        wan_from_an_image,
        one(wans.long_prompts(wans.caller(image=wans.image))),
        replace(WAN, **AS_THE_IMAGE),
        4.0,
        latents,
        cfg_asked=False,
    ),
    Family(
        "modular Wan 2.2 from an image",
        of_two_models(
            Wan22Image2VideoBlocks,
            diffusers.Wan22Image2VideoModularPipeline,
            wans.builder(wans.FROM_IMAGE, two=True, settings=wans.BOUNDARY, **wans.CONDITIONED),
        ),
        one(wans.caller(image=wans.image)),
        replace(BOTH, **AS_THE_IMAGE),
        two_scales,
        latents,
        cfg_asked=False,
    ),
    Family(
        "modular Wan 2.2 VACE",
        of_two_models(
            Wan22VaceBlocks,
            diffusers.Wan22VaceModularPipeline,
            wans.builder(
                diffusers.WanVACEPipeline,
                diffusers.WanVACETransformer3DModel,
                two=True,
                settings=wans.BOUNDARY,
                **wans.HINTS,
            ),
        ),
        one(wans.caller(video=wans.frames)),
        replace(BOTH, parts=wans.hints_and_blocks),
        two_scales,
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
