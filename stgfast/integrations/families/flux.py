"""Flux: images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.scales import live_true_cfg_scale, true_cfg_scale
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments, even_sigmas, shifted
from stgfast.perturbation import Perturbation


def size(call: CallArguments, denoiser: Arguments, block: Arguments) -> tuple[int, int, int]:
    """The latents reach the denoiser already in patches of two by two."""
    pipe = call["self"]
    asked = (call[name] or pipe.default_sample_size * pipe.vae_scale_factor for name in ("height", "width"))
    height, width = (int(pixels) // (2 * pipe.vae_scale_factor) for pixels in asked)
    return 1, height, width


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    size = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = ((call[name] or size) // (2 * pipe.vae_scale_factor) for name in ("height", "width"))
    return {**even_sigmas(pipe, call), **shifted(pipe, height * width, 256, 4096, 0.5, 1.15)}


FLUX = Adapter(
    pipeline="FluxPipeline",
    protocol="embedded",
    blocks=Blocks(
        lists=("transformer_blocks", "single_transformer_blocks"),
        state=("encoder_hidden_states", "hidden_states"),
        rows=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "guidance",
                "temb",
                "joint_attention_kwargs",
            }
        ),
        attention="attn",
        grid=Grid(size, last=True),
    ),
    requested=true_cfg_scale,
    cfg_on="true_cfg_scale above 1 and a negative_prompt, or both of its embeds",
    live=live_true_cfg_scale,
    schedule=schedule,
    # A late one of its 57 blocks.
    defaults=Guidance(Perturbation([40], scale=1.0)),
)
