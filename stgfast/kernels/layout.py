"""Rows as slices, memory orders, number types, and copies to a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def spans(groups: Sequence[int], size: int) -> list[slice]:
    """Groups of `size` rows as slices, with neighbors merged: `[0, 1, 3]` of size 2 is `[0:4]` and `[6:8]`."""
    merged: list[slice] = []
    for group in groups:
        start, stop = group * size, (group + 1) * size
        if merged and merged[-1].stop == start:
            merged[-1] = slice(merged[-1].start, stop)
        else:
            merged.append(slice(start, stop))
    return merged


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, copied to a device once and not with each launch."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments of torch's attention as autocast changes them, if it is on."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def empty_like_query(q: Tensor, rows: int) -> Tensor:
    """An output in the memory order of `q`: heads outside of tokens, or inside."""
    _, heads, queries, size = q.shape
    if q.stride(1) < q.stride(2):  # (rows, tokens, heads, size)
        return q.new_empty(rows, queries, heads, size).transpose(1, 2)
    return q.new_empty(rows, heads, queries, size)
