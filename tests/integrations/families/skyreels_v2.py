"""SkyReels-V2: one call for cond, then one for uncond; with diffusion forcing, each frame has a timestep and a
scheduler.
"""

from dataclasses import replace

import diffusers

from tests import models
from tests.integrations.by_calls import ByCalls
from tests.integrations.families import wan
from tests.integrations.family import Family
from tests.oracle import Facts, lying

WITH_IMAGE = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24}


def builder(cls, **changes):
    def build(other=False):
        parts = models.pipeline("wan").components
        parts = {name: part for name, part in parts.items() if not name.startswith("transformer")}
        if other:  # one that takes rounded timesteps, which occur if each frame has its own
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
            parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(**flow)
        if "image_dim" in changes:
            parts |= {"image_encoder": wan.image_encoder(20), "image_processor": wan.image_processor()}
        model = wan.transformer(1, diffusers.SkyReelsV2Transformer3DModel, **changes)
        pipe = cls(**parts, transformer=model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def forced(**more):
    return wan.caller(**{"base_num_frames": 97, "prompt": None, **more})


def one_by_one(prompts, cfg=True):
    """A model with a frame rate as input takes one prompt at a time."""
    return forced(fps=16)(1, cfg)


def from_video(prompts, cfg=True):
    """One clip, in two parts."""
    made = {**forced()(1, cfg), "num_frames": 13, "base_num_frames": 9, "overlap_history": 5}
    return {**made, "video": wan.frames()[:5], "generator": models.generators(1)[0]}


SEQUENTIAL = Facts(stacked=False, oblong={"width": 48}, lies=lying((3, 2, 3)))
FORCED = diffusers.SkyReelsV2DiffusionForcingPipeline
FORCED_IMAGE = diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline

FAMILIES = [
    Family("SkyReels-V2", builder(diffusers.SkyReelsV2Pipeline), wan.caller(), SEQUENTIAL, cfg=4.0),
    Family(
        "SkyReels-V2 from an image",
        builder(diffusers.SkyReelsV2ImageToVideoPipeline, **WITH_IMAGE),
        wan.long_prompts(wan.caller(image=wan.image)),
        SEQUENTIAL,
        cfg=4.0,
    ),
    ByCalls("SkyReels-V2 forced", builder(FORCED), forced(), SEQUENTIAL, cfg=4.0),
    ByCalls(
        "SkyReels-V2 forced, frame after frame",
        builder(FORCED),
        forced(ar_step=1),
        SEQUENTIAL,
        cfg=4.0,
        steps=(4, 4),
    ),
    ByCalls(
        "SkyReels-V2 forced, told the frame rate",
        builder(FORCED, inject_sample_info=True),
        one_by_one,
        SEQUENTIAL,
        cfg=4.0,
    ),
    ByCalls(
        "SkyReels-V2 forced from an image",
        builder(FORCED_IMAGE),
        forced(image=wan.image),
        SEQUENTIAL,
        cfg=4.0,
    ),
    ByCalls(
        "SkyReels-V2 forced from a video",
        builder(diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline),
        from_video,
        replace(SEQUENTIAL, lies=None),
        cfg=4.0,
        steps=(4, 4),
    ),
    ByCalls(
        "SkyReels-V2 forced, part by part",
        builder(FORCED),
        forced(num_frames=13, base_num_frames=9, overlap_history=5),
        replace(SEQUENTIAL, lies=None),
        cfg=4.0,
        steps=(4, 4),
    ),
]
