"""Guidance in one launch, or in two where it needs statistics: `reference.combine`, without its passes over memory.

What a rescale or an orthogonal part needs of a prompt are a few sums over all of its elements. The first launch cuts a
prompt into at most `PARTS` parts and leaves the sums of each; the second writes the result, and every one of its
programs first adds up the parts by itself. That costs each a few kilobytes from L2, and saves what a last program to
finish would need: a counter that somebody has to clear, and an order among programs.

Sums are of deviations from the mean of a prompt's first tile: a large mean would eat their digits. The parts are then
put together in float64 (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgfast.kernels.checks import MOST_BRANCHES, check_combine, expected

BLOCK, PARTS, WARPS = 2048, 256, 8
SUMS = 9  # what a part leaves, see `sums_kernel`
NO_SIGMA, NUMBER, ON_DEVICE = 0, 1, 2  # what `sigma` is; without one, `sample` is not read
NOTHING, ORTHOGONAL, CFG_ZERO, APG = 0, 1, 2, 3  # what is taken along a direction, and which, see `_directed`
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _loaded(x, lanes, ok):
    return tl.load(x + lanes, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _tile(
    x0, x1, x2, x3, x4, x5, x6, x7, w1, w2, w3, w4, w5, w6, w7,
    offset, lanes, ok,
    COUNT: tl.constexpr,
):  # fmt: skip
    """x_0, sum_b w_b (x_b - x_0), x_1 - x_0 and x_2 - x_0 of one tile; 0 where not `ok`."""
    base = _loaded(x0 + offset, lanes, ok)
    change = tl.zeros_like(base)
    first = tl.zeros_like(base)
    second = tl.zeros_like(base)
    # A tuple of pointers would be shorter; triton 3.2 keeps only the first of one.
    if COUNT > 1:
        first = _loaded(x1 + offset, lanes, ok) - base
        change += w1 * first
    if COUNT > 2:
        second = _loaded(x2 + offset, lanes, ok) - base
        change += w2 * second
    if COUNT > 3:
        change += w3 * (_loaded(x3 + offset, lanes, ok) - base)
    if COUNT > 4:
        change += w4 * (_loaded(x4 + offset, lanes, ok) - base)
    if COUNT > 5:
        change += w5 * (_loaded(x5 + offset, lanes, ok) - base)
    if COUNT > 6:
        change += w6 * (_loaded(x6 + offset, lanes, ok) - base)
    if COUNT > 7:
        change += w7 * (_loaded(x7 + offset, lanes, ok) - base)
    return base, change, first, second


@triton.jit
def _directed(base, first, second, DIRECTED: tl.constexpr):
    """A direction and the difference that loses its part along it: x_1 - x_0 and x_2 - x_0, or x_1 - x_0 along x_1 or
    along x_0."""
    direction, difference = first, second
    if DIRECTED == 2:
        direction, difference = base + first, first
    if DIRECTED == 3:
        direction, difference = base, first
    return direction, difference


@triton.jit
def _sigma_of(sigma, prompt, sigma_stride, SIGMA: tl.constexpr):
    number = sigma
    if SIGMA == 2:
        number = tl.load(sigma + prompt * sigma_stride).to(tl.float32)
    return number


@triton.jit
def _in_x0_space(base, change, first, sample, level, lanes, ok, SIGMA: tl.constexpr):
    if SIGMA != 0:
        base = _loaded(sample, lanes, ok) - level * base
        change = -level * change
        first = -level * first
    return base, change, first


@triton.jit(do_not_specialize=["parts", "sigma_stride"])
def sums_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,
    w1, w2, w3, w4, w5, w6, w7,
    sample_ptr, sigma, sums_ptr,
    stride, sample_stride, sigma_stride, numel, chunk, parts,
    COUNT: tl.constexpr, SIGMA: tl.constexpr, RESCALE: tl.constexpr, DIRECTED: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one part of one prompt, to `sums[prompt, :, part]`.

    0, 1       <d, d> and <d, d'>, with d the direction and d' the difference
    2, 3       mean of x_0, and sum of its squared deviations from it
    4, 5       the same of g, before anything is orthogonal
    6, 7, 8    the same of d, and the sum of the deviations of d times those of g

    2 to 8 are those of x0 space where there is a sigma; their means are distances from the prompt's first tile.
    """
    program = tl.program_id(0)
    prompt = (program // parts).to(tl.int64)
    part = program % parts
    begin = part.to(tl.int64) * chunk
    length = tl.minimum(numel - begin, chunk).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    offset = prompt * stride
    sample = sample_ptr + prompt * sample_stride
    level = _sigma_of(sigma, prompt, sigma_stride, SIGMA)

    if RESCALE:
        # The origin is one for all parts of a prompt, so that their means are small numbers too, and exact enough.
        ok = lanes < numel
        base, change, first, second = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            offset, lanes, ok, COUNT,
        )  # fmt: skip
        first, second = _directed(base, first, second, DIRECTED)
        base, change, first = _in_x0_space(base, change, first, sample, level, lanes, ok, SIGMA)
        count = tl.minimum(numel, BLOCK).to(tl.float32)
        base_origin = tl.sum(base) / count
        change_origin = tl.sum(change) / count
        first_origin = tl.sum(first) / count
    # Sums of one lane each: nothing is added across lanes before the end.
    dot = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    base_sum = tl.zeros([BLOCK], tl.float32)
    base_square = tl.zeros([BLOCK], tl.float32)
    guided_sum = tl.zeros([BLOCK], tl.float32)
    guided_square = tl.zeros([BLOCK], tl.float32)
    first_sum = tl.zeros([BLOCK], tl.float32)
    first_square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        ok = start + lanes < length
        base, change, first, second = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            offset + begin + start, lanes, ok, COUNT,
        )  # fmt: skip
        first, second = _directed(base, first, second, DIRECTED)
        if DIRECTED != 0:
            dot += first * first
            cross += first * second
        if RESCALE:
            base, change, first = _in_x0_space(base, change, first, sample + begin + start, level, lanes, ok, SIGMA)
            base = tl.where(ok, base - base_origin, 0.0)
            guided = tl.where(ok, base + (change - change_origin), 0.0)
            base_sum += base
            base_square += base * base
            guided_sum += guided
            guided_square += guided * guided
            if DIRECTED != 0:
                first = tl.where(ok, first - first_origin, 0.0)
                first_sum += first
                first_square += first * first
                product += guided * first

    out = sums_ptr + prompt * SUMS * parts + part
    if DIRECTED != 0:
        tl.store(out, tl.sum(dot))
        tl.store(out + parts, tl.sum(cross))
    if RESCALE:
        base_mean = tl.sum(base_sum) / length
        guided_mean = tl.sum(guided_sum) / length
        tl.store(out + 2 * parts, base_mean)
        tl.store(out + 3 * parts, tl.sum(base_square) - base_mean * base_mean * length)
        tl.store(out + 4 * parts, guided_mean)
        tl.store(out + 5 * parts, tl.sum(guided_square) - guided_mean * guided_mean * length)
        if DIRECTED != 0:
            first_mean = tl.sum(first_sum) / length
            tl.store(out + 6 * parts, first_mean)
            tl.store(out + 7 * parts, tl.sum(first_square) - first_mean * first_mean * length)
            tl.store(out + 8 * parts, tl.sum(product) - guided_mean * first_mean * length)


