"""What each supported pipeline saves by sharing: block-rows counted by the planner, for models of released sizes.

    python bench/pipelines.py           the tables
    python bench/pipelines.py --check   do the READMEs have these values?
    python bench/pipelines.py --write   write them there

Models are built from their configuration on the meta device, where they have no weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import readme
import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from stgfast.announced import plan_of
from stgfast.batching.plan import Plan
from stgfast.combining import branches_of, plan_for
from stgfast.guidance import Guidance
from stgfast.integrations import ADAPTERS
from stgfast.integrations.open_sora import MODELS as OPEN_SORA
from stgfast.integrations.spec import Adapter
from stgfast.schedules import Moment
from stgfast.spacing import eased

PAGE = readme.README.parent / "stgfast" / "integrations" / "README.md"
HEAD = ("model", "pipelines", "called", "layers", "settings", "from", "block-rows: plain, stgfast, CFG alone", "saved")
SHORT = ("", "default perturbation", "plain method", "stgfast", "with a recipe")
USUAL_STEPS = 50
RECIPE = eased(30, 5, 3)  # of 30 steps those in which blocks run
FLOW = "FlowMatchEulerDiscreteScheduler"
OWN_UNIPC = ("WanPipeline", "WanVACEPipeline", "SkyReelsV2Pipeline")  # as they are released
FIRST = Moment(0, 1)
SOME_CFG = 4.0


@dataclass(frozen=True, eq=False)
class Model:
    """A released model, and the pipelines that use it."""

    name: str
    denoiser: Callable[[], nn.Module]
    pipelines: Sequence[str]

    def build(self) -> nn.Module:
        with torch.device("meta"), no_init_weights():
            return self.denoiser()


def latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_layers=28, patch_size=2, sample_size=64, in_channels=4, out_channels=8, caption_channels=4096
    )


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
    )


def open_sora(*lists: str, sizes: Sequence[int], attention: Sequence[str]) -> nn.Module:
    """The parts of the model that a plan needs."""
    model = nn.Module()
    for name, size in zip(lists, sizes, strict=True):
        blocks = [nn.ModuleDict({part: nn.Identity() for part in attention}) for _ in range(size)]
        model.add_module(name, nn.ModuleList(blocks))
    return model


WAN = diffusers.WanTransformer3DModel
MODELS = [
    Model("Mochi 1", diffusers.MochiTransformer3DModel, ["MochiPipeline"]),
    Model(
        "LTX-Video 2B",
        diffusers.LTXVideoTransformer3DModel,
        [
            "LTXPipeline",
            "LTXImageToVideoPipeline",
            "LTXConditionPipeline",
            "LTXI2VLongMultiPromptPipeline",
            "LTXModularPipeline",
        ],
    ),
    Model(
        "LTX-2",
        diffusers.LTX2VideoTransformer3DModel,
        [
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2ModularPipeline",
            "LTX25ModularPipeline",
        ],
    ),
    Model("LTX-2 HDR, with default arguments", diffusers.LTX2VideoTransformer3DModel, ["LTX2HDRPipeline"]),
    Model(
        "CogVideoX 2B",
        diffusers.CogVideoXTransformer3DModel,
        ["CogVideoXPipeline", "CogVideoXVideoToVideoPipeline"],
    ),
    Model(
        "CogVideoX 5B",
        functools.partial(diffusers.CogVideoXTransformer3DModel, num_layers=42),
        [
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ],
    ),
    Model(
        "HunyuanVideo",
        diffusers.HunyuanVideoTransformer3DModel,
        ["HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"],
    ),
    Model(
        "HunyuanVideo, frames packed",
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        ["HunyuanVideoFramepackPipeline"],
    ),
    Model(
        "HunyuanVideo 1.5",
        diffusers.HunyuanVideo15Transformer3DModel,
        ["HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15ModularPipeline"],
    ),
    Model(
        "Wan 2.1 1.3B, 2.2 5B",
        functools.partial(WAN, num_layers=30),
        ["WanPipeline", "WanVideoToVideoPipeline", "WanModularPipeline"],
    ),
    Model(
        "Wan 2.1 14B, 2.2 A14B",
        WAN,
        [
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "WanModularPipeline",
            "WanImage2VideoModularPipeline",
            "Wan22ModularPipeline",
            "Wan22Image2VideoModularPipeline",
        ],
    ),
    Model("Wan 2.1 VACE 14B", diffusers.WanVACETransformer3DModel, ["WanVACEPipeline", "Wan22VaceModularPipeline"]),
    Model("Wan 2.2 Animate 14B", diffusers.WanAnimateTransformer3DModel, ["WanAnimatePipeline"]),
    Model("Lucy Edit 5B", functools.partial(WAN, num_layers=30), ["LucyEditPipeline"]),
    Model("ChronoEdit 14B", diffusers.ChronoEditTransformer3DModel, ["ChronoEditPipeline"]),
    Model("AnyFlow 14B", diffusers.AnyFlowTransformer3DModel, ["AnyFlowPipeline"]),
    Model("Helios 14B", diffusers.HeliosTransformer3DModel, ["HeliosPipeline"]),
    Model(
        "SkyReels-V2 14B",
        functools.partial(diffusers.SkyReelsV2Transformer3DModel, num_layers=40),
        ["SkyReelsV2Pipeline"],
    ),
    Model(
        "SkyReels-V2 14B, image or forcing",
        functools.partial(diffusers.SkyReelsV2Transformer3DModel, num_layers=40),
        [
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ],
    ),
    Model(
        "Cosmos Predict 1, 2 and 2.5, small",
        diffusers.CosmosTransformer3DModel,
        [
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
        ],
    ),
    Model("Sana-Video", diffusers.SanaVideoTransformer3DModel, ["SanaVideoPipeline", "SanaImageToVideoPipeline"]),
    Model(
        "Motif Video", diffusers.MotifVideoTransformer3DModel, ["MotifVideoPipeline", "MotifVideoImage2VideoPipeline"]
    ),
    Model("Allegro", diffusers.AllegroTransformer3DModel, ["AllegroPipeline"]),
    Model(
        "EasyAnimate 5.1",
        functools.partial(diffusers.EasyAnimateTransformer3DModel, patch_size=2, in_channels=16, out_channels=16),
        ["EasyAnimatePipeline", "EasyAnimateInpaintPipeline"],
    ),
    Model(
        "Kandinsky 5 Lite",
        diffusers.Kandinsky5Transformer3DModel,
        ["Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline"],
    ),
    Model("Stable Video Diffusion", diffusers.UNetSpatioTemporalConditionModel, ["StableVideoDiffusionPipeline"]),
    Model("Latte", latte, ["LattePipeline"]),
    Model(
        "Open-Sora 1.2",
        functools.partial(open_sora, "spatial_blocks", "temporal_blocks", sizes=(28, 28), attention=("attn",)),
        ["STDiT3"],
    ),
    Model(
        "Open-Sora 2.0",
        functools.partial(open_sora, "double_blocks", "single_blocks", sizes=(19, 38), attention=()),
        ["MMDiTModel"],
    ),
    Model(
        "Stable Diffusion 3.5 medium",
        functools.partial(diffusers.SD3Transformer2DModel, num_layers=24, dual_attention_layers=tuple(range(13))),
        ["StableDiffusion3Pipeline"],
    ),
    Model("Stable Diffusion XL", sdxl, ["StableDiffusionXLPipeline"]),
    Model("Flux.1", diffusers.FluxTransformer2DModel, ["FluxPipeline"]),
]


def plans_of(name: str, adapter: Adapter, denoiser: nn.Module) -> list[Plan]:
    """The plans of a guided step of this pipeline, call by call, with default settings."""
    layout = adapter.blocks.of(denoiser)
    if adapter.announced is not None and adapter.protocol == "announced":
        cls = getattr(diffusers, name)
        pipe, call = cls.__new__(cls), arguments_of(name)
        vars(pipe).update(transformer=denoiser, **guiders_of(name))
        adapter.announced.preview(pipe, call, FIRST)
        asked = adapter.announced.passes(pipe, call, Guidance(), FIRST, adapter.denoisers[0])
        return [plan_of(asked, turn, (), False, layout) for turn in asked.turns if asked.computed_in(turn, ())]
    cfg = None if adapter.protocol == "embedded" else SOME_CFG
    weighed = frozenset(dataclasses.replace(adapter.defaults, start=0.0, stop=1.0).weights(FIRST, cfg))
    return [
        plan_for(adapter.defaults, sources, branches_of(weighed), layout) for sources in adapter.calls(cfg is not None)
    ]


def guiders_of(name: str) -> dict[str, Any]:
    """The default guiders of a modular pipeline of LTX-2."""
    if not name.endswith("ModularPipeline"):
        return {}
    from diffusers.modular_pipelines.ltx2.denoise import LTX2LoopDenoiser

    specs = {spec.name: spec for spec in LTX2LoopDenoiser().expected_components}
    return {part: specs[part].type_hint(**specs[part].config) for part in ("guider", "audio_guider")}


def arguments_of(name: str) -> dict[str, Any]:
    """The default arguments of a call of this pipeline."""
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    return {parameter.name: parameter.default for parameter in parameters.values()}


class Counted(NamedTuple):
    """Block-rows of a guided step."""

    plain: int
    shared: int
    cfg: int  # alone


@functools.cache
def counted(model: Model) -> tuple[Counted, Adapter, int]:
    """Block-rows, which are the same for all pipelines of a model; the facts of the first pipeline, and the number of
    layers.
    """
    denoiser = model.build()
    adapters = {name: (ADAPTERS | OPEN_SORA)[name] for name in model.pipelines}
    counts = set()
    for name, adapter in adapters.items():
        plans = plans_of(name, adapter, denoiser)
        perturbed = sum(branch.name != branch.source for plan in plans for branch in plan.branches)
        branches, depth = sum(len(plan.branches) for plan in plans), len(plans[0].steps)
        counts.add(Counted(branches * depth, sum(sum(plan.computed) for plan in plans), (branches - perturbed) * depth))
    (count, *differing), first = counts, next(iter(adapters.values()))
    assert not differing, f"pipelines of {model.name} that are not alike: {counts}"
    return count, first, first.blocks.of(denoiser).layers


def row(model: Model) -> list[str]:
    count, first, layers = counted(model)
    called = dict.fromkeys((ADAPTERS | OPEN_SORA)[name].protocol for name in model.pipelines)
    return [
        model.name,
        ", ".join(f"`{name}`" for name in model.pipelines),
        ", ".join(called),
        str(layers),
        own_settings(model.pipelines[0]) if first.protocol == "announced" else str(first.defaults),
        first.source,
        ", ".join(map(str, count)),
        f"{1 - count.shared / count.plain:.1%}",
    ]


def short(model: Model) -> list[str]:
    count, first, _ = counted(model)
    settings = "as its pipeline has it" if first.protocol == "announced" else str(first.defaults).partition(";")[0]
    share = len(RECIPE) * count.shared / (USUAL_STEPS * count.cfg)
    made = f"{share - 1:+.0%}" if takes_a_solver(model.pipelines[0], first) and not first.blocks.full else ""
    return [model.name, settings, *(f"{each / count.cfg - 1:+.0%}" for each in (count.plain, count.shared)), made]


def takes_a_solver(name: str, adapter: Adapter) -> bool:
    """Whether the model is released with Euler steps of flow matching, which a solver can replace, or with UniPC."""
    made = inspect.signature(getattr(diffusers, name, object)).parameters.get("scheduler")
    inverted = name == "MochiPipeline"
    return name in OWN_UNIPC or (
        made is not None and FLOW in str(made.annotation) and not adapter.own_solver and not inverted
    )


def own_settings(name: str) -> str:
    call = arguments_of(name)
    names = ("spatio_temporal_guidance_blocks", "stg_scale", "modality_scale", "guidance_rescale")
    return ", ".join(f"`{name}` {call[name]}" for name in names)


def main() -> int:
    made = {readme.README: readme.table(SHORT, map(short, MODELS)), PAGE: readme.table(HEAD, map(row, MODELS))}
    return readme.main("pipelines.py", __doc__, made)


if __name__ == "__main__":
    sys.exit(main())
