"""Pipelines with a guider: an object that decides which passes a step makes, and combines them.

There are two ways. A guider with perturbed passes of its own (skip-layer, perturbed-attention, smoothed-energy
guidance) stays in charge: its passes are answered from one shared computation, and it combines them. With a guider of
CFG alone the engine combines, as in any other pipeline, and the guider receives two equal predictions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from stgfast.errors import SettingsError
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, Announced, Passes, nothing_missing
from stgfast.integrations.steps import CallArguments, schedule_of_call, steps_of_call
from stgfast.kinds import ATTENTION, BLUR, RESIDUAL
from stgfast.perturbation import Perturbation
from stgfast.schedules import Moment

CFG = "ClassifierFreeGuidance"
SEG = "SmoothedEnergyGuidance"
WITH_PERTURBED_PASSES = ("SkipLayerGuidance", "PerturbedAttentionGuidance", SEG)
PERTURBED = "perturbed"


def guided_by(adapter: Adapter, pipeline: str, **changes: Any) -> Adapter:
    """The facts of a pipeline that makes the steps of `adapter` under a guider, as modular pipelines do."""
    return dataclasses.replace(
        adapter,
        pipeline=pipeline,
        protocol="sequential",
        float32=False,
        unsupported=nothing_missing,
        requested=requested,
        cfg_on="a guider that is enabled, with guidance_scale above 1",
        live=live,
        steps=steps,
        own_rescale=own_rescale,
        announced=Announced(
            when=announces,
            perturbed=(PERTURBED,),
            passes=functools.partial(passes, lists=adapter.blocks.lists),
            preview=preview,
        ),
        within=quiet,
        unfit=functools.partial(unfit, lists=adapter.blocks.lists),
        **changes,
    )


def steps_of_modular_call(call: CallArguments) -> int:
    return steps_of_call(_given_to(call))


def schedule_of_modular_call(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    return schedule_of_call(pipe, _given_to(call))


def _given_to(call: CallArguments) -> dict[str, Any]:
    """The arguments of a modular pipeline's call, with the defaults of the pipeline's blocks."""
    defaults = {each.name: each.default for each in call["self"].blocks.inputs}
    return {"num_inference_steps": defaults["num_inference_steps"], **call["kwargs"]}


def name_of(guider: Any) -> str:
    return type(guider).__name__


def guider_of(pipe: Any, denoiser: str) -> Any:
    second = getattr(pipe, "guider_2", None)
    return second if denoiser.endswith("_2") and second is not None else pipe.guider


def guiders(pipe: Any) -> list[Any]:
    return [guider for name in ("guider", "guider_2") if (guider := getattr(pipe, name, None)) is not None]


def announces(pipe: Any) -> bool:
    return any(name_of(guider) in WITH_PERTURBED_PASSES for guider in guiders(pipe))


def requested(call: CallArguments) -> float | None:
    """The CFG scale of the first guider; None unless all guiders have one."""
    scales = [_scale(guider) if guider._enabled else 1.0 for guider in guiders(call["self"])]
    return None if 1.0 in scales else scales[0]


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    guider = guider_of(pipe, denoiser)
    return _scale(guider) if guider._is_cfg_enabled() else None


def _scale(guider: Any) -> float:
    """s in u + s (c - u). The original formulation is c + s (c - u)."""
    return float(guider.guidance_scale) + (1.0 if guider.use_original_formulation else 0.0)


def own_rescale(call: CallArguments) -> float | None:
    return float(getattr(call["self"].guider, "guidance_rescale", 0.0)) or None  # some have none, and are refused


def steps(pipe: Any) -> int:
    """The number of steps; 0 before the first one, when no guider knows it."""
    return int(next((g._num_inference_steps for g in guiders(pipe) if g._num_inference_steps is not None), 0))


def passes(
    pipe: Any, call: CallArguments, guidance: Guidance, moment: Moment, denoiser: str, lists: Sequence[str]
) -> Passes:
    """The passes that the guider will ask for in this step, in its order."""
    guider = guider_of(pipe, denoiser)
    turns: list[tuple[str, ...]] = [(COND,)]
    if guider._is_cfg_enabled():
        turns.append((UNCOND,))
    perturbed: dict[str, Perturbation | None] = {}
    if name_of(guider) in WITH_PERTURBED_PASSES and _has_perturbed_pass(guider):
        turns.append((PERTURBED,))
        perturbed[PERTURBED] = perturbation_of(guider, getattr(pipe, denoiser), lists)
    return Passes(tuple(turns), perturbed)


def _has_perturbed_pass(guider: Any) -> bool:
    """Whether the guider's current step has a perturbed pass."""
    return bool(guider._is_seg_enabled() if name_of(guider) == SEG else guider._is_slg_enabled())


