"""Settle the settings of one call of an accelerated pipeline, and find everything that is wrong before it starts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

from stgfast.batching.arguments import unwrapped
from stgfast.batching.context import context_of
from stgfast.batching.room import ALL, Rows
from stgfast.batching.seam import caching_hooks, foreign_forward
from stgfast.errors import SettingsError, UnsupportedPipelineError, wrong
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, Fitted
from stgfast.integrations.steps import CallArguments
from stgfast.spacing import EVERY

# Arguments of a call in addition to the pipeline's own.
SETTINGS = (
    "stg",  # a Guidance for this call only
    "stg_scale",
    "stg_layers",
    "stg_mode",
    "stg_rescale",
    "stg_applied_layers_idx",  # the name in the authors' code for stg_layers
    "do_rescaling",  # the switch in the authors' code: rescale 0.7 or 0
)
PAPER_RESCALE = 0.7


def settings_of(pipeline: type[Any]) -> tuple[str, ...]:
    """The names of our settings that the pipeline's own call does not use."""
    own = inspect.signature(pipeline.__call__).parameters
    return tuple(name for name in SETTINGS if name not in own)


def settle(guidance: Guidance, own_rescale: float | None, given: Mapping[str, Any]) -> Guidance:
    """The guidance of one call: the pipeline's guidance, changed by the settings of the call.

    `own_rescale` is the rescale that the call asks for by the pipeline's own argument.
    """
    given = {name: setting for name, setting in given.items() if setting is not None}
    for one, other in (("stg_layers", "stg_applied_layers_idx"), ("stg_rescale", "do_rescaling")):
        if one in given and other in given:
            raise wrong(f"{one} and {other}", (given[one], given[other]), "only one of them: both set the same thing")
    if "stg" in given:
        guidance = given.pop("stg")
        if given:
            raise wrong("settings beside stg", sorted(given), "none: stg holds all settings")
        if not isinstance(guidance, Guidance):
            raise wrong("stg", guidance, "a stgfast.Guidance")
    rescale = given.get("stg_rescale")
    if "do_rescaling" in given:
        rescale = PAPER_RESCALE if given["do_rescaling"] else 0.0
    scale = given.get("stg_scale")
    changes = {
        "layers": given.get("stg_layers", given.get("stg_applied_layers_idx")),
        "kind": given.get("stg_mode"),
        "scale": scale,
    }
    changes = {name: change for name, change in changes.items() if change is not None}
    if isinstance(scale, Real) and scale == 0:  # off, except for what this call asks for
        if len(changes) > 1:
            guidance.with_perturbation(**changes)  # wrong settings raise at scale 0 too
        return Guidance(rescale=rescale or 0.0)
    if changes:
        guidance = guidance.with_perturbation(**changes)
    if rescale is None:
        rescale = own_rescale
    return guidance if rescale is None else dataclasses.replace(guidance, rescale=rescale)


def check_call(pipeline: type[Any], adapter: Adapter) -> None:
    """Raise if the signature of a call hides the arguments that the adapter reads, as in some subclasses."""
    own = inspect.signature(pipeline.__call__).parameters
    described = next((cls for cls in pipeline.__mro__ if cls.__name__ == adapter.pipeline), pipeline)
    hidden = [name for name in inspect.signature(described.__call__).parameters if name not in own]
    if hidden:
        raise UnsupportedPipelineError(
            f"arguments of {pipeline.__name__}.__call__: got {', '.join(own)}, expected every "
            f"argument of {described.__name__}.__call__ by name, including {', '.join(hidden)}"
        )


def check_max_rows(max_rows: object) -> None:
    number = isinstance(max_rows, int) and not isinstance(max_rows, bool) and max_rows >= 1
    if not number and max_rows not in (None, ALL):
        raise wrong("max_rows", max_rows, f"a number of rows, 1 or more, {ALL!r}, or None for what memory allows")


