"""Self-attention as the identity, for diffusers' attention modules: the output of each token is its V.

No query, key or attention is computed: only the value and output projections.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stgfast.batching.sdpa import Scores, answering
from stgfast.batching.seam import as_written, handling
from stgfast.errors import EngineError


class UnseenError(EngineError):
    """An attention module made no call of scaled dot product attention that could be replaced."""


def identity_attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *others: Any,
    **named: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The call of an attention module, joint over text or not, without what only queries and keys need."""
    video = project(getattr(attn, "to_out", None), values(attn, hidden_states))
    if encoder_hidden_states is None:
        return video
    if getattr(attn, "add_v_proj", None) is None:  # text uses the projections of the video
        return video, project(getattr(attn, "to_out", None), values(attn, encoder_hidden_states))
    added = values(attn, encoder_hidden_states, "to_added_qkv", "add_v_proj")
    return video, project(getattr(attn, "to_add_out", None), added)


def identity_of_scores(attn: Any, *args: Any, **named: Any) -> Any:
    """The same, for any attention module that calls torch's attention: it runs as it is, queries and keys included, and
    only the attention itself returns V.
    """
    seen = list[Tensor]()

    def value(scores: Scores) -> Tensor:
        seen.append(scores.v)
        return scores.v

    with handling(None), answering(attn, value):
        output = as_written(attn)(*args, **named)
    if not seen:
        raise UnseenError(
            f"attention processor of {type(attn).__name__}: got {type(getattr(attn, 'processor', None)).__name__}, "
            f"expected one that calls torch's scaled_dot_product_attention or an attention backend of diffusers"
        )
    return output


def values(attn: Any, tokens: Tensor, fused: str = "to_qkv", alone: str = "to_v") -> Tensor:
    """V, by the projection that the module uses. After `fuse_qkv_projections()` only one of two may have a LoRA."""
    together = getattr(attn, fused, None) if getattr(attn, "fused_projections", False) else None
    made: Tensor = getattr(attn, alone)(tokens) if together is None else together(tokens).chunk(3, dim=-1)[2]
    return made


def project(out: Any, value: Tensor) -> Tensor:
    """Apply an output projection: None, a layer, or a list of layers."""
    if out is None:
        return value
    for layer in out if hasattr(out, "__iter__") else (out,):
        value = layer(value)
    return value
