"""Attention over a stack of rows in one Triton launch, for Hopper: tiles come by TMA, and warps are specialised.

One warp group fetches tiles of keys and values while two others multiply, each with half of a program's queries. The
compiler makes them out of a plain loop, and on this chip does so only where a program asks for four warps, descriptors
are made on the device, one loop holds every product, and no program returns early. It has never run on a GPU.

The operation is that of `stgfast.kernels.attention`, for fewer calls: `unsuitable` says which it does not take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgfast.kernels.attention import LOG2_E, Config, _on_device, capability, padded
from stgfast.kernels.checks import expected
from stgfast.kernels.layout import empty_like_query

MAX_SIZE = 128  # of a head: two groups of warps have no registers for a larger output
ALIGNED = 16  # bytes, to which TMA wants the beginning of every row


@triton.jit
def attention_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    source_ptr,
    identity_ptr,
    kv_len_ptr,
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
    TAIL: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    HAS_KV_LEN: tl.constexpr,
):
    """grid (query tiles * heads * rows); `first` to `last` is the range of tokens that an identity row copies."""
    tiles = tl.cdiv(queries, M)
    program = tl.program_id(0)
    start_m = (program % tiles) * M
    head = (program // tiles % heads).to(tl.int64)
    row = (program // (tiles * heads)).to(tl.int64)
    src = tl.load(source_ptr + row).to(tl.int64)

    rows_m = tl.arange(0, M)
    offs_m = start_m + rows_m
    offs_d = tl.arange(0, DIM)
    d_ok = (offs_d < D)[None, :]
    wide_m = tl.cast(start_m, tl.int64)
    out = out_ptr + row * sob + head * soh + wide_m * son + (rows_m[:, None] * son + offs_d[None, :])
    v_head = v_ptr + src * svb + head * svh

    attends = offs_m < queries
    some_attend = True
    if HAS_IDENTITY:
        # A row that attends has an empty range; a branch of its own would keep the compiler from specialising warps.
        same = tl.load(identity_ptr + row) != 0
        begin = tl.where(same, first, 0)
        end = tl.where(same, last, 0)
        copies = attends & (offs_m >= begin) & (offs_m < end)
        where = copies[:, None] & d_ok
        values = v_head + wide_m * svn + (rows_m[:, None] * svn + offs_d[None, :])
        tl.store(out, tl.load(values, mask=where), mask=where)
        attends = attends & ((offs_m < begin) | (offs_m >= end))
        some_attend = (start_m < begin) | (tl.minimum(start_m + M, queries) > end)

    if some_attend:
        keys = all_keys
        if HAS_KV_LEN:
            keys = tl.minimum(tl.maximum(tl.load(kv_len_ptr + src), 0), all_keys).to(tl.int32)
        # What lies beyond `keys`, or beyond D, arrives as 0. No descriptor may be empty.
        reach = tl.maximum(keys, 1)
        q_tiles = tl.make_tensor_descriptor(q_ptr + src * sqb + head * sqh, [queries, D], [sqn, 1], [M, DIM])
        k_tiles = tl.make_tensor_descriptor(k_ptr + src * skb + head * skh, [reach, D], [skn, 1], [N, DIM])
        v_tiles = tl.make_tensor_descriptor(v_head, [reach, D], [svn, 1], [N, DIM])
        q = q_tiles.load([start_m, 0])  # [M, DIM]
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DIM], tl.float32)
        for start in tl.range(0, keys, N, warp_specialize=True):
            k = k_tiles.load([start, 0])  # [N, DIM]
            scores = tl.dot(q, k.T)  # [M, N]
            if TAIL:
                scores = tl.where((start + tl.arange(0, N) < keys)[None, :], scores, float("-inf"))
            # Every tile has a key, so no maximum is -inf; the scale is positive: maximum and it commute.
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            p = tl.math.exp2(scores * scale - new_top[:, None])
            keep = tl.math.exp2(top - new_top)
            total = total * keep + tl.sum(p, 1)
            v = v_tiles.load([start, 0])  # [N, DIM]
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
            top = new_top
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives 0
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=attends[:, None] & d_ok)