def check(fitted: Fitted, guidance: Guidance, call: CallArguments, *, max_rows: Rows = None) -> None:
    """Raise if anything about a call is known to be wrong before it starts."""
    pipe, adapter, _ = fitted
    check_layers(fitted, guidance)
    unfit = adapter.unfit(pipe, guidance, call)
    if unfit:
        raise SettingsError(f"{adapter.pipeline}: {unfit}")
    inert = guidance.inert and not adapter.announces(pipe)
    if not inert or max_rows is not None:
        check_forwards(fitted)
        check_caches(fitted)
    if inert:
        return
    needs = cfg_needed_by(guidance)
    if needs and adapter.requested(call) is None:
        needing = any(part.needs_cfg for part in guidance.perturbations)
        advice = "; without CFG, Guidance(Perturbation([...])) perturbs cond" if needing else ""
        raise SettingsError(f"{needs}: got a call without CFG, expected {adapter.cfg_on}{advice}")
    check_tokens(fitted, grid=any(part.how.grid for part in guidance.perturbations))
    if guidance.reuse_blocks != EVERY and any(layout.blocks.full for layout in fitted.layouts.values()):
        raise SettingsError(
            f"reuse_blocks: got {adapter.pipeline}, whose model works on hidden states between its blocks, expected "
            f"reuse and reuse_cfg"
        )
    scheduler = getattr(pipe, "scheduler", None)
    if guidance.by_sigma and getattr(scheduler, "sigmas", None) is None:
        got = "no scheduler" if scheduler is None else type(scheduler).__name__
        raise wrong("a schedule over sigma", got, "a scheduler that has sigmas, or a schedule over steps or progress")
    steps = adapter.steps_of_run(pipe, call)
    guidance.check_steps(steps)
    if not any(guidance.start <= step / steps < guidance.stop for step in range(steps)):
        share = f"a part of the run with at least one of its {steps} steps, or stg_scale=0 for none"
        raise wrong("start and stop", (guidance.start, guidance.stop), share)


def cfg_needed_by(guidance: Guidance) -> str:
    """The part of a guidance that needs CFG, in words; "" if there is none."""
    needing = [part for part in guidance.perturbations if part.needs_cfg]
    if needing:
        return f"a perturbation of {needing[0].of} against {needing[0].base}"
    if guidance.cfg is not None:
        return "a cfg schedule"
    if guidance.projects_cfg:
        return f"project={guidance.project!r}"
    return "reuse_cfg" if guidance.reuse_cfg != EVERY else ""


def check_forwards(fitted: Fitted) -> None:
    """Raise if a library replaced the forward of the model or of a block: it may skip blocks, or keep their outputs."""
    for name, layout in fitted.layouts.items():
        for module in (layout.denoiser, *(unit.module for unit in layout.units)):
            home = foreign_forward(unwrapped(module))
            if home:
                raise SettingsError(
                    f"forward of {type(module).__name__} in pipe.{name}: got one from {home}, expected its own; "
                    f"caches and parallelism that replace it cannot be combined with guidance: switch it off, "
                    f"for example with cache_dit.disable_cache(pipe), or load the model again"
                )


def check_tokens(fitted: Fitted, *, grid: bool) -> None:
    """Raise if tokens are sharded over processes and the model or the kind does not allow it. A kind that uses token
    positions needs all tokens of a frame, and no other tokens among them.
    """
    for name, layout in fitted.layouts.items():
        if context_of(layout.denoiser) is None:
            continue
        if layout.blocks.unspread:
            raise SettingsError(
                f"{fitted.adapter.pipeline}: got pipe.{name} with its tokens split over processes, which diffusers "
                f"cannot do for this model: {layout.blocks.unspread}; split its branches instead, with "
                f"accelerate(pipe, branches=group)"
            )
        if grid and len(layout.blocks.state) > 1:
            raise SettingsError(
                f"blur of the queries: got pipe.{name} with its tokens split over processes, including text "
                f"tokens, expected all tokens in one process; use kind='attention' or 'residual'"
            )


def check_caches(fitted: Fitted) -> None:
    """Raise if a cache is enabled.

    A cache keeps the output of a module for its next call, and takes that call to have the same rows. Under guidance,
    rows differ from block to block and from step to step, and `max_rows` splits a call. If shapes happen to agree, the
    result would be wrong without an error.
    """
    for name, layout in fitted.layouts.items():
        hooks = caching_hooks(layout.denoiser)
        if not hooks:
            continue
        if getattr(layout.denoiser, "is_cache_enabled", False):
            advice = f"pipe.{name}.disable_cache()"
        else:
            registry = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.{name})"
            advice = f"for hook in {hooks}: {registry}.remove_hook(hook)"
        raise SettingsError(
            f"pipe.{name} has a cache ({', '.join(hooks)}), which returns block outputs of earlier steps; guided "
            f"steps have other rows, so switch it off: {advice}"
        )


def check_layers(fitted: Fitted, guidance: Guidance, *, default: bool = False) -> None:
    for layout in fitted.layouts.values():
        for perturbation in guidance.perturbations:
            beyond = [layer for layer in perturbation.layers if layer >= layout.layers]
            if beyond:
                whose = "the default layers of this model" if default else "layers"
                advice = "; choose some with stgfast.Guidance(stgfast.Perturbation([...]))" if default else ""
                right = f"numbers from 0 to {layout.layers - 1}{advice}"
                raise wrong(f"{whose}, {fitted.adapter.pipeline}", beyond, right)
            layout.marks(perturbation)  # raises if the model does not support this kind or axis
