"""SkyReels-V2: text to video and image to video, video to video, all frames at once or by diffusion forcing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import ONE, Clips
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments, steps_of_call
from stgfast.perturbation import Perturbation


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """The scale of a call, fixed when it begins."""
    return float(call["guidance_scale"]) if pipe.do_classifier_free_guidance else None


def forced_steps(call: CallArguments) -> int:
    """With `ar_step`, each block of frames starts this number of steps after the one before it; a first image is
    done.

    A longer clip is made part by part: these are the steps of the first.
    """
    long = call["overlap_history"] is not None and call["base_num_frames"] is not None
    pixels = min(call["num_frames"], call["base_num_frames"]) if long else call["num_frames"]
    frames: int = (pixels - 1) // 4 + 1 + (call.get("last_image") is not None)
    size: int = call["causal_block_size"] or 1
    blocks = frames // size - (call.get("image") is not None) // size
    return steps_of_call(call) + (blocks - 1) * int(call["ar_step"])


SKYREELS_V2 = Adapter(
    pipeline="SkyReelsV2Pipeline",
    protocol="sequential",
    blocks=Blocks(
        lists=("blocks",),
        rows=frozenset({"hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "temb"}),
        grid=Grid(patches),
    ),
    live=live,
    # 70% of the depth of the 14B model, which has 40 blocks.
    defaults=Guidance(Perturbation([28], scale=1.0)),
    clips=Clips(exact=("vae",)),
)
SKYREELS_V2_IMAGE = replace(
    SKYREELS_V2,
    pipeline="SkyReelsV2ImageToVideoPipeline",
    clips=replace(SKYREELS_V2.clips, images=ONE),
    # There is a 1.3B model of 30 blocks beside the 14B one of 40, and this is late in both.
    defaults=Guidance(Perturbation([24], scale=1.0)),
)
# A timestep for every frame. `fps` has an entry for every prompt as well, but the models that look at it take one
# prompt at a time, so that its one entry goes for all rows.
SKYREELS_V2_FORCED = replace(
    SKYREELS_V2_IMAGE,
    pipeline="SkyReelsV2DiffusionForcingPipeline",
    steps_asked=forced_steps,
    windowed=True,
    clips=replace(SKYREELS_V2_IMAGE.clips, images=""),
)
SKYREELS_V2_FORCED_IMAGE = replace(
    SKYREELS_V2_FORCED,
    pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline",
    clips=replace(SKYREELS_V2_FORCED.clips, images=ONE),
)
SKYREELS_V2_FORCED_VIDEO = replace(SKYREELS_V2_FORCED, pipeline="SkyReelsV2DiffusionForcingVideoToVideoPipeline")
