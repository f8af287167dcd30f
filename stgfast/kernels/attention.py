"""Attention over a stack of rows, some of which are the identity, in one Triton launch.

Program order: the query tiles of one head of one row are neighbors, so programs in flight share its keys and values in
L2. A program of an identity row copies its tile of V and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgfast.kernels.layout import empty_like_query, on_device

LOG2_E = 1.4426950408889634
NO_BIAS, MASK, ADDED = 0, 1, 2  # what `bias` is: None, a boolean mask, or numbers to add


@triton.jit
def _tile(
    acc,
    total,
    top,
    q,
    k_head,
    v_head,
    bias_head,
    start,
    keys,
    q_ok,
    scale,
    skn,
    svn,
    sbm,
    sbn,
    D: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    PER_QUERY: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One tile of keys: acc [M, DIM], total [M] and top [M] are the running output, sum and maximum (base 2)."""
    offs_n = tl.arange(0, N)
    offs_d = tl.arange(0, DIM)
    key_ok = start + offs_n < keys  # [N]
    kv_ok = key_ok[:, None] & (offs_d < D)[None, :]
    wide = tl.cast(start, tl.int64)
    k_tile = k_head + wide * skn + (offs_n[:, None] * skn + offs_d[None, :])
    if DIM == D and not TAIL:
        k = tl.load(k_tile)  # [N, DIM]
    else:
        k = tl.load(k_tile, mask=kv_ok, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if BIAS == 0 and not TAIL:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # the scale is positive, so it commutes with the maximum
        p = tl.math.exp2(scores * scale - new_top[:, None])
        keep = tl.math.exp2(top - new_top)
    else:
        scores = scores * scale
        ok = key_ok[None, :]
        if BIAS != 0:
            bias_tile = bias_head + wide * sbn + offs_n[None, :] * sbn  # [1, N]
            bias_ok = ok
            if PER_QUERY:
                bias_tile += tl.arange(0, M)[:, None] * sbm  # [M, N]
                bias_ok = ok & q_ok[:, None]
            bias = tl.load(bias_tile, mask=bias_ok, other=0)
            if BIAS == 1:
                ok = ok & (bias != 0)
            else:
                scores += bias.to(tl.float32) * 1.4426950408889634
        scores = tl.where(ok, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a query without keys so far
        p = tl.math.exp2(scores - base[:, None])
        keep = tl.math.exp2(top - base)
    total = total * keep + tl.sum(p, 1)
    v_tile = v_head + wide * svn + (offs_n[:, None] * svn + offs_d[None, :])
    if DIM == D and not TAIL:
        v = tl.load(v_tile)  # [N, DIM]
    else:
        v = tl.load(v_tile, mask=kv_ok, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    source_ptr,
    identity_ptr,
    kv_len_ptr,
    bias_ptr,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    svb,
    svh,
    svn,
    sob,
    soh,
    son,
    sbb,
    sbh,
    sbm,
    sbn,
    heads,
    queries,
    all_keys,
    first,
    last,
    scale,
    D: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    PER_QUERY: tl.constexpr,
    LAST_APART: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    HAS_KV_LEN: tl.constexpr,
):
    """grid (query tiles * heads * rows); identity rows copy the tokens from `first` to `last`."""
    tiles = tl.cdiv(queries, M)
    program = tl.program_id(0)
    start_m = (program % tiles) * M
    head = (program // tiles % heads).to(tl.int64)
    row = (program // (tiles * heads)).to(tl.int64)
    src = tl.load(source_ptr + row).to(tl.int64)

    # Base pointers have 64 bits, one for each program. Offsets within a tile fit into 32 bits.
    rows_m = tl.arange(0, M)
    offs_m = start_m + rows_m
    offs_d = tl.arange(0, DIM)
    d_ok = offs_d < D
    q_ok = offs_m < queries
    wide_m = tl.cast(start_m, tl.int64)
    out = out_ptr + row * sob + head * soh + wide_m * son + (rows_m[:, None] * son + offs_d[None, :])
    k_head = k_ptr + src * skb + head * skh
    v_head = v_ptr + src * svb + head * svh

    if HAS_IDENTITY:
        # A row that attends has an empty range. A return in another branch does not compile before triton 3.4.
        same = tl.load(identity_ptr + row) != 0
        begin = tl.where(same, first, 0)
        end = tl.where(same, last, 0)
        # Stored before anything is accumulated: kept until the end, V would take registers throughout the loop.
        copies = q_ok & (offs_m >= begin) & (offs_m < end)
        where = copies[:, None] & d_ok[None, :]
        values = v_head + wide_m * svn + (rows_m[:, None] * svn + offs_d[None, :])
        tl.store(out, tl.load(values, mask=where), mask=where)
        if (start_m >= begin) & (tl.minimum(start_m + M, queries) <= end):
            return

    q_tile = q_ptr + src * sqb + head * sqh + wide_m * sqn + (rows_m[:, None] * sqn + offs_d[None, :])
    q = tl.load(q_tile, mask=q_ok[:, None] & d_ok[None, :], other=0.0)
    bias_head = bias_ptr + src * sbb + head * sbh + wide_m * sbm
    keys = all_keys
    if HAS_KV_LEN:
        keys = tl.minimum(tl.maximum(tl.load(kv_len_ptr + src), 0), all_keys).to(tl.int32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    # Masks for the last tile only are cheaper, but its copy of the loop body takes registers.
    whole = keys // N * N if LAST_APART else keys
    for start in tl.range(0, whole, N):
        acc, total, top = _tile(
            acc, total, top, q, k_head, v_head, bias_head, start, keys, q_ok, scale, skn, svn, sbm, sbn,
            D, DIM, M, N, BIAS, PER_QUERY, not LAST_APART,
        )  # fmt: skip
    if LAST_APART:
        if whole < keys:
            acc, total, top = _tile(
                acc, total, top, q, k_head, v_head, bias_head, whole, keys, q_ok, scale, skn, svn, sbm, sbn,
                D, DIM, M, N, BIAS, PER_QUERY, True,
            )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives 0
    attends = q_ok
    if HAS_IDENTITY:
        attends = q_ok & ((offs_m < begin) | (offs_m >= end))
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=attends[:, None] & d_ok[None, :])


class Config(NamedTuple):
    """Sizes of a launch: tiles of queries and keys, warps, pipeline stages, and whether the last tile has code of
    its own.
    """

    m: int
    n: int
    warps: int
    stages: int
    last_apart: bool = False


def config(dim: int, bits: int, bias: int, per_query: bool, major: int) -> Config:
    """A configuration that spills no registers at the sizes of video models on a chip of this compute capability,
    and hardly any at other sizes; `bench/resources.py` measures it.

    `dim` is the padded size of a head, `per_query` whether the bias differs between queries.
    """
    if bits == 32:  # no matrix instructions: float32 is exact here
        return Config(32, 32, 8, 2) if dim <= 64 else Config(32, 16, 8, 2) if dim <= 128 else Config(16, 16, 8, 2)
    if dim > 128:
        return Config(64, 32, 8, 2) if major < 9 or bias else Config(64, 64, 8, 2)
    if bias == NO_BIAS:
        return Config(128, 64, 8, 3, last_apart=major >= 9 or dim <= 64)
    if dim <= 64:
        return Config(128, 64, 8, 2)
    if per_query:
        return Config(64, 32, 8, 2)
    return Config(128, 64 if major >= 9 else 32, 8, 2)


INTERPRETED = 9  # the compute capability that the interpreter uses


def capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else INTERPRETED


def padded(size: int) -> int:
    """The size of a head in tiles: a power of two, at least what a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(size)))


@torch.library.custom_op("stgfast::masked_attention", mutates_args=())
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    identity: Sequence[bool],
    source: Sequence[int],
    tokens: Sequence[int],
    kv_len: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The operation as `stgfast.kernels.masked_attention` calls it: checked, with every option given."""
    rows, (_, heads, queries, size) = len(source), q.shape
    out = empty_like_query(q, rows)
    if not out.numel():
        return out
    kind = NO_BIAS if bias is None else MASK if bias.dtype == torch.bool else ADDED
    numbers = q if bias is None else bias.view(torch.uint8) if kind == MASK else bias
    strides = (0, 0, 0, 0) if bias is None else bias.expand(q.shape[0], heads, queries, k.shape[2]).stride()
    per_query = strides[2] != 0
    dim = padded(size)
    cut = config(dim, 8 * q.element_size(), kind, per_query, capability(q.device))
    sources = on_device(tuple(source), torch.int32, q.device)
    with torch.cuda.device_of(out):
        attention_kernel[(triton.cdiv(queries, cut.m) * heads * rows,)](
            q,
            k,
            v,
            out,
            sources,
            on_device(tuple(identity), torch.int8, q.device) if any(identity) else sources,
            sources if kv_len is None else kv_len,
            numbers,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *strides,
            heads,
            queries,
            k.shape[2],
            *tokens,
            scale * LOG2_E,
            D=size,
            DIM=dim,
            M=cut.m,
            N=cut.n,
            BIAS=kind,
            PER_QUERY=per_query,
            LAST_APART=cut.last_apart,
            HAS_IDENTITY=any(identity),
            HAS_KV_LEN=kv_len is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out


@masked_attention.register_fake
def result_of(q: Tensor, k: Tensor, v: Tensor, identity: Sequence[bool], source: Sequence[int], *_: object) -> Tensor:
    """The shape and type of the result, for graphs."""
    return empty_like_query(q, len(source))
