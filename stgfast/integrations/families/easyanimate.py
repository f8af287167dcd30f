"""EasyAnimate: from text, and from parts of a video."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.batching.values import identity_of_scores
from stgfast.guidance import Guidance
from stgfast.integrations.clips import Clips
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments, schedule_of_call, steps_of_call
from stgfast.perturbation import Perturbation


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    """A callback may switch CFG off. The scale is that of the call."""
    return float(call["guidance_scale"]) if pipe.do_classifier_free_guidance else None


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    """The arguments depend on the scheduler's class."""
    shift = {"mu": 1} if hasattr(pipe.scheduler, "time_shift") else {}
    return {**schedule_of_call(pipe, call), **shift}


EASYANIMATE = Adapter(
    pipeline="EasyAnimatePipeline",
    protocol="stacked",
    clips=Clips(fps=8.0, negative=True),
    blocks=Blocks(
        lists=("transformer_blocks",),
        state=("hidden_states", "encoder_hidden_states"),
        rows=frozenset(
            {
                "hidden_states",
                "timestep",
                "timestep_cond",
                "encoder_hidden_states",
                "encoder_hidden_states_t5",
                "inpaint_latents",
                "control_latents",
                "temb",
            }
        ),
        identity=identity_of_scores,
        grid=Grid(patches, last=True),
    ),
    live=live,
    schedule=schedule,
    own_solver="it checks the class of its scheduler",
    # About 70% of its 48 blocks.
    defaults=Guidance(Perturbation([33], scale=1.0)),
)

EASYANIMATE_INPAINT = replace(
    EASYANIMATE,
    pipeline="EasyAnimateInpaintPipeline",
    steps_asked=functools.partial(steps_of_call, strength="strength"),
)
