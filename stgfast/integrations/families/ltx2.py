"""LTX-2: video and audio. Its pipelines ask for perturbed branches themselves and combine in x0 space.

Its modular pipelines have a guider for video and one for audio, and make each pass that one of them asks for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from stgfast.batching.layout import Blocks, Unit
from stgfast.batching.values import identity_of_scores
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.integrations.guiders import name_of, schedule_of_modular_call, steps_of_modular_call
from stgfast.integrations.spec import Adapter, Announced, Passes, nothing_else
from stgfast.integrations.steps import CallArguments, even_sigmas, latent_tokens, shifted
from stgfast.kinds import ATTENTION, ISOLATE, RESIDUAL
from stgfast.perturbation import Perturbation
from stgfast.schedules import Moment, value

PERTURBED, ISOLATED = "perturbed", "isolated"


def units(denoiser: nn.Module) -> Sequence[Unit]:
    blocks = enumerate(denoiser.get_submodule("transformer_blocks").children())
    names = ("attn1", "audio_attn1")
    return [Unit(block, i, tuple(("", block.get_submodule(name)) for name in names)) for i, block in blocks]


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    depth = len(pipe.transformer.transformer_blocks)
    blocks = call["spatio_temporal_guidance_blocks"] or []
    stg = call["stg_scale"] > 0 or (call.get("audio_stg_scale") or 0) > 0
    if guidance.exact.inert and stg and any(not 0 <= block < depth for block in blocks):
        return f"spatio_temporal_guidance_blocks: got {list(blocks)}, expected numbers from 0 to {depth - 1}"
    if guidance.cfg is not None or guidance.rescale != 0.0:
        return "cfg and rescale of a Guidance: use the pipeline's own guidance_scale, guidance_rescale and audio_..."
    if guidance.project:
        return "project of a Guidance: the pipeline combines its passes itself"
    kinds = [part.kind == ISOLATE for part in guidance.perturbations]
    if kinds.count(True) > 1 or kinds.count(False) > 1:
        return "several perturbations: expected one at most, and one that isolates video from audio"
    if any(part.of != COND or part.base != COND for part in guidance.perturbations):
        return "a perturbation of another branch than cond: expected of='cond' and base='cond', as in the pipeline"
    return None


def requested(call: CallArguments) -> float | None:
    scale = max(call["guidance_scale"], call.get("audio_guidance_scale") or 0.0)
    return float(scale) if scale > 1 else None


def notice(call: CallArguments) -> str:
    """A notice if a pass that was switched off for video still runs for audio, which has scales of its own."""
    off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
    left = {name: call.get(f"audio_{name}") for name, none in off.items() if call[name] <= none}
    return "; ".join(
        f"{name}={call[name]:g} does not switch its pass off, because audio_{name}={scale:g}: set both to {off[name]:g}"
        for name, scale in left.items()
        if scale is not None and scale > off[name]
    )


def passes(pipe: Any, call: CallArguments, guidance: Guidance, moment: Moment, denoiser: str) -> Passes:
    """The passes that the pipeline asks for in the coming step, in its order."""
    _switch_off(pipe, call)
    depth = len(pipe.transformer.transformer_blocks)
    perturbed = Perturbation(call["spatio_temporal_guidance_blocks"] or [0], kind=ATTENTION)
    isolated = Perturbation(range(depth), kind=ISOLATE)
    if not guidance.exact.inert:
        scales = {RESIDUAL: 0.0, ISOLATE: 0.0}
        for part in guidance.perturbations:
            scale = value(part.scale, moment) if guidance.acts(moment) else 0.0
            scales[ISOLATE if part.kind == ISOLATE else RESIDUAL] = scale
            perturbed, isolated = (perturbed, part) if part.kind == ISOLATE else (part, isolated)
        _set(pipe, "stg_scale", scales[RESIDUAL])
        _set(pipe, "modality_scale", 1.0 + scales[ISOLATE])
    turns: list[tuple[str, ...]] = [(UNCOND, COND) if pipe.do_classifier_free_guidance else (COND,)]
    branches: dict[str, Perturbation | None] = {}
    later = bool(guidance.perturbations) and moment.step == 0
    if later and not pipe.do_spatio_temporal_guidance and not pipe.do_modality_isolation_guidance:
        # The pipeline splits off what later steps need in its first step, and only for a perturbed branch.
        pipe._stg_scale = 1.0
        branches[PERTURBED] = None
    elif pipe.do_spatio_temporal_guidance:
        branches[PERTURBED] = perturbed
    if pipe.do_modality_isolation_guidance:
        branches[ISOLATED] = isolated
    return Passes((*turns, *((name,) for name in branches)), branches)


def _switch_off(pipe: Any, call: CallArguments) -> None:
    """Make 0 mean off: the pipeline takes an audio scale of 0 as not given, and a modality scale of 0 as -1."""
    if call.get("audio_stg_scale") == 0:
        pipe._audio_stg_scale = 0.0
    for name in ("modality_scale", "audio_modality_scale"):
        if call.get(name) == 0:
            setattr(pipe, f"_{name}", 1.0)


def _set(pipe: Any, name: str, scale: float) -> None:
    """Set a scale for video, and for audio if the pipeline has one."""
    for each in (f"_{name}", f"_audio_{name}"):
        if hasattr(pipe, each):
            setattr(pipe, each, scale)


def preview(pipe: Any, call: CallArguments, moment: Moment) -> None:
    for name in ("guidance_scale", "stg_scale", "modality_scale"):
        setattr(pipe, f"_{name}", call[name])
        if f"audio_{name}" in call:
            setattr(pipe, f"_audio_{name}", call[f"audio_{name}"] or call[name])


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    return {**even_sigmas(pipe, call), **shifted(pipe, latent_tokens(pipe, call), 1024, 4096, 0.95, 2.05)}


ROWS = {
    *("hidden_states", "encoder_hidden_states", "encoder_attention_mask"),
    *("audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask"),
    *("timestep", "audio_timestep", "sigma", "audio_sigma", "video_coords", "audio_coords"),
    *("temb", "temb_audio", "temb_prompt", "temb_prompt_audio"),
    *("temb_ca_scale_shift", "temb_ca_audio_scale_shift", "temb_ca_gate", "temb_ca_audio_gate"),
    *("video_rotary_emb", "audio_rotary_emb", "ca_video_rotary_emb", "ca_audio_rotary_emb"),
    *("query_rotary_emb", "key_rotary_emb", "attention_mask"),
    *("video_self_attention_mask", "self_attention_mask", "audio_self_attention_mask"),
    *("a2v_cross_attention_mask", "v2a_cross_attention_mask"),
}
LTX2 = Adapter(
    pipeline="LTX2Pipeline",
    protocol="announced",
    blocks=Blocks(
        units=units,
        state=("hidden_states", "audio_hidden_states"),
        rows=frozenset(ROWS),
        identity=identity_of_scores,
        changes={ISOLATE: {"use_a2v_cross_attention": False, "use_v2a_cross_attention": False}},
        unspread="it does not split the text mask",
    ),
    announced=Announced(perturbed=(PERTURBED, ISOLATED), passes=passes, preview=preview),
    unfit=unfit,
    requested=requested,
    notice=notice,
    schedule=schedule,
    # The pipeline's own arguments are its settings: STG 1 at layer 28, modality 3, rescale 0.7.
    defaults=Guidance(),
    source="the pipeline's own",
)
LTX2_IMAGE = dataclasses.replace(LTX2, pipeline="LTX2ImageToVideoPipeline")
LTX2_CONDITION = dataclasses.replace(LTX2, pipeline="LTX2ConditionPipeline")
# A reference video comes as further tokens, and a mask says which tokens attend to them.
LTX2_IN_CONTEXT = dataclasses.replace(LTX2, pipeline="LTX2InContextPipeline")
LTX2_HDR = dataclasses.replace(LTX2, pipeline="LTX2HDRPipeline")  # video only


# Modular pipelines

PASSES = {"pred_cond": COND, "pred_uncond": UNCOND, "pred_cond_stg": PERTURBED, "pred_cond_modality": ISOLATED}
GUIDER, GUIDERS = "LTX2Guidance", ("guider", "audio_guider")


def guiders(pipe: Any) -> list[Any]:
    return [getattr(pipe, name) for name in GUIDERS]


def asked_of_guiders(call: CallArguments) -> float | None:
    scales = [float(guider.guidance_scale) for guider in guiders(call["self"]) if guider.is_cfg_enabled()]
    return max(scales) if scales else None


def steps_of_guiders(pipe: Any) -> int:
    return int(pipe.guider._num_inference_steps)


def passes_of_guiders(pipe: Any, call: CallArguments, guidance: Guidance, moment: Moment, denoiser: str) -> Passes:
    """The passes of the video guider, then those that only the audio guider asks for. Each is a call of its own."""
    asked = dict.fromkeys(PASSES[name] for guider in guiders(pipe) for name in guider.active_predictions())
    depth = len(pipe.transformer.transformer_blocks)
    every = {
        PERTURBED: Perturbation(pipe.guider.spatio_temporal_guidance_blocks or [0], kind=ATTENTION),
        ISOLATED: Perturbation(range(depth), kind=ISOLATE),
    }
    return Passes(tuple((name,) for name in asked), {name: every[name] for name in every if name in asked})


def preview_guiders(pipe: Any, call: CallArguments, moment: Moment) -> None:
    for name in GUIDERS:
        vars(pipe)[name] = copy.copy(getattr(pipe, name))
        getattr(pipe, name).set_state(step=moment.step, num_inference_steps=moment.steps, timestep=None)


def unfit_guiders(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    others = [name_of(guider) for guider in guiders(pipe) if name_of(guider) != GUIDER]
    if others:
        return f"guider: got {', '.join(others)}, expected {GUIDER} for video and for audio"
    if not guidance.exact.inert:
        return "a Guidance: expected none; set stg_scale and the other settings of pipe.guider instead"
    depth = len(pipe.transformer.transformer_blocks)
    blocks = pipe.guider.spatio_temporal_guidance_blocks or []
    stg = any(guider.is_stg_enabled() for guider in guiders(pipe))
    if stg and any(not 0 <= block < depth for block in blocks):
        return f"spatio_temporal_guidance_blocks: got {list(blocks)}, expected numbers from 0 to {depth - 1}"
    if hasattr(pipe.scheduler, "restarts"):
        return "a scheduler from stgfast.restart: a modular pipeline's guider does not count repeated steps"
    return None


@contextmanager
def beginning(pipe: Any) -> Iterator[None]:
    for guider in guiders(pipe):
        guider._num_inference_steps = None  # drop the value of a former call
    yield


LTX2_MODULAR = dataclasses.replace(
    LTX2,
    pipeline="LTX2ModularPipeline",
    announced=Announced(perturbed=(PERTURBED, ISOLATED), passes=passes_of_guiders, preview=preview_guiders),
    unfit=unfit_guiders,
    requested=asked_of_guiders,
    cfg_on="a guider that is enabled, with guidance_scale other than 1",
    notice=nothing_else,
    steps=steps_of_guiders,
    steps_asked=steps_of_modular_call,
    schedule=schedule_of_modular_call,
    within=beginning,
    source="its guiders' own",
)
LTX25_MODULAR = dataclasses.replace(LTX2_MODULAR, pipeline="LTX25ModularPipeline")
