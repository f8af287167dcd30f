"""Mochi 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stgfast.batching.layout import Blocks, Grid
from stgfast.batching.rows import spans, take
from stgfast.batching.values import project
from stgfast.guidance import Guidance
from stgfast.integrations.clips import Clips
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments
from stgfast.kernels import masked_attention
from stgfast.presets import PRESETS


def attend(
    attn: Any,
    masked: Sequence[bool],
    source: Sequence[int],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Joint attention for all rows in one call. The model's own code runs row by row, and reads from the device how
    many text tokens are valid. Here valid tokens are moved to the front, so that they are the first keys of a
    row, and the outputs of the others are zero, as in the model. Output row b is computed from input row
    `source[b]`.
    """
    order = torch.argsort(attention_mask.logical_not().to(torch.uint8), dim=1, stable=True)
    count = attention_mask.sum(dim=1, dtype=torch.int32)
    text = encoder_hidden_states.take_along_dim(order[..., None], dim=1)
    video = hidden_states.shape[1]

    def joined(of_video: Any, of_text: Any, norm: Any, added_norm: Any, rotate: bool) -> Tensor:
        one, other = (of(x).unflatten(2, (attn.heads, -1)) for of, x in ((of_video, hidden_states), (of_text, text)))
        one, other = one if norm is None else norm(one), other if added_norm is None else added_norm(other)
        return torch.cat([_rotated(one, *image_rotary_emb) if rotate else one, other], dim=1).transpose(1, 2)

    out = masked_attention(
        joined(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q, True),
        joined(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k, True),
        joined(attn.to_v, attn.add_v_proj, None, None, False),
        masked,
        source=source,
        kv_len=count + video,
    )
    out = out.transpose(1, 2).flatten(2)
    valid = torch.arange(text.shape[1], device=text.device) < count[:, None]
    valid = take(valid, spans(source, 1), len(valid), "attention_mask")
    text = out[:, video:] * valid[..., None].to(out.dtype)
    return project(attn.to_out, out[:, :video]), project(getattr(attn, "to_add_out", None), text)


def identity(attn: Any, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    rows = len(hidden_states)
    return attend(attn, [True] * rows, range(rows), hidden_states, *args, **named)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighboring channels as pairs, by an angle for each token and head."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    return {"sigmas": np.array(linear_quadratic_schedule(call["num_inference_steps"], 0.025))}


MOCHI = Adapter(
    pipeline="MochiPipeline",
    protocol="stacked",
    clips=Clips(fps=30.0),
    blocks=Blocks(
        lists=("transformer_blocks",),
        state=("hidden_states", "encoder_hidden_states"),
        rows=frozenset(
            {"hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "temb", "attention_mask"}
        ),
        identity=identity,
        attend=attend,
        processor="MochiAttnProcessor2_0",
        grid=Grid(patches),
    ),
    float32=True,
    schedule=schedule,
    defaults=Guidance.preset("mochi"),
    source=PRESETS["mochi"].source,
)
