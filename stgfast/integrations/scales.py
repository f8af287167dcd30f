"""The CFG scale of a pipeline: what a call asks for, and what the pipeline is about to combine with."""

from __future__ import annotations

from typing import Any

from stgfast.guidance import Scale
from stgfast.integrations.steps import CallArguments


def requested_scale(call: CallArguments) -> float | None:
    """The CFG scale that a call asks for, None where it asks for none."""
    return float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The CFG scale that the pipeline will combine this step with; a callback may have changed it."""
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def true_cfg_scale(call: CallArguments) -> float | None:
    """`guidance_scale` is an input of a distilled model; CFG proper is `true_cfg_scale`, with a negative prompt."""
    negative = call["negative_prompt"] is not None or (
        call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    )
    return float(call["true_cfg_scale"]) if call["true_cfg_scale"] > 1 and negative else None


def live_true_cfg_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    return true_cfg_scale(call)


def rescale_of_call(call: CallArguments) -> float | None:
    return call.get("guidance_rescale") or None
