"""Stable Video Diffusion: from an image, a UNet whose transformers attend over space and then over time."""

from __future__ import annotations

import functools
from typing import Any

from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.clips import EACH, Clips
from stgfast.integrations.scales import live_over_frames, requested_over_frames
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments
from stgfast.integrations.unet import GRID, units
from stgfast.presets import PRESETS


def steps_asked(call: CallArguments) -> int:
    """The number of steps; the scheduler uses the last of given sigmas as its end."""
    return int(call["num_inference_steps"]) if call["sigmas"] is None else len(call["sigmas"]) - 1


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    if guidance.projects_cfg and guidance.cfg is None:
        return f"project={guidance.project!r}: got a scale for every frame, expected one: Guidance(..., cfg=3.0)"
    return None


STABLE_VIDEO_DIFFUSION = Adapter(
    pipeline="StableVideoDiffusionPipeline",
    protocol="stacked",
    blocks=Blocks(
        units=functools.partial(
            units, lists={"spatial": "transformer_blocks", "temporal": "temporal_transformer_blocks"}
        ),
        rows=frozenset(
            {"sample", "encoder_hidden_states", "added_time_ids", "hidden_states", "temb", "image_only_indicator"}
        ),
        full=True,  # every block's output is kept for the way up
        grid=GRID,
    ),
    requested=requested_over_frames,
    cfg_on="max_guidance_scale above 1",
    live=live_over_frames,
    steps_asked=steps_asked,
    unfit=unfit,
    denoisers=("unet",),
    sample="sample",
    clips=Clips(images=EACH),
    defaults=Guidance.preset("svd"),
    source=PRESETS["svd"].source,
)
