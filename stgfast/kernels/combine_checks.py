"""What a call of the combination may not be: found on the host, before anything is computed or launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stgfast.kernels.attention_checks import expected

MOST_BRANCHES = 8


def check_combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    orthogonal: tuple[int, int] | None,
    x0: tuple[Tensor, float | Tensor] | None,
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
    if orthogonal is not None:
        others = range(1, len(branches))
        if len(orthogonal) != 2 or len(set(orthogonal)) != 2 or not set(orthogonal) <= set(others):
            right = (
                f"two different branches from 1 to {len(others)}" if len(others) > 1 else "None, for so few branches"
            )
            raise expected("orthogonal", orthogonal, right)
    if x0 is not None:
        _check_x0(base, x0)


def _check_x0(base: Tensor, x0: tuple[Tensor, float | Tensor]) -> None:
    if len(x0) != 2 or not isinstance(x0[0], Tensor):
        raise expected("x0", type(x0).__name__, "(sample, sigma)")
    sample, sigma = x0
    _check_like(base, "sample", sample)
    if not sample.is_floating_point():
        raise expected("dtype of sample", sample.dtype, "a floating point type")
    if not isinstance(sigma, Tensor):
        if not sigma:
            raise expected("sigma", sigma, "not 0")
        return
    if sigma.shape not in ((), base.shape[:1]):
        raise expected("shape of sigma", tuple(sigma.shape), f"() or ({base.shape[0]},), one for every prompt")
    if sigma.device != base.device:
        raise expected("device of sigma", sigma.device, f"{base.device}, as branches[0], or a float")


def _check_like(base: Tensor, what: str, tensor: Tensor) -> None:
    if tensor.shape != base.shape:
        raise expected(f"shape of {what}", tuple(tensor.shape), f"{tuple(base.shape)}, as branches[0]")
    if tensor.device != base.device:
        raise expected(f"device of {what}", tensor.device, f"{base.device}, as branches[0]")
