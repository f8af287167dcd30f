"""Memory orders."""

from __future__ import annotations

from torch import Tensor


def empty_like_query(q: Tensor, rows: int) -> Tensor:
    """An output in the memory order of `q`: heads outside of tokens, or inside."""
    _, heads, queries, size = q.shape
    if q.stride(1) < q.stride(2):  # (rows, tokens, heads, size)
        return q.new_empty(rows, queries, heads, size).transpose(1, 2)
    return q.new_empty(rows, heads, queries, size)
