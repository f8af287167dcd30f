"""The guidance formula in one launch, or in two if it needs statistics: `reference.combine`, with fewer passes over
memory.

A rescale or projection needs a few sums over all elements of a prompt. The first launch cuts a prompt into at most
`PARTS` parts and writes the sums of each. The second writes the result, and each of its programs first adds up the
parts. This costs a few kilobytes from L2 for each program. The alternative, a last program that finishes the sums,
would need a counter that must be cleared, and an order of programs.

Sums are of deviations from the mean of a prompt's first tile, because a large mean would lose digits. The parts are
then combined in float64 (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgfast.kernels.checks import MOST_BRANCHES, Projection, check_combine, expected

BLOCK, PARTS, WARPS = 2048, 256, 8
SUMS = 9  # sums of a part, see `sums_kernel`
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _loaded(x, lanes, ok):
    return tl.load(x + lanes, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _tile(
    x0, x1, x2, x3, x4, x5, x6, x7, w1, w2, w3, w4, w5, w6, w7, a0, a1, a2, a3, a4, a5, a6, a7,
    offset, lanes, ok,
    COUNT: tl.constexpr,
):  # fmt: skip
    """x_0, sum_b w_b (x_b - x_0), x_1 - x_0 and the direction of one tile; 0 where not `ok`.

    The direction is a_0 x_0 + sum_b a_b (x_b - x_0). What is not used of these is not computed.
    """
    base = _loaded(x0 + offset, lanes, ok)
    change = tl.zeros_like(base)
    first = tl.zeros_like(base)
    direction = a0 * base
    # A tuple of pointers would be shorter, but triton 3.2 only keeps its first one.
    if COUNT > 1:
        first = _loaded(x1 + offset, lanes, ok) - base
        change += w1 * first
        direction += a1 * first
    if COUNT > 2:
        difference = _loaded(x2 + offset, lanes, ok) - base
        change += w2 * difference
        direction += a2 * difference
    if COUNT > 3:
        difference = _loaded(x3 + offset, lanes, ok) - base
        change += w3 * difference
        direction += a3 * difference
    if COUNT > 4:
        difference = _loaded(x4 + offset, lanes, ok) - base
        change += w4 * difference
        direction += a4 * difference
    if COUNT > 5:
        difference = _loaded(x5 + offset, lanes, ok) - base
        change += w5 * difference
        direction += a5 * difference
    if COUNT > 6:
        difference = _loaded(x6 + offset, lanes, ok) - base
        change += w6 * difference
        direction += a6 * difference
    if COUNT > 7:
        difference = _loaded(x7 + offset, lanes, ok) - base
        change += w7 * difference
        direction += a7 * difference
    return base, change, first, direction


@triton.jit(do_not_specialize=["parts"])
def sums_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,
    w1, w2, w3, w4, w5, w6, w7, a0, a1, a2, a3, a4, a5, a6, a7,
    sums_ptr,
    stride, numel, chunk, parts,
    COUNT: tl.constexpr, RESCALE: tl.constexpr, PROJECT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one part of one prompt, to `sums[prompt, :, part]`.

    0, 1       <a, a> and <a, x_1 - x_0>, with a the direction
    2, 3       mean of x_0, and sum of its squared deviations from it
    4, 5       the same of g, before it loses anything along a
    6, 7, 8    the same of a, and the sum of the deviations of a times those of g

    The means of 2 to 8 are distances from the prompt's first tile.
    """
    program = tl.program_id(0)
    prompt = (program // parts).to(tl.int64)
    part = program % parts
    begin = part.to(tl.int64) * chunk
    length = tl.minimum(numel - begin, chunk).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    offset = prompt * stride

    if RESCALE:
        # All parts of a prompt have the same origin, so that their means are small numbers and exact enough.
        base, change, first, direction = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            a0, a1, a2, a3, a4, a5, a6, a7, offset, lanes, lanes < numel, COUNT,
        )  # fmt: skip
        count = tl.minimum(numel, BLOCK).to(tl.float32)
        base_origin = tl.sum(base) / count
        change_origin = tl.sum(change) / count
        direction_origin = tl.sum(direction) / count
    # One sum per lane: lanes are added at the end.
    square = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    base_sum = tl.zeros([BLOCK], tl.float32)
    base_square = tl.zeros([BLOCK], tl.float32)
    guided_sum = tl.zeros([BLOCK], tl.float32)
    guided_square = tl.zeros([BLOCK], tl.float32)
    direction_sum = tl.zeros([BLOCK], tl.float32)
    direction_square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        ok = start + lanes < length
        base, change, first, direction = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            a0, a1, a2, a3, a4, a5, a6, a7, offset + begin + start, lanes, ok, COUNT,
        )  # fmt: skip
        if PROJECT:
            square += direction * direction
            cross += direction * first
        if RESCALE:
            base = tl.where(ok, base - base_origin, 0.0)
            guided = tl.where(ok, base + (change - change_origin), 0.0)
            base_sum += base
            base_square += base * base
            guided_sum += guided
            guided_square += guided * guided
            if PROJECT:
                direction = tl.where(ok, direction - direction_origin, 0.0)
                direction_sum += direction
                direction_square += direction * direction
                product += guided * direction

    out = sums_ptr + prompt * SUMS * parts + part
    if PROJECT:
        tl.store(out, tl.sum(square))
        tl.store(out + parts, tl.sum(cross))
    if RESCALE:
        base_mean = tl.sum(base_sum) / length
        guided_mean = tl.sum(guided_sum) / length
        tl.store(out + 2 * parts, base_mean)
        tl.store(out + 3 * parts, tl.sum(base_square) - base_mean * base_mean * length)
        tl.store(out + 4 * parts, guided_mean)
        tl.store(out + 5 * parts, tl.sum(guided_square) - guided_mean * guided_mean * length)
        if PROJECT:
            direction_mean = tl.sum(direction_sum) / length
            tl.store(out + 6 * parts, direction_mean)
            tl.store(out + 7 * parts, tl.sum(direction_square) - direction_mean * direction_mean * length)
            tl.store(out + 8 * parts, tl.sum(product) - guided_mean * direction_mean * length)


