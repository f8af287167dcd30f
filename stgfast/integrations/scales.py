"""The CFG scale of a pipeline: what a call asks for, and with what the pipeline is about to combine."""

from __future__ import annotations

from typing import Any

from stgfast.guidance import Scale
from stgfast.integrations.steps import CallArguments


def requested_scale(call: CallArguments) -> float | None:
    """The CFG scale that a call asks for, or None."""
    return float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The CFG scale that the pipeline will combine this step with; a callback may have changed it."""
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def live_requested(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The scale of a pipeline that combines with what it was called with, even if a callback changes
    `guidance_scale`.
    """
    return requested_scale(call)


def live_scale_of_call(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The scale of a call, fixed when the call begins, if there is CFG at all."""
    return float(call["guidance_scale"]) if pipe.guidance_scale > 1 else None


def live_scale_of_second(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The same, for a second denoiser for low noise that may have a scale of its own."""
    if not pipe.do_classifier_free_guidance:
        return None
    second = call.get("guidance_scale_2") if denoiser.endswith("_2") else None
    return float(call["guidance_scale"] if second is None else second)


def requested_excess(call: CallArguments) -> float | None:
    """The scale of a pipeline that combines as `c + s (c - u)`: in the form used here it is `1 + s`."""
    return 1 + float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_excess(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    return 1 + float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def requested_over_frames(call: CallArguments) -> float | None:
    """The scale of the last frame, by which a pipeline with a scale for each frame decides whether there is CFG."""
    return float(call["max_guidance_scale"]) if call["max_guidance_scale"] > 1 else None


def live_over_frames(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """A scale for each frame, as a tensor that fits a prediction.

    The pipeline is not asked whether there is CFG, because it would read the tensor and wait for the device.
    """
    return pipe.guidance_scale if requested_over_frames(call) is not None else None


def no_scale(call: CallArguments) -> float | None:
    """None: the pipeline has no CFG."""
    return None


def no_live_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    return None


def true_cfg_scale(call: CallArguments) -> float | None:
    """The scale of true CFG, `true_cfg_scale` with a negative prompt. `guidance_scale` is an input of a distilled
    model.
    """
    negative = call["negative_prompt"] is not None or (
        call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    )
    return float(call["true_cfg_scale"]) if call["true_cfg_scale"] > 1 and negative else None


def live_true_cfg_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    return true_cfg_scale(call)


def rescale_of_call(call: CallArguments) -> float | None:
    return call.get("guidance_rescale") or None
