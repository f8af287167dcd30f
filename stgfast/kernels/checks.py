"""Checks of a call, made on the host from shapes and types only, before anything is computed or launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SIZE = 256  # of a head
MOST_BRANCHES = 8


class Projection(NamedTuple):
    """The difference of branch `of` from branch 0 loses its part along a sum of branches, except for a fraction."""

    of: int
    along: tuple[float, ...]  # the direction: one number for each branch
    left: float = 0.0


def expected(what: str, got: object, right: str) -> ValueError:
    return ValueError(f"{what}: got {got}, expected {right}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    identity: Sequence[bool],
    *,
    kv_len: Tensor | Sequence[int] | None,
    bias: Tensor | None,
    source: Sequence[int],
    tokens: tuple[int, int],
    scale: float,
) -> None:
    if not 0 < scale < math.inf:
        raise expected("scale", scale, "a finite number above 0")
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
    if isinstance(kv_len, Sequence):
        if len(kv_len) != rows or not all(0 <= length <= k.shape[2] for length in kv_len):
            raise expected("kv_len", list(kv_len), f"{rows} numbers from 0 to {k.shape[2]}")
    elif kv_len is not None:
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


def check_combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    project: Projection | None,
    dtype: torch.dtype | None,
) -> None:
    if not 1 <= len(branches) <= MOST_BRANCHES:
        raise expected("branches", len(branches), f"1 to {MOST_BRANCHES}")
    base = branches[0]
    if not base.ndim or not base.numel():
        raise expected("shape of branches[0]", tuple(base.shape), "(prompts, ...), not empty")
    if not base.is_floating_point():
        raise expected("dtype of branches[0]", base.dtype, "a floating point type")
    for b, branch in enumerate(branches):
        _check_like(base, f"branches[{b}]", branch)
        if branch.dtype != base.dtype:
            raise expected(f"dtype of branches[{b}]", branch.dtype, f"{base.dtype}, as branches[0]")
    if len(weights) != len(branches):
        raise expected("weights", len(weights), f"{len(branches)}, one for every branch")
    if not abs(sum(weights) - 1.0) <= 1e-6 * sum(map(abs, weights)):
        raise expected("weights", f"a sum of {sum(weights)}", "1")
    if dtype is not None and not dtype.is_floating_point:
        raise expected("dtype", dtype, "a floating point type")
    if project is not None:
        if not 1 <= project.of < len(branches):
            raise expected("`of` of a projection", project.of, f"a branch from 1 to {len(branches) - 1}")
        numbers = [*project.along, project.left]
        if len(project.along) != len(branches) or not all(map(math.isfinite, numbers)):
            raise expected("projection", tuple(project), "a finite number for every branch, and a finite share")


def _check_like(base: Tensor, what: str, tensor: Tensor) -> None:
    if tensor.shape != base.shape:
        raise expected(f"shape of {what}", tuple(tensor.shape), f"{tuple(base.shape)}, as branches[0]")
    if tensor.device != base.device:
        raise expected(f"device of {what}", tensor.device, f"{base.device}, as branches[0]")


def check_blur(x: Tensor, grid: tuple[int, int, int], sigma: float, *, first: int) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise expected("x", f"{tuple(x.shape)}, {x.dtype}", "(rows, tokens, channels) of a floating point type")
    if len(grid) != 3 or min(grid) < 1:
        raise expected("grid", grid, "frames, height and width, each 1 or more")
    if first < 0 or first + math.prod(grid) > x.shape[1]:
        raise expected("grid and first", (grid, first), f"a range within {x.shape[1]} tokens")
    if not sigma > 0:
        raise expected("sigma", sigma, "a number above 0, or infinity")