@triton.jit
def _of_parts(sums, row: tl.constexpr, parts, index):
    return tl.load(sums + row * parts + index, mask=index < parts, other=0.0).to(tl.float64)


@triton.jit
def _from_mean(mean, count, numel):
    return mean - tl.sum(count * mean) / numel


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,
    w1, w2, w3, w4, w5, w6, w7, a0, a1, a2, a3, a4, a5, a6, a7,
    sums_ptr, out_ptr,
    phi, taken, stride, numel, chunk, parts,
    COUNT: tl.constexpr, RESCALE: tl.constexpr, PROJECT: tl.constexpr,
    SUMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one prompt: out = factor * (x_0 + sum_b w_b (x_b - x_0) + toward * direction)."""
    program = tl.program_id(0)
    prompt = (program // parts).to(tl.int64)
    part = program % parts
    begin = part.to(tl.int64) * chunk
    length = tl.minimum(numel - begin, chunk).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    offset = prompt * stride + begin
    out = out_ptr + prompt * numel + begin

    if RESCALE or PROJECT:
        sums = sums_ptr + prompt * SUMS * parts
        index = tl.arange(0, PARTS)
        if PROJECT:
            square = tl.sum(_of_parts(sums, 0, parts, index))
            cross = tl.sum(_of_parts(sums, 1, parts, index))
            steer = taken * (cross / tl.where(square == 0.0, 1.0, square))
            toward = steer.to(tl.float32)
        if RESCALE:
            count = tl.minimum(numel - index.to(tl.int64) * chunk, chunk)
            count = tl.where(index < parts, count, 0).to(tl.float64)
            base_off = _from_mean(_of_parts(sums, 2, parts, index), count, numel)
            base_square = tl.sum(_of_parts(sums, 3, parts, index) + count * base_off * base_off)
            guided_off = _from_mean(_of_parts(sums, 4, parts, index), count, numel)
            guided_square = tl.sum(_of_parts(sums, 5, parts, index) + count * guided_off * guided_off)
            if PROJECT:
                direction_off = _from_mean(_of_parts(sums, 6, parts, index), count, numel)
                direction_square = tl.sum(_of_parts(sums, 7, parts, index) + count * direction_off * direction_off)
                product = tl.sum(_of_parts(sums, 8, parts, index) + count * guided_off * direction_off)
                guided_square += steer * (2.0 * product + steer * direction_square)
            # The ratio is the same for biased and unbiased deviations.
            factor = (1.0 - phi * (1.0 - tl.sqrt(base_square / guided_square))).to(tl.float32)

    for start in range(0, length, BLOCK):
        ok = start + lanes < length
        base, change, _first, direction = _tile(
            x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, w1, w2, w3, w4, w5, w6, w7,
            a0, a1, a2, a3, a4, a5, a6, a7, offset + start, lanes, ok, COUNT,
        )  # fmt: skip
        if PROJECT:
            change += toward * direction
        guided = base + change
        if RESCALE:
            guided *= factor
        tl.store(out + start + lanes, guided.to(out_ptr.dtype.element_ty), mask=ok)


@torch.library.custom_op("stgfast::combine", mutates_args=())
def _combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    rescale: float,
    along: Sequence[float],
    taken: float,
    dtype: torch.dtype,
) -> Tensor:
    """The operation, checked and with all options. If `along` has numbers, add `taken` times the projection of x_1 -
    x_0 on their direction.
    """
    rows, stride = _rows(branches)
    prompts, numel = rows[0].shape
    out = torch.empty(branches[0].shape, dtype=dtype, device=branches[0].device)
    unused = MOST_BRANCHES - len(branches)
    turned = [float(sum(along)), *map(float, along[1:])] if along else [0.0] * len(branches)
    given = (*rows, *[rows[0]] * unused, *map(float, weights[1:]), *[0.0] * unused, *turned, *[0.0] * unused)
    kinds = {"COUNT": len(branches), "RESCALE": bool(rescale), "PROJECT": bool(along), "SUMS": SUMS}
    with torch.cuda.device_of(out):
        if rescale or along:
            chunk = triton.cdiv(triton.cdiv(numel, PARTS), BLOCK) * BLOCK
            parts = triton.cdiv(numel, chunk)
            sums = torch.empty(prompts, SUMS, parts, dtype=torch.float32, device=out.device)
            sums_kernel[(prompts * parts,)](
                *given, sums, stride, numel, chunk, parts, **kinds, BLOCK=BLOCK, num_warps=WARPS
            )
        else:
            chunk, parts, sums = BLOCK, triton.cdiv(numel, BLOCK), out
        combine_kernel[(prompts * parts,)](
            *given, sums, out, float(rescale), taken, stride, numel, chunk, parts,
            **kinds, PARTS=PARTS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


@_combine.register_fake
def _(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    rescale: float,
    along: Sequence[float],
    taken: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(branches[0].shape, dtype=dtype, device=branches[0].device)


def _rows(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Tensors as (prompts, elements) with one stride between prompts: views if possible, else copies."""
    stride = tensors[0].stride(0)
    if not all(tensor.stride(0) == stride and tensor[0].is_contiguous() for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    return [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors], tensors[0].stride(0)


def combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    rescale: float = 0.0,
    project: Projection | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.combine`, for float32, float16 and bfloat16."""
    check_combine(branches, weights, project=project, dtype=dtype)
    dtype = dtype or torch.promote_types(branches[0].dtype, torch.float32)
    for what, got in {"branches": branches[0].dtype, "dtype": dtype}.items():
        if got not in SUPPORTED:
            raise expected(what, got, f"{', '.join(map(str, SUPPORTED))}, or impl='reference'")
    order, taken = list(range(len(branches))), 0.0
    along: list[float] = []
    if project is not None:
        order = [0, project.of, *(b for b in order[1:] if b != project.of)]
        along = [project.along[b] for b in order]
        taken = -(1.0 - project.left) * weights[project.of]
    out: Tensor = _combine([branches[b] for b in order], [weights[b] for b in order], rescale, along, taken, dtype)
    return out
