"""Memory orders, and what is brought to a device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, brought to a device once and not with every launch."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def empty_like_query(q: Tensor, rows: int) -> Tensor:
    """An output in the memory order of `q`: heads outside of tokens, or inside."""
    _, heads, queries, size = q.shape
    if q.stride(1) < q.stride(2):  # (rows, tokens, heads, size)
        return q.new_empty(rows, queries, heads, size).transpose(1, 2)
    return q.new_empty(rows, heads, queries, size)
