"""Queries blurred over space, for Smoothed Energy Guidance (arXiv 2408.00760): `reference.blur`, faster.

A blur along one axis is a product with a small matrix of weights, which includes reflection at the borders. Tokens of a
video are in memory as (frames, height, width, channels), so a blur is two matrix products without a transposition or a
padded copy. It is not fused into attention: on a CPU it costs 0.07 of attention at 1,024 tokens and 0.014 at 7,680, and
less with more tokens (`bench/blur.py`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from stgfast.kernels.checks import check_blur


def blur(x: Tensor, grid: tuple[int, int, int], sigma: float, *, first: int = 0) -> Tensor:
    """`reference.blur`: blur the tokens from `first` on, a grid of (frames, height, width), within their frames."""
    check_blur(x, grid, sigma, first=first)
    frames, height, width = grid
    last = first + frames * height * width
    rows, channels = x.shape[0], x.shape[2]
    video = x[:, first:last].reshape(rows, frames, height, width, channels)
    if math.isinf(sigma):
        video = video.mean(dim=(2, 3), keepdim=True).expand_as(video)
    else:
        video = _weights(width, sigma, x.dtype, x.device) @ video
        video = _weights(height, sigma, x.dtype, x.device) @ video.reshape(rows, frames, height, width * channels)
    return torch.cat([x[:, :first], video.reshape(rows, last - first, channels), x[:, last:]], dim=1)


def kernel(size: int, sigma: float) -> list[float]:
    """The weights of a blur along an axis of `size` tokens: three sigma to each side, if the axis is long enough."""
    radius = min(math.ceil(6 * sigma) // 2, size // 2, size - 1)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


@functools.lru_cache(maxsize=64)
def _weights(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of token j of an axis in the blurred token i, copied to a device once."""
    weights = kernel(size, sigma)
    radius = len(weights) // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for offset, weight in enumerate(weights, start=-radius):
            j = abs(i + offset)
            matrix[i, min(j, 2 * (size - 1) - j)] += weight
    return matrix.to(device, dtype)
