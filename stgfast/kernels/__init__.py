"""The operations that the engine needs from a device. `reference` specifies each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stgfast.kernels import reference
from stgfast.kernels.backends import masked_attention, unavailable
from stgfast.kernels.blur import blur
from stgfast.kernels.checks import Projection, expected

__all__ = ["Projection", "blur", "combine", "masked_attention"]

IMPLS = ("auto", "reference", "triton")


def combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    rescale: float = 0.0,
    project: Projection | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`reference.combine`, by the implementation that suits the device. A named one never falls back to another."""
    if impl not in IMPLS:
        raise expected("impl", repr(impl), f"one of {', '.join(IMPLS)}")
    device = branches[0].device.type if len(branches) else "cpu"
    if impl == "auto":
        suits = device == "cuda" and branches[0].dtype != torch.float64
        impl = "triton" if suits and not unavailable("triton", device, biased=False) else "reference"
    if impl == "reference":
        made: Callable[..., Tensor] = reference.combine
    else:
        reason = unavailable(impl, device, biased=False)
        if reason:
            raise expected("impl", repr(impl), f"another implementation, since it {reason}")
        from stgfast.kernels import combination  # imports triton

        made = combination.combine
    return made(branches, weights, rescale=rescale, project=project, dtype=dtype)
