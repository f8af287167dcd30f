"""CogVideoX: from text, from an image, from a video, and under a control video (CogVideoX-Fun)."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import EACH, Clips
from stgfast.integrations.scales import requested_scale
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments, steps_of_call
from stgfast.presets import PRESETS


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """Whether there is CFG is fixed when the call begins. `use_dynamic_cfg` sets each step's scale from the timestep
    only after the denoiser was called, so it is computed here by the same formula.
    """
    asked = requested_scale(call)
    if asked is None or not call["use_dynamic_cfg"]:
        return asked and float(pipe.guidance_scale)
    # The formula counts the steps that the call asks for, and not those that a scheduler from `stgfast.restart` makes
    # again, unless they come as timesteps: then it is told how many there are.
    again = getattr(pipe.scheduler, "repeated", 0) if call.get("timesteps") is None else 0
    steps = pipe.num_timesteps - again
    progress = (steps - float(pipe.current_timestep)) / steps
    return 1 + asked * (1 - math.cos(math.pi * progress**5.0)) / 2


COGVIDEOX = Adapter(
    pipeline="CogVideoXPipeline",
    protocol="stacked",
    clips=Clips(fps=8.0),
    blocks=Blocks(
        lists=("transformer_blocks",),
        state=("hidden_states", "encoder_hidden_states"),
        rows=frozenset({"hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs", "temb"}),
        grid=Grid(functools.partial(patches, dims=(1, 3, 4)), last=True),
    ),
    float32=True,
    live=live,
    # Of 30 blocks (2B) or 42 (5B).
    defaults=Guidance.preset("cogvideox"),
    source=PRESETS["cogvideox"].source,
)

COGVIDEOX_IMAGE = replace(
    COGVIDEOX, pipeline="CogVideoXImageToVideoPipeline", clips=replace(COGVIDEOX.clips, images=EACH)
)

COGVIDEOX_VIDEO = replace(
    COGVIDEOX,
    pipeline="CogVideoXVideoToVideoPipeline",
    steps_asked=functools.partial(steps_of_call, strength="strength"),
)

COGVIDEOX_CONTROL = replace(COGVIDEOX, pipeline="CogVideoXFunControlPipeline")
