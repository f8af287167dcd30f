"""Attention over a stack of rows in one Triton launch for Hopper: TMA loads tiles, and warps are specialized.

The operation is that of `stgfast.kernels.attention`, for fewer calls: `unsuitable` says which it does not take.

One group of warps loads tiles, two others compute, each with half of a program's queries. The compiler makes these
groups on this chip only if a program asks for four warps, makes its descriptors on the device, has all products in one
loop, and does not return early. It was compiled for the chip and run in the interpreter, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgfast.kernels.attention import LOG2_E, Config, capability, padded, result_of
from stgfast.kernels.layout import empty_like_query, on_device

DTYPES = (torch.float16, torch.bfloat16)
HOPPER = 9  # its compute capability
MAX_SIZE = 128  # of a head
ALIGNED = 16  # bytes: the alignment of rows for TMA


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
    """grid (query tiles * heads * rows); identity rows copy the tokens from `first` to `last`."""
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
    any_attends = True
    if HAS_IDENTITY:
        # A row that attends copies an empty range. Both computing groups copy the whole tile: the compiler only
        # halves what belongs to a product.
        same = tl.load(identity_ptr + row) != 0
        begin = tl.where(same, first, 0)
        end = tl.where(same, last, 0)
        copies = attends & (offs_m >= begin) & (offs_m < end)
        where = copies[:, None] & d_ok
        values = v_head + wide_m * svn + (rows_m[:, None] * svn + offs_d[None, :])
        tl.store(out, tl.load(values, mask=where), mask=where)
        attends = attends & ((offs_m < begin) | (offs_m >= end))
        any_attends = (start_m < begin) | (tl.minimum(start_m + M, queries) > end)

    if any_attends:
        keys = all_keys
        if HAS_KV_LEN:
            keys = tl.minimum(tl.maximum(tl.load(kv_len_ptr + src), 0), all_keys).to(tl.int32)
        # Elements beyond a descriptor's shape, keys or D, are read as 0. The shape may not be empty.
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
            # Each tile has a key, so no maximum is -inf. The scale is positive, so it commutes with the maximum.
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            p = tl.math.exp2(scores * scale - new_top[:, None])
            keep = tl.math.exp2(top - new_top)
            total = total * keep + tl.sum(p, 1)
            v = v_tiles.load([start, 0])  # [N, DIM]
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
            top = new_top
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys gives 0
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=attends[:, None] & d_ok)


def config(dim: int) -> Config:
    """A configuration that fits the chip and spills nothing: `bench/resources.py`. The number of stages is a power
    of two, because their ring would otherwise need divisions.

    `dim` is the padded size of a head.
    """
    return Config(128, 128, 4, 4 if dim <= 64 else 2)


def unsupported(device: torch.device) -> str:
    """Why it cannot run on a device, as the end of a sentence that begins with "it"; "" if it can."""
    if not hasattr(tl, "make_tensor_descriptor"):
        return f"needs triton 3.4 or later, not {triton.__version__}"
    major = capability(device)
    return "" if major == HOPPER else f"needs compute capability {HOPPER}, not {major}"


def unsuitable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """Why it cannot compute a call, as the end of a sentence that begins with "it"; "" if it can."""
    reason, width, size = unsupported(q.device), q.element_size(), q.shape[-1]
    if reason:
        return reason
    if bias is not None:
        return "takes no mask and no bias"
    if q.dtype not in DTYPES:
        return f"takes {' and '.join(map(str, DTYPES))}, not {q.dtype}"
    if size > MAX_SIZE or size * width % ALIGNED:
        return f"takes sizes of a head that are multiples of {ALIGNED // width} up to {MAX_SIZE}, not {size}"
    apart = [name for name, tensor in (("q", q), ("k", k), ("v", v)) if not _aligned(tensor)]
    return f"needs rows that begin at multiples of {ALIGNED} bytes, unlike {' and '.join(apart)}" if apart else ""


def _aligned(tensor: Tensor) -> bool:
    *steps, last = tensor.stride()
    places = (tensor.data_ptr(), *(step * tensor.element_size() for step in steps))
    return last == 1 and all(place % ALIGNED == 0 for place in places)


@torch.library.custom_op("stgfast::masked_attention_hopper", mutates_args=())
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
    reason = unsuitable(q, k, v, bias)
    if reason:  # a compiled graph does not check before
        raise ValueError(f"masked attention for Hopper {reason}")
    rows, (_, heads, queries, size) = len(source), q.shape
    out = empty_like_query(q, rows)
    if not out.numel():
        return out
    dim = padded(size)
    cut = config(dim)
    sources = on_device(tuple(source), torch.int32, q.device)
    with torch.cuda.device_of(q):
        triton.set_allocator(_descriptors)  # at each launch: it applies to one thread, and others set theirs
        attention_hopper_kernel[(triton.cdiv(queries, cut.m) * heads * rows,)](
            q,
            k,
            v,
            out,
            sources,
            on_device(tuple(identity), torch.int8, q.device) if any(identity) else sources,
            sources if kv_len is None else kv_len,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            heads,
            queries,
            k.shape[2],
            *tokens,
            scale * LOG2_E,
            D=size,
            DIM=dim,
            M=cut.m,
            N=cut.n,
            TAIL=kv_len is not None or k.shape[2] % cut.n != 0,
            HAS_IDENTITY=any(identity),
            HAS_KV_LEN=kv_len is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out


masked_attention.register_fake(result_of)


def _descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors of a launch. torch's memory is aligned to more than they need."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
