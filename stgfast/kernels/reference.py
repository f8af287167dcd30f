"""The formulas, in plain torch: what every faster implementation is held against, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(branches: Sequence[Tensor], weights: Sequence[float], *, rescale: float = 0.0) -> Tensor:
    """Guidance: `g = sum_b w_b x_b`, then `g *= phi * std(x_0) / std(g) + 1 - phi` with `phi = rescale`.

    The weights add up to 1, so the sum is taken as `x_0 + sum_b w_b (x_b - x_0)`: predictions are close to one another,
    and differences of close numbers lose nothing. `x_0` is the conditional branch. Branches are `(prompts, ...)`; the
    standard deviations are unbiased and taken per prompt, so a prompt's result knows nothing of its neighbours.

    Works in float32, or wider if a branch is wider, and returns that dtype.
    """
    wide = torch.promote_types(branches[0].dtype, torch.float32)
    base = branches[0].to(wide)
    guided = base
    for branch, weight in zip(branches[1:], weights[1:], strict=True):
        guided = guided + weight * (branch.to(wide) - base)
    if rescale:
        dims = tuple(range(1, base.ndim))
        ratio = base.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guided * (rescale * ratio + (1.0 - rescale))
    return guided
