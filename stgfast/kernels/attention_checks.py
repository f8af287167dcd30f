"""What a call of attention may not be: found on the host, from shapes alone, before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SIZE = 256


def expected(what: str, got: object, right: str) -> ValueError:
    return ValueError(f"{what}: got {got}, expected {right}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    identity: Sequence[bool],
    *,
    kv_len: Tensor | None,
    bias: Tensor | None,
    source: Sequence[int],
    tokens: tuple[int, int],
) -> None:
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise expected(f"shape of {name}", tuple(tensor.shape), "(rows, heads, tokens, size)")
        if tensor.dtype not in (*DTYPES, torch.float64) or tensor.dtype != q.dtype:
            raise expected(f"dtype of {name}", tensor.dtype, f"that of q, one of {', '.join(map(str, DTYPES))}")
        if tensor.device != q.device:
            raise expected(f"device of {name}", tensor.device, f"{q.device}, as q")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise expected(f"last stride of {name}", tensor.stride(-1), "1")
    rows, heads, queries, size = q.shape
    if not 1 <= size <= MAX_SIZE:
        raise expected("size of a head", size, f"1 to {MAX_SIZE}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != size:
        raise expected("shape of k", tuple(k.shape), f"({rows}, {heads}, keys, {size}), as q")
    if v.shape != k.shape:
        raise expected("shape of v", tuple(v.shape), f"{tuple(k.shape)}, as k")
    wrong = [row for row in source if not 0 <= row < rows]
    if not source or wrong:
        raise expected("source", list(source), f"rows of q, from 0 to {rows - 1}")
    if len(identity) != len(source):
        raise expected("identity", f"{len(identity)} flags", f"{len(source)}, one for every output row")
    if not 0 <= tokens[0] < tokens[1] <= queries:
        raise expected("tokens", tokens, f"first and one past last, within 0 and {queries}")
    if any(identity) and k.shape[2] != queries:
        raise expected("keys, where a row is the identity", k.shape[2], f"{queries}, as many as queries")
    if kv_len is not None:
        if kv_len.shape != (rows,) or kv_len.dtype != torch.int32 or kv_len.device != q.device:
            got = f"{tuple(kv_len.shape)}, {kv_len.dtype}, {kv_len.device}"
            raise expected("kv_len", got, f"({rows},), torch.int32, {q.device}")
    if bias is not None:
        full = (rows, heads, queries, k.shape[2])
        given = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        fits = len(given) == 4 and given[3] == full[3] and all(a in (1, b) for a, b in zip(given, full, strict=True))
        if not fits:
            raise expected("shape of bias", tuple(bias.shape), f"{full}, or 1 for rows, heads or queries")
        if bias.dtype != torch.bool and not bias.is_floating_point():
            raise expected("dtype of bias", bias.dtype, "torch.bool, or a floating point type")
        if bias.device != q.device:
            raise expected("device of bias", bias.device, f"{q.device}, as q")
