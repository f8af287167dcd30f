"""Stable Video Diffusion: from an image, a UNet whose transformers attend over space and then over time."""

from __future__ import annotations

import functools
from typing import Any

from stgfast.guidance import ATTENTION, AXES, Guidance, Perturbation, Scale
from stgfast.integrations.spec import Adapter, CallArguments
from stgfast.integrations.unet import units


def requested(call: CallArguments) -> float | None:
    """The scale of the last frame, by which the pipeline decides whether there is CFG."""
    return float(call["max_guidance_scale"]) if call["max_guidance_scale"] > 1 else None


def live(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """A scale for every frame, as a tensor that goes with a prediction; there is none before the first step."""
    return pipe.guidance_scale if pipe.do_classifier_free_guidance else None


def steps_asked(call: CallArguments) -> int:
    """The scheduler takes the last of the sigmas for the one at which it ends."""
    return int(call["num_inference_steps"]) if call["sigmas"] is None else len(call["sigmas"]) - 1


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    needs = guidance.cfg is not None or any(part.needs_cfg for part in guidance.perturbations)
    if needs and requested(call) is None:
        return "this guidance needs CFG, got a call without it, expected max_guidance_scale above 1"
    return None


STABLE_VIDEO_DIFFUSION = Adapter(
    pipeline="StableVideoDiffusionPipeline",
    protocol="stacked",
    units=functools.partial(units, lists={"spatial": "transformer_blocks", "temporal": "temporal_transformer_blocks"}),
    rows=frozenset(
        {"sample", "encoder_hidden_states", "added_time_ids", "hidden_states", "temb", "image_only_indicator"}
    ),
    full=True,  # every block's output is kept for the way up
    requested=requested,
    live=live,
    steps_asked=steps_asked,
    unfit=unfit,
    denoisers=("unet",),
    sample="sample",
    defaults=Guidance([Perturbation([8], kind=ATTENTION, scale=2.0, axis=axis) for axis in AXES]),
)
