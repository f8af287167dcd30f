"""Open-Sora 1.2 (STDiT3) and 2.0 (MMDiTModel), whose samplers are functions that receive the model.

Neither is imported: a model is recognized by its class name, and adapted by its attributes. The samplers do not tell
their CFG scales. So the adapters name a scale of 1, with which guidance adds to the conditional prediction.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stgfast.batching.layout import Blocks, Unit
from stgfast.errors import UnsupportedPipelineError
from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments
from stgfast.kinds import AXES
from stgfast.perturbation import Perturbation
from stgfast.presets import PRESETS

NOTHING = "uncond without image"  # the third row, if a sampler has a scale for the image


def requested(call: CallArguments) -> float | None:
    return 1.0 if call["cfg"] else None


def live(pipe: Any, call: CallArguments, denoiser: str) -> float | None:
    return requested(call)


def unfit(pipe: Any, guidance: Guidance, call: CallArguments, *, settable: bool) -> str | None:
    """`settable`: the sampler has one scale, and a guidance may replace it."""
    if not call["cfg"]:
        needs = guidance.cfg is not None or any(part.needs_cfg for part in guidance.perturbations)
        return "cfg=False leaves out the rows of CFG, which this guidance needs" if needs else None
    if settable and guidance.cfg is not None:
        return None
    combined = "a rescale, a projection, or a perturbation whose base is the CFG result,"
    if guidance.rescale != 0.0 or guidance.project or any(part.base == GUIDED for part in guidance.perturbations):
        advice = "; set Guidance(..., cfg=7.0)" if settable else ", and it has two, which change from step to step"
        return f"{combined} needs the CFG scale, which only the sampler knows{advice}"
    if guidance.cfg is not None:
        return "a CFG scale in place of the sampler's: it has two, which change from step to step"
    return None


# Open-Sora 1.2


def stdit3_units(model: nn.Module) -> Sequence[Unit]:
    """The units: a layer is a pair of blocks, one along each axis."""
    lists = (model.get_submodule(name).children() for name in ("spatial_blocks", "temporal_blocks"))
    return [
        Unit(block, layer, ((axis, block.get_submodule("attn")),))
        for layer, pair in enumerate(zip(*lists, strict=True))
        for axis, block in zip(AXES, pair, strict=True)
    ]


def stdit3_identity(attn: Any, x: Tensor) -> Tensor:
    """The identity for an attention in which one layer projects queries, keys and values."""
    value: Tensor = attn.proj_drop(attn.proj(attn.qkv(x).chunk(3, dim=-1)[2]))
    return value


def stdit3_unsupported(pipe: Any) -> str | None:
    if getattr(pipe.model, "enable_sequence_parallelism", False):
        return "a model whose tokens are split over processes"
    known = {"self", "x", "timestep", "y", "mask", "x_mask", "fps", "height", "width", "kwargs"}
    unknown = set(inspect.signature(type(pipe.model).forward).parameters) - known
    if unknown:
        return f"an STDiT3 of another version than 1.2, with {', '.join(sorted(unknown))},"
    return None


STDIT3 = Adapter(
    pipeline="STDiT3",
    protocol="stacked",
    order=(COND, UNCOND),
    blocks=Blocks(
        units=stdit3_units,
        state=("x",),
        rows=frozenset({"x", "timestep", "y", "mask", "x_mask", "fps", "height", "width", "t", "t0"}),
        packed={"y": "mask"},
        identity=stdit3_identity,
    ),
    learned_sigma=True,
    requested=requested,
    live=live,
    unsupported=stdit3_unsupported,
    unfit=functools.partial(unfit, settable=True),
    denoisers=("model",),
    sample="x",
    defaults=Guidance.preset("open-sora"),
    source=PRESETS["open-sora"].source,
)


# Open-Sora 2.0


def mmdit_units(model: nn.Module) -> Sequence[Unit]:
    """The units: blocks with a separate stream for text, then blocks with one stream. Attention is not a module."""
    double, single = (list(model.get_submodule(name).children()) for name in ("double_blocks", "single_blocks"))
    return [
        *(Unit(block, layer, state=("img", "txt")) for layer, block in enumerate(double)),
        *(Unit(block, layer, state=("x",)) for layer, block in enumerate(single, len(double))),
    ]


MMDIT = Adapter(
    pipeline="MMDiTModel",
    protocol="stacked",
    order=(COND, UNCOND, NOTHING),
    blocks=Blocks(
        units=mmdit_units,
        rows=frozenset(
            {"img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance", "vec", "pe", "x"}
        ),
    ),
    requested=requested,
    live=live,
    unfit=functools.partial(unfit, settable=False),
    denoisers=("model",),
    sample="img",
    # Of 19 blocks with two streams and 38 with one.
    defaults=Guidance(Perturbation([13])),
)

MODELS = {adapter.pipeline: adapter for adapter in (STDIT3, MMDIT)}


def adapter_for_model(pipe: Any) -> Adapter:
    """The adapter for `pipe.model`."""
    name = type(pipe.model).__name__
    adapter = MODELS.get(name)
    if adapter is None:
        raise UnsupportedPipelineError(f"model: got {name}, expected one of {', '.join(sorted(MODELS))}")
    missing = adapter.unsupported(pipe)
    if missing:
        raise UnsupportedPipelineError(f"{name}: {missing} is not supported")
    return adapter
