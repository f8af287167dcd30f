"""CogVideoX."""

from __future__ import annotations

import math
from typing import Any

from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.spec import Adapter, CallArguments, requested_scale


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """Whether there is CFG is settled when the call begins; `use_dynamic_cfg` sets each step's scale only after the
    denoiser was called, from the timestep, so it is computed here from the same formula."""
    asked = requested_scale(call)
    if asked is None or not call["use_dynamic_cfg"]:
        return asked and float(pipe.guidance_scale)
    steps = pipe.num_timesteps
    progress = (steps - float(pipe.current_timestep)) / steps
    return 1 + asked * (1 - math.cos(math.pi * progress**5.0)) / 2


COGVIDEOX = Adapter(
    pipeline="CogVideoXPipeline",
    protocol="stacked",
    blocks=("transformer_blocks",),
    state=("hidden_states", "encoder_hidden_states"),
    rows=frozenset({"hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs", "temb"}),
    float32=True,
    live=live,
    defaults=Guidance(Perturbation([11], scale=1.0)),
)
