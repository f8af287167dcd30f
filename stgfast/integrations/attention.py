"""Self-attention as the identity, for the attention modules of diffusers: every token's output is its own V.

No query, no key, no attention: the value projection and the output projection are all that is left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def identity_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *others: Any,
    **named: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The call of an attention module, joint over text or not; what only queries and keys need is not looked at."""
    video = project(getattr(attn, "to_out", None), attn.to_v(hidden_states))
    if encoder_hidden_states is None:
        return video
    added = getattr(attn, "add_v_proj", None)
    if added is None:  # text goes through the projections of the video
        return video, project(getattr(attn, "to_out", None), attn.to_v(encoder_hidden_states))
    return video, project(getattr(attn, "to_add_out", None), added(encoder_hidden_states))


def project(out: Any, value: Tensor) -> Tensor:
    """An output projection: none, a layer, or a list of layers."""
    if out is None:
        return value
    for layer in out if hasattr(out, "__iter__") else (out,):
        value = layer(value)
    return value