def perturbation_of(guider: Any, denoiser: nn.Module, lists: Sequence[str]) -> Perturbation:
    """The perturbation that a guider's configuration describes."""
    if name_of(guider) == SEG:
        return _blur_of(guider, denoiser, lists)
    kinds = set()
    for config in guider.skip_layer_config:
        skipped = (config.skip_attention, config.skip_attention_scores, config.skip_ff, config.dropout)
        kinds.add({(True, False, True, 1.0): RESIDUAL, (False, True, False, 1.0): ATTENTION}.get(skipped, ""))
    layers = _layers_of(guider, guider.skip_layer_config, denoiser, lists)
    if len(kinds) > 1 or "" in kinds:
        raise SettingsError(
            f"configuration of {name_of(guider)}: expected all its layers to skip the whole block, or all of them "
            f"to skip only the attention scores"
        )
    return Perturbation(layers, kind=kinds.pop())


def _blur_of(guider: Any, denoiser: nn.Module, lists: Sequence[str]) -> Perturbation:
    """The blur of the paper: a Gaussian within each frame, and its mean for sigmas above the threshold.

    diffusers 0.42 takes the mean for sigmas below the threshold and the Gaussian above, both over the largest square of
    tokens whatever the frames are. It never gets there, because its guider does not count passes, so no pass is
    blurred.
    """
    for config in guider.seg_guidance_config:
        if config._query_proj_identifiers not in (None, ["to_q"]):
            raise SettingsError(f"queries of {SEG}: got {config._query_proj_identifiers}, expected None or ['to_q']")
    sigma = float(guider.seg_blur_sigma)
    sigma = math.inf if sigma > guider.seg_blur_threshold_inf else sigma
    return Perturbation(_layers_of(guider, guider.seg_guidance_config, denoiser, lists), kind=BLUR, sigma=sigma)


def _layers_of(guider: Any, configs: Sequence[Any], denoiser: nn.Module, lists: Sequence[str]) -> list[int]:
    """Layers counted through all stacks of blocks, as everywhere in stgfast."""
    layers: list[int] = []
    for config in configs:
        path = lists[0] if config.fqn == "auto" else config.fqn
        if path not in lists:
            raise SettingsError(f"fqn of {name_of(guider)}: got {path!r}, expected one of {', '.join(lists)}")
        sizes = [len(list(denoiser.get_submodule(block).children())) for block in lists]
        before, size = sum(sizes[: lists.index(path)]), sizes[lists.index(path)]
        indices = [config.indices] if isinstance(config.indices, int) else list(config.indices)
        if not indices or not all(0 <= index < size for index in indices):
            raise SettingsError(f"layers of {name_of(guider)}: got {indices}, expected numbers from 0 to {size - 1}")
        layers += [before + index for index in indices]
    return layers


def preview(pipe: Any, call: CallArguments, moment: Moment) -> None:
    for name in ("guider", "guider_2"):
        if getattr(pipe, name, None) is not None:
            vars(pipe)[name] = copy.copy(getattr(pipe, name))
            getattr(pipe, name).set_state(step=moment.step, num_inference_steps=moment.steps, timestep=None)


def unfit(pipe: Any, guidance: Guidance, call: CallArguments, lists: Sequence[str]) -> str | None:
    if "kwargs" in call and hasattr(pipe.scheduler, "restarts"):
        return "a scheduler from stgfast.restart: a modular pipeline's guider does not count repeated steps"
    for guider in guiders(pipe):
        name = name_of(guider)
        if name in WITH_PERTURBED_PASSES:
            if not guidance.exact.inert:
                return f"a Guidance, and a guider of perturbed passes, {name}: expected one of the two"
            perturbation_of(guider, pipe.transformer, lists)
        elif name != CFG:
            return f"guider: got {name}, expected {CFG}, or {' or '.join(WITH_PERTURBED_PASSES)}"
    return None


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Keep guiders from changing the model within the block: what their hooks would do is computed already."""
    for guider in guiders(pipe):
        guider._num_inference_steps = None  # drop the value of a former call
    quieted = [guider for guider in guiders(pipe) if name_of(guider) in WITH_PERTURBED_PASSES]
    for guider in quieted:
        vars(guider)["prepare_models"] = functools.partial(_count, guider)
        vars(guider)["cleanup_models"] = _nothing
    try:
        yield
    finally:
        for guider in quieted:
            del vars(guider)["prepare_models"], vars(guider)["cleanup_models"]


def _count(guider: Any, denoiser: nn.Module) -> None:
    guider._count_prepared += 1


def _nothing(denoiser: nn.Module) -> None:
    pass