@triton.jit
def _of_parts(sums, row: tl.constexpr, parts, index):
    return tl.load(sums + row * parts + index, mask=index < parts, other=0.0).to(tl.float64)


@triton.jit
def _from_mean(mean, count, numel):
    return mean - tl.sum(count * mean) / numel


@triton.jit(do_not_specialize=["parts", "sigma_stride"])
def combine_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,
    w1, w2, w3, w4, w5, w6, w7,
    sample_ptr, sigma, sums_ptr, out_ptr,
    phi, along, stride, sample_stride, sigma_stride, numel, chunk, parts,
    COUNT: tl.constexpr, SIGMA: tl.constexpr, RESCALE: tl.constexpr, DIRECTED: tl.constexpr,
    SUMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one prompt: out = factor * (x_0 + sum_b w_b (x_b - x_0) + toward * direction) + lift * sample."""
    program = tl.program_id(0)
    prompt = (program // parts).to(tl.int64)
    part = program % parts
    begin = part.to(tl.int64) * chunk
    length = tl.minimum(numel - begin, chunk).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    offset = prompt * stride + begin
    sample = sample_ptr + prompt * sample_stride + begin
    out = out_ptr + prompt * numel + begin

    if RESCALE or DIRECTED != 0:
        sums = sums_ptr + prompt * SUMS * parts
        index = tl.arange(0, PARTS)
        if DIRECTED != 0:
            dot = tl.sum(_of_parts(sums, 0, parts, index))
            cross = tl.sum(_of_parts(sums, 1, parts, index))
            steer = along * (cross / tl.where(dot == 0.0, 1.0, dot))
            toward = steer.to(tl.float32)
        if RESCALE:
            count = tl.minimum(numel - index.to(tl.int64) * chunk, chunk)
            count = tl.where(index < parts, count, 0).to(tl.float64)
            base_off = _from_mean(_of_parts(sums, 2, parts, index), count, numel)
            base_square = tl.sum(_of_parts(sums, 3, parts, index) + count * base_off * base_off)
            guided_off = _from_mean(_of_parts(sums, 4, parts, index), count, numel)
            guided_square = tl.sum(_of_parts(sums, 5, parts, index) + count * guided_off * guided_off)
            if DIRECTED != 0:
                first_off = _from_mean(_of_parts(sums, 6, parts, index), count, numel)
                first_square = tl.sum(_of_parts(sums, 7, parts, index) + count * first_off * first_off)
                product = tl.sum(_of_parts(sums, 8, parts, index) + count * guided_off * first_off)
                guided_square += steer * (2.0 * product + steer * first_square)
            less = phi * (1.0 - tl.sqrt(base_square / guided_square))  # unbiased or not, the ratio is the same
            factor = (1.0 - less).to(tl.float32)
            if SIGMA != 0:
                lift = (less / _sigma_of(sigma, prompt, sigma_stride, SIGMA)).to(tl.float32)

    for start in range(0, length, BLOCK):
        ok = start + lanes < length
        base, change, first, second = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            offset + start, lanes, ok, COUNT,
        )  # fmt: skip
        if DIRECTED != 0:
            first, second = _directed(base, first, second, DIRECTED)
            change += toward * first
        guided = base + change
        if RESCALE:
            guided *= factor
            if SIGMA != 0:
                guided += lift * _loaded(sample + start, lanes, ok)
        tl.store(out + start + lanes, guided.to(out_ptr.dtype.element_ty), mask=ok)


@torch.library.custom_op("stgfast::combine", mutates_args=())
def _combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    rescale: float,
    directed: int,
    along: float,
    sample: Tensor | None,
    sigma: Tensor | None,
    sigma_number: float,
    dtype: torch.dtype,
) -> Tensor:
    """The operation checked and spelt out: `directed` is about branch 1, and 2 where they are to be orthogonal, and
    `along` is the weight of what is lost; `sample` is for a rescale alone."""
    rows, stride = _rows(branches)
    prompts, numel = rows[0].shape
    out = torch.empty(branches[0].shape, dtype=dtype, device=branches[0].device)
    (noisy,), sample_stride = _rows([branches[0] if sample is None else sample])
    kind = NO_SIGMA if sample is None else NUMBER if sigma is None else ON_DEVICE
    level = sigma_number if sigma is None else sigma
    sigma_stride = 0 if sigma is None or not sigma.ndim else sigma.stride(0)

    unused = MOST_BRANCHES - len(branches)
    given = (*rows, *[rows[0]] * unused, *map(float, weights[1:]), *[0.0] * unused, noisy, level)
    strides = (stride, sample_stride, sigma_stride, numel)
    kinds = {"COUNT": len(branches), "SIGMA": kind, "RESCALE": bool(rescale), "DIRECTED": directed, "SUMS": SUMS}
    with torch.cuda.device_of(out):
        if rescale or directed:
            chunk = triton.cdiv(triton.cdiv(numel, PARTS), BLOCK) * BLOCK
            parts = triton.cdiv(numel, chunk)
            sums = torch.empty(prompts, SUMS, parts, dtype=torch.float32, device=out.device)
            sums_kernel[(prompts * parts,)](*given, sums, *strides, chunk, parts, **kinds, BLOCK=BLOCK, num_warps=WARPS)
        else:
            chunk, parts, sums = BLOCK, triton.cdiv(numel, BLOCK), out
        combine_kernel[(prompts * parts,)](
            *given, sums, out, float(rescale), along, *strides, chunk, parts,
            **kinds, PARTS=PARTS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


@_combine.register_fake
def _(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    rescale: float,
    directed: int,
    along: float,
    sample: Tensor | None,
    sigma: Tensor | None,
    sigma_number: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(branches[0].shape, dtype=dtype, device=branches[0].device)


def _rows(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Tensors as (prompts, elements) with one stride between prompts: views where that is so, else copies."""
    stride = tensors[0].stride(0)
    if not all(tensor.stride(0) == stride and tensor[0].is_contiguous() for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    return [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors], tensors[0].stride(0)


def combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    rescale: float = 0.0,
    orthogonal: tuple[int, int] | None = None,
    cfg_zero: int | None = None,
    apg: tuple[int, float] | None = None,
    x0: tuple[Tensor, float | Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.combine`, for float32, float16 and bfloat16."""
    check_combine(branches, weights, orthogonal=orthogonal, cfg_zero=cfg_zero, apg=apg, x0=x0, dtype=dtype)
    dtype = dtype or torch.promote_types(branches[0].dtype, torch.float32)
    sample, sigma = (None, 1.0) if x0 is None or not rescale else x0
    dtypes = {"branches": branches[0].dtype, "dtype": dtype, "sample": (branches[0] if x0 is None else x0[0]).dtype}
    for what, got in dtypes.items():
        if got not in SUPPORTED:
            raise expected(what, got, f"{', '.join(map(str, SUPPORTED))}, or impl='reference'")
    directed, share = NOTHING, 0.0
    first: tuple[int, ...] = ()
    if orthogonal is not None:
        directed, first, share = ORTHOGONAL, orthogonal, 1.0
    elif cfg_zero is not None:
        directed, first, share = CFG_ZERO, (cfg_zero,), 1.0
    elif apg is not None:
        directed, first, share = APG, apg[:1], 1.0 - apg[1]
    order = [0, *first, *(b for b in range(1, len(branches)) if b not in first)]
    on_device = isinstance(sigma, Tensor)
    out: Tensor = _combine(
        [branches[b] for b in order],
        [weights[b] for b in order],
        rescale,
        directed,
        -share * weights[first[-1]] if first else 0.0,
        sample,
        sigma if on_device else None,
        1.0 if on_device else float(sigma),
        dtype,
    )
    return out
