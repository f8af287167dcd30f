"""The measured models, as data. They are built from their configuration, with random weights.

A clip is measured from encoded prompts to latents: encoders and decoders are not built. If a pipeline needs one, a
substitute that takes no time is used.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stgfast.guidance import Guidance
from stgfast.perturbation import Perturbation

TINY, SMALL, FULL, LARGEST = SIZES = ("tiny", "small", "full", "largest")
DTYPES = {TINY: torch.float32, SMALL: torch.float32, FULL: torch.bfloat16, LARGEST: torch.bfloat16}
Clip = tuple[int, int, int]  # height, width, frames
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Model:
    """A released model, and narrow versions of it.

    Attributes:
        pipeline: the pipeline class.
        denoiser: the class of its denoiser.
        layers: the skipped layer, by size; about 70% of the depth, as in Mochi's published setting. Sizes left out use
            that of the full model.
        text: the outputs of encoders for a prompt, as shapes by name without the prompts, from the denoiser's
            configuration and whether the model is a narrow one.
        clips: the clip, by size. The full one defaults to the largest.
        narrow: what is smaller in the narrow model, by size. A small one has full depth, a tiny one does not.
        config: the configuration of the released model, if it is not the class's default.
        source: the source of that configuration.
        guidance: replaces a skipped layer; None if the pipeline asks for perturbed branches itself.
        given: further arguments of a call, from the layer.
        prepare: puts substitutes for encoders and decoders into a pipeline.
        part: the component that is the denoiser.
        frames: the number of frames of a video for each latent frame but the first.
        modular: the modular pipeline that makes the same clip under a guider: its blocks, and the path of the
            denoiser's.
        reference: the file of the authors' repository with a pipeline for it, and the pipeline's class, if there is
            one.
    """

    pipeline: str
    denoiser: str
    layers: Mapping[str, int]
    text: Callable[[Any, bool], Shapes]
    clips: Mapping[str, Clip]
    narrow: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "the class's defaults in diffusers"
    guidance: Callable[[int], Guidance | None] = lambda layer: Guidance(Perturbation([layer]))
    cfg: float = 4.5
    given: Callable[[int], Mapping[str, Any]] = lambda layer: {}
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    prepare: Callable[[Any], None] = lambda pipe: None
    part: str = "transformer"
    frames: int = 4
    modular: str = ""
    reference: tuple[str, str] = ("", "")

    def clip(self, size: str) -> Clip:
        return self.clips[size] if size in self.clips else self.clips[FULL]

    def layer(self, size: str) -> int:
        return self.layers[size] if size in self.layers else self.layers[FULL]

    def settings(self, size: str) -> dict[str, Any]:
        """The denoiser's configuration."""
        return {**self.config, **self.narrow.get(size, {})}

    def build(self, size: str, device: str = "cpu") -> Any:
        """A pipeline with little more than its denoiser and scheduler."""
        import diffusers
        from diffusers.models.modeling_utils import no_init_weights

        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[size])
        try:
            # On the meta device there are no weights to initialize.
            with torch.device(device), no_init_weights() if device == "meta" else nullcontext():
                denoiser = getattr(diffusers, self.denoiser)(**self.settings(size)).eval()
            denoiser.to(device)  # some create a tensor on the wrong device
        finally:
            torch.set_default_dtype(before)
        cls = getattr(diffusers, self.pipeline)
        parameters = inspect.signature(cls.__init__).parameters.values()
        nothing = {each.name: None for each in parameters if each.default is each.empty and each.name != "self"}
        pipe = cls(**{**nothing, self.part: denoiser, "scheduler": getattr(diffusers, self.scheduler)()})
        pipe.set_progress_bar_config(disable=True)
        self.prepare(pipe)
        return pipe

    def arguments(self, pipe: Any, size: str, steps: int | None, *, prompts: int = 1, clip: Clip | None = None) -> Any:
        """The arguments of a call without generators. `None` steps are the pipeline's own number."""
        denoiser = getattr(pipe, self.part)
        device, dtype = denoiser.device, denoiser.dtype
        generator = torch.Generator().manual_seed(0)
        height, width, frames = clip or self.clip(size)
        made: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "output_type": "latent"}
        made |= self.given(self.layer(size))
        takes = inspect.signature(type(pipe).__call__).parameters
        for name, shape in self.text(denoiser.config, size in self.narrow).items():
            for side in ("", "negative_"):
                made[side + name] = torch.randn(prompts, *shape, generator=generator).to(device, dtype)
                mask = f"{side}prompt_attention_mask"
                if mask in takes and name == "prompt_embeds":
                    made[mask] = (torch.arange(shape[0]) < shape[0] // 4).to(device).repeat(prompts, 1)
        if "image" in takes:
            made["image"] = torch.rand(prompts, 3, height, width, generator=generator)
        made["num_inference_steps"] = steps or takes["num_inference_steps"].default
        scale = "max_guidance_scale" if "max_guidance_scale" in takes else "guidance_scale"
        return {**made, scale: self.cfg}


def usual_text(config: Any, narrow: bool, width: str, tokens: int, fewer: int = 0) -> Shapes:
    """As many tokens as the pipeline pads prompts to, or fewer for a narrow model."""
    return {"prompt_embeds": (fewer if narrow and fewer else tokens, config[width])}


def hunyuan_text(config: Any, narrow: bool) -> Shapes:
    text = usual_text(config, narrow, "text_embed_dim", 256, fewer=64)
    return {**text, "pooled_prompt_embeds": (config["pooled_projection_dim"],)}


def no_text(config: Any, narrow: bool) -> Shapes:
    return {}


def encoded_image(pipe: Any) -> None:
    """Prepare Stable Video Diffusion, which only takes an image and nothing made from one."""
    unet = pipe.unet

    @functools.cache
    def of(shape: Sequence[int], copies: bool) -> Tensor:
        some = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(unet.device, unet.dtype)
        return torch.cat([torch.zeros_like(some), some]) if copies else some

    def embeddings(image: Tensor, device: Any, videos: int, cfg: bool) -> Tensor:
        return of((len(image), 1, unet.config.cross_attention_dim), cfg)

    def latents(image: Tensor, device: Any, num_videos_per_prompt: int, do_classifier_free_guidance: bool) -> Tensor:
        sides = (side // pipe.vae_scale_factor for side in image.shape[2:])
        return of((len(image), unet.config.in_channels // 2, *sides), do_classifier_free_guidance)

    vars(pipe).update(_encode_image=embeddings, _encode_vae_image=latents, vae=SimpleNamespace(dtype=unet.dtype))


def connected_text(pipe: Any) -> None:
    """Prepare LTX-2, which runs encoded prompts through a model of its own once per call, and scales latents at the
    end.
    """
    none, one = torch.zeros(1), torch.ones(1)
    scaling: dict[str, Any] = {"latents_mean": none, "latents_std": one}
    video = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), **scaling)
    audio = SimpleNamespace(config=SimpleNamespace(mel_bins=64, latent_channels=8), **scaling)

    def connectors(embeds: Tensor, mask: Tensor, padding_side: str) -> tuple[Tensor, Tensor, Tensor]:
        return embeds, embeds, torch.ones_like(mask)

    vars(pipe).update(vae=video, audio_vae=audio, connectors=connectors)


HEADS = {size: {"num_attention_heads": heads, "attention_head_dim": 64} for size, heads in ((TINY, 2), (SMALL, 4))}
WIDTH = {TINY: 128, SMALL: 256}


def narrowed(*widths: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """A narrow model: few heads, and as wide as they are together."""
    return {size: {**HEADS[size], **dict.fromkeys(widths, WIDTH[size]), **changes} for size in WIDTH}


def alike(narrow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tiny model as wide as the small one: if it were narrower, fixed costs of a call would matter."""
    return {size: dict(narrow) for size in WIDTH}


def shallow(narrow: Mapping[str, Mapping[str, Any]], **less: Any) -> dict[str, Mapping[str, Any]]:
    """The tiny model with fewer blocks, or less inside them."""
    return {**narrow, TINY: {**narrow[TINY], **less}}


NARROW_UNET = {
    "block_out_channels": (64, 128, 256, 256),
    "num_attention_heads": (1, 2, 4, 4),
    "cross_attention_dim": 256,
}
CONVERTED = "diffusers' script that converts the released weights"
LTX: dict[str, Any] = {
    "pipeline": "LTXPipeline",
    "denoiser": "LTXVideoTransformer3DModel",
    "text": functools.partial(usual_text, width="caption_channels", tokens=128),
    "clips": {TINY: (256, 256, 25), SMALL: (256, 256, 25), FULL: (512, 704, 161)},
    "cfg": 3.0,
    "frames": 8,
    "modular": "diffusers.modular_pipelines.ltx.modular_blocks_ltx.LTXBlocks",
    "reference": ("LTXVideo/pipeline_stg_ltx.py", "LTXSTGPipeline"),
}
NARROW_MOCHI = alike(narrowed(pooled_projection_dim=128, text_embed_dim=344)[SMALL])
NARROW_LTX = alike(narrowed("cross_attention_dim", "caption_channels")[SMALL])
NARROW_LTX2 = alike(
    {
        **{"num_attention_heads": 4, "attention_head_dim": 64, "audio_num_attention_heads": 4},
        **{"audio_attention_head_dim": 32, "cross_attention_dim": 256, "audio_cross_attention_dim": 128},
        "caption_channels": 256,
    }
)
COGVIDEOX: dict[str, Any] = {
    "pipeline": "CogVideoXPipeline",
    "denoiser": "CogVideoXTransformer3DModel",
    "text": functools.partial(usual_text, width="text_embed_dim", tokens=226),
    "clips": {TINY: (192, 192, 9), SMALL: (128, 128, 9), FULL: (480, 720, 49)},
    "source": CONVERTED,
    "scheduler": "CogVideoXDDIMScheduler",
    "cfg": 6.0,
}
NARROW_COGVIDEOX = narrowed("text_embed_dim", time_embed_dim=128)
WAN: dict[str, Any] = {
    "pipeline": "WanPipeline",
    "denoiser": "WanTransformer3DModel",
    "text": functools.partial(usual_text, width="text_dim", tokens=512, fewer=128),
    "source": CONVERTED,
    "cfg": 5.0,
    "modular": "diffusers.modular_pipelines.wan.modular_blocks_wan.WanBlocks",
}
NARROW_WAN = {size: {**HEADS[size], "text_dim": WIDTH[size], "ffn_dim": 4 * WIDTH[size]} for size in WIDTH}
MODELS = {
    "mochi": Model(
        pipeline="MochiPipeline",
        denoiser="MochiTransformer3DModel",
        layers={TINY: 5, FULL: 34},
        text=functools.partial(usual_text, width="text_embed_dim", tokens=256),
        frames=6,
        clips={TINY: (192, 192, 7), SMALL: (192, 192, 13), FULL: (480, 848, 31), LARGEST: (480, 848, 163)},
        narrow=shallow(NARROW_MOCHI, num_layers=8),
        reference=("Mochi/pipeline_stg_mochi.py", "MochiSTGPipeline"),
    ),
    "ltx-2b": Model(layers={TINY: 4, FULL: 19}, narrow=shallow(NARROW_LTX, num_layers=7), **LTX),
    "ltx-13b": Model(
        layers={TINY: 8, FULL: 34},
        narrow=shallow(NARROW_LTX, num_layers=12),
        config={"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        **{**LTX, "source": "the transformer's config.json of LTX-Video 0.9.7"},
    ),
    "ltx-2": Model(
        pipeline="LTX2Pipeline",
        denoiser="LTX2VideoTransformer3DModel",
        layers={TINY: 3, FULL: 28},
        text=functools.partial(usual_text, width="caption_channels", tokens=1024, fewer=128),
        clips={TINY: (384, 384, 25), SMALL: (256, 256, 25), FULL: (512, 768, 121)},
        # The pipeline's perturbed pass needs this to have an effect.
        config={"perturbed_attn": True},
        narrow=shallow(NARROW_LTX2, num_layers=4),
        source=CONVERTED + ", version 2.0",
        guidance=lambda layer: None,
        given=lambda layer: {"spatio_temporal_guidance_blocks": [layer]},
        cfg=3.0,
        prepare=connected_text,
        frames=8,
    ),
    "cogvideox-2b": Model(layers={TINY: 6, FULL: 21}, narrow=shallow(NARROW_COGVIDEOX, num_layers=9), **COGVIDEOX),
    "cogvideox-5b": Model(
        layers={TINY: 9, FULL: 30},
        narrow=shallow(NARROW_COGVIDEOX, num_layers=13),
        config={"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        **COGVIDEOX,
    ),
    "hunyuan-video": Model(
        pipeline="HunyuanVideoPipeline",
        denoiser="HunyuanVideoTransformer3DModel",
        layers={TINY: 10, FULL: 42},
        text=hunyuan_text,
        clips={TINY: (160, 160, 9), SMALL: (128, 128, 9), FULL: (720, 1280, 61), LARGEST: (720, 1280, 129)},
        narrow=shallow(
            narrowed("text_embed_dim", rope_axes_dim=(16, 24, 24), pooled_projection_dim=64),
            num_layers=5,
            num_single_layers=10,
        ),
        source=CONVERTED,
    ),
    "wan-1.3b": Model(
        layers={TINY: 10, FULL: 21},
        clips={TINY: (128, 128, 9), SMALL: (128, 128, 9), FULL: (480, 832, 81)},
        narrow=shallow(NARROW_WAN, num_layers=15),
        config={"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        **WAN,
    ),
    "wan-14b": Model(
        layers={TINY: 14, FULL: 28},
        clips={TINY: (128, 128, 9), SMALL: (128, 128, 9), FULL: (480, 832, 81), LARGEST: (720, 1280, 81)},
        narrow=shallow(NARROW_WAN, num_layers=20),
        **WAN,
    ),
    "svd": Model(
        pipeline="StableVideoDiffusionPipeline",
        denoiser="UNetSpatioTemporalConditionModel",
        layers={TINY: 5, FULL: 8},
        text=no_text,
        clips={TINY: (256, 256, 2), SMALL: (192, 192, 8), FULL: (576, 1024, 14), LARGEST: (576, 1024, 25)},
        # With few pixels and many channels, reading the weights takes longer than computing.
        narrow=shallow(
            alike(NARROW_UNET), block_out_channels=(64,) * 4, num_attention_heads=(1,) * 4, layers_per_block=1
        ),
        guidance=lambda layer: Guidance(
            [Perturbation([layer], kind="attention", axis=axis) for axis in ("spatial", "temporal")]
        ),
        cfg=3.0,
        scheduler="EulerDiscreteScheduler",
        prepare=encoded_image,
        part="unet",
        frames=1,
    ),
}
