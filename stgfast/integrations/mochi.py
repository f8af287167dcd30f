"""Mochi 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.attention import project
from stgfast.integrations.spec import Adapter


def identity(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, **named: Any
) -> tuple[Tensor, Tensor]:
    """As everywhere, but Mochi's attention gives padded text tokens an output of zero."""
    text = attn.add_v_proj(encoder_hidden_states) * attention_mask.unsqueeze(-1).to(encoder_hidden_states.dtype)
    video = project(attn.to_out, attn.to_v(hidden_states))
    return video, project(getattr(attn, "to_add_out", None), text)


MOCHI = Adapter(
    pipeline="MochiPipeline",
    protocol="stacked",
    blocks=("transformer_blocks",),
    state=("hidden_states", "encoder_hidden_states"),
    rows=frozenset(
        {"hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "temb", "attention_mask"}
    ),
    attention="attn1",
    identity=identity,
    defaults=Guidance(Perturbation([34], scale=1.0)),
)
