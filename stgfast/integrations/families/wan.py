"""Wan 2.1 and 2.2: text to video, image to video, video to video, VACE, Animate; and models built on Wan: ChronoEdit,
Lucy Edit, AnyFlow and Helios."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stgfast.batching.arguments import unwrapped
from stgfast.batching.layout import Blocks, Grid, Unit
from stgfast.guidance import Guidance
from stgfast.integrations.clips import ONE, Clips
from stgfast.integrations.guiders import guided_by, schedule_of_modular_call, steps_of_modular_call
from stgfast.integrations.scales import live_scale, live_scale_of_second
from stgfast.integrations.spec import Adapter, never, patches
from stgfast.integrations.steps import CallArguments, steps_of_call
from stgfast.perturbation import Perturbation
from stgfast.presets import PRESETS


def second_below(pipe: Any) -> float | None:
    ratio = pipe.config.get("boundary_ratio")
    return None if ratio is None else float(ratio) * pipe.scheduler.config.num_train_timesteps


def fps(config: Mapping[str, Any]) -> float:
    """Frames per second; the 5B model of 2.2 is the one with a timestep for each token."""
    return 24.0 if config.get("expand_timesteps") else 16.0


def unsupported(pipe: Any) -> str | None:
    one, other = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    if one is not None and other is not None and unwrapped(one) is unwrapped(other):
        return "one model as both transformer and transformer_2"
    return None


def chrono_unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    if call["enable_temporal_reasoning"] and guidance.reuses:
        return "reuse with enable_temporal_reasoning, which drops latent frames during the run: expected no reuse"
    return None


def vace_units(denoiser: nn.Module) -> Sequence[Unit]:
    """The units. Hints are made first from the control video; they are not layers of the model, and only shared."""
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
        full=True,  # hints are added after some blocks
    ),
)
# Faces are added after some blocks. A longer clip is made in segments.
WAN_ANIMATE = replace(
    WAN,
    pipeline="WanAnimatePipeline",
    blocks=replace(WAN.blocks, rows=WAN.blocks.rows | {"pose_hidden_states", "face_pixel_values"}, full=True),
    denoisers=("transformer",),
    second_below=never,
    windowed=True,
)
LUCY_EDIT = replace(WAN, pipeline="LucyEditPipeline")
CHRONO_EDIT = replace(
    WAN_IMAGE, pipeline="ChronoEditPipeline", denoisers=("transformer",), second_below=never, unfit=chrono_unfit
)
TEXT_ALONE = WAN.blocks.rows - {"encoder_hidden_states_image"}
ANY_FLOW = replace(
    WAN,
    pipeline="AnyFlowPipeline",
    protocol="stacked",
    blocks=replace(
        WAN.blocks,
        rows=TEXT_ALONE | {"r_timestep"},
        grid=Grid(functools.partial(patches, dims=(1, 3, 4))),
    ),
    denoisers=("transformer",),
    second_below=never,
    live=live_scale,
    # 70% of the depth of the larger model, which has 40 blocks.
    defaults=Guidance(Perturbation([28], scale=1.0)),
    source="our choice",
)
HELIOS_ROWS = {
    *("indices_hidden_states", "indices_latents_history_short", "indices_latents_history_mid"),
    *("indices_latents_history_long", "latents_history_short", "latents_history_mid", "latents_history_long"),
    "rotary_emb",
}
HELIOS = replace(
    ANY_FLOW,
    pipeline="HeliosPipeline",
    protocol="sequential",
    # Tokens of earlier frames come before those of the current chunk.
    blocks=replace(WAN.blocks, rows=TEXT_ALONE | HELIOS_ROWS, grid=None),
    windowed=True,
)
modular = functools.partial(guided_by, steps_asked=steps_of_modular_call, schedule=schedule_of_modular_call)
WAN_MODULAR = modular(WAN, "WanModularPipeline")
WAN_IMAGE_MODULAR = modular(replace(WAN_IMAGE, clips=WAN.clips), "WanImage2VideoModularPipeline")
WAN_22_MODULAR = modular(WAN, "Wan22ModularPipeline")
WAN_22_IMAGE_MODULAR = modular(replace(WAN_IMAGE, clips=WAN.clips), "Wan22Image2VideoModularPipeline")
WAN_22_VACE_MODULAR = modular(WAN_VACE, "Wan22VaceModularPipeline")
