"""Wan 2.1 and 2.2: text to video, image to video, video to video, and VACE."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stgfast.batching.arguments import unwrapped
from stgfast.batching.layout import Blocks, Grid, Unit
from stgfast.guidance import Guidance
from stgfast.integrations.guiders import guided_by, schedule_of_modular_call, steps_of_modular_call
from stgfast.integrations.scales import live_scale_of_second
from stgfast.integrations.spec import ONE, Adapter, Clips, never, patches
from stgfast.integrations.steps import steps_of_call
from stgfast.presets import PRESETS


def second_below(pipe: Any) -> float | None:
    ratio = pipe.config.get("boundary_ratio")
    return None if ratio is None else float(ratio) * pipe.scheduler.config.num_train_timesteps


def fps(config: Mapping[str, Any]) -> float:
    """The 5B model of 2.2 is the one with a timestep for every token."""
    return 24.0 if config.get("expand_timesteps") else 16.0


def unsupported(pipe: Any) -> str | None:
    one, other = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    if one is not None and other is not None and unwrapped(one) is unwrapped(other):
        return "one model as both transformer and transformer_2, whose scales cannot be told apart,"
    return None


def vace_units(denoiser: nn.Module) -> Sequence[Unit]:
    """All hints are made first, from the control video; they are no layers of the model, and only shared."""
    hints = [
        Unit(block, None, state=("control_hidden_states",))
        for block in denoiser.get_submodule("vace_blocks").children()
    ]
    blocks = enumerate(denoiser.get_submodule("blocks").children())
    return [*hints, *(Unit(block, i, (("", block.get_submodule("attn1")),)) for i, block in blocks)]


WAN = Adapter(
    pipeline="WanPipeline",
    protocol="sequential",
    blocks=Blocks(
        lists=("blocks",),
        rows=frozenset({"hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "temb"}),
        grid=Grid(patches),
    ),
    denoisers=("transformer", "transformer_2"),
    second_below=second_below,
    live=live_scale_of_second,
    unsupported=unsupported,
    defaults=Guidance.preset("wan"),
    source=PRESETS["wan"].source,
    clips=Clips(exact=("vae", "image_encoder"), fps=fps),
)
WAN_IMAGE = replace(WAN, pipeline="WanImageToVideoPipeline", clips=replace(WAN.clips, images=ONE))
WAN_VIDEO = replace(
    WAN,
    pipeline="WanVideoToVideoPipeline",
    denoisers=("transformer",),
    second_below=never,
    steps_asked=functools.partial(steps_of_call, strength="strength"),
)
WAN_VACE = replace(
    WAN,
    pipeline="WanVACEPipeline",
    blocks=replace(
        WAN.blocks,
        lists=(),
        units=vace_units,
        rows=WAN.blocks.rows | {"control_hidden_states"},
        full=True,  # a hint is added after some of the blocks
    ),
)
WAN_MODULAR = guided_by(WAN, "WanModularPipeline", steps_asked=steps_of_modular_call, schedule=schedule_of_modular_call)
WAN_22_MODULAR = replace(WAN_MODULAR, pipeline="Wan22ModularPipeline")
