"""The formulas in plain torch: what runs on a CPU, and what all faster implementations are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stgfast.kernels.blur import kernel
from stgfast.kernels.checks import Projection, check_blur, check_combine


def combine(
    branches: Sequence[Tensor],
    weights: Sequence[float],
    *,
    rescale: float = 0.0,
    project: Projection | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Guidance: `g = sum_b w_b x_b`, then `g *= phi * std(x_0) / std(g) + 1 - phi` with `phi = rescale`.

    `x_0` is the conditional branch. The weights add up to 1, so the sum is computed as `x_0 - sum_b w_b d_b` with `d_b
    = x_0 - x_b`: predictions are close to each other, and differences of close numbers are exact. Branches are
    `(prompts, ...)`. Standard deviations (unbiased) and inner products are over each prompt, so a prompt's result does
    not depend on others.

    With a projection, `d_of` loses its part along `a = sum_b along_b x_b`, except for the fraction `left`.

    Computes in float32, or wider if a branch is wider, and returns a new tensor of that dtype, or of `dtype`.
    """
    check_combine(branches, weights, project=project, dtype=dtype)
    wide = torch.promote_types(branches[0].dtype, torch.float32)
    base, *others = (_elements(branch, wide) for branch in branches)
    distances = [base - other for other in others]
    if project is not None:
        # Computed from differences too, because a direction may be a difference.
        direction = sum(project.along) * base
        for along, distance in zip(project.along[1:], distances, strict=True):
            direction = direction - along * distance
        lost = _along(distances[project.of - 1], direction)
        distances[project.of - 1] = distances[project.of - 1] - (1.0 - project.left) * lost
    guided = base.clone()
    for weight, distance in zip(weights[1:], distances, strict=True):
        guided -= weight * distance
    if rescale:
        deviations = base.std(1, keepdim=True) / guided.std(1, keepdim=True)
        guided = (rescale * deviations + (1.0 - rescale)) * guided
    return guided.reshape(branches[0].shape).to(dtype or wide)


def _elements(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as (prompts, elements)."""
    return tensor.to(dtype).reshape(tensor.shape[0], -1)


def _along(vector: Tensor, direction: Tensor) -> Tensor:
    """The part along a direction; 0 if the direction is 0."""
    square = (direction * direction).sum(1, keepdim=True)
    return (vector * direction).sum(1, keepdim=True) / square.where(square != 0, 1.0) * direction


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    identity: Sequence[bool],
    *,
    source: Sequence[int],
    tokens: tuple[int, int],
    kv_len: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Softmax attention for a stack of rows, or a copy of V for rows with `identity`.

    Output row b reads input row `source[b]`. Keys from `kv_len` of that row on are ignored. `bias` is a boolean mask
    (true: attend) or is added to the scores. A query without keys gives 0. An identity row copies V for its `tokens`,
    from first to one past last, and attends as usual elsewhere. Computes in float32, or wider.
    """
    rows, dtype, device = list(source), q.dtype, q.device
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q[rows].to(wide), k[rows].to(wide), v[rows].to(wide)
    with torch.autocast(device.type, enabled=False):
        scores = q @ k.mT * scale
    if bias is not None:
        bias = bias.expand(-1 if bias.shape[0] > 1 else max(rows) + 1, -1, -1, -1)[rows]
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.to(wide)
    if kv_len is not None:
        beyond = torch.arange(k.shape[2], device=device) >= kv_len[rows, None]
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    with torch.autocast(device.type, enabled=False):
        out = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v
    first, last = tokens
    for row, same in enumerate(identity):
        if same:
            out[row, :, first:last] = v[row, :, first:last]
    return out.to(dtype)


def blur(x: Tensor, grid: tuple[int, int, int], sigma: float, *, first: int = 0) -> Tensor:
    """Blur (rows, tokens, channels) in space; the tokens from `first` on are a grid of (frames, height, width).

    The blur is a Gaussian of `sigma` tokens in each frame, reflected at its borders. An infinite one is the mean of the
    frame. Computes in float32, or wider.
    """
    check_blur(x, grid, sigma, first=first)
    frames, height, width = grid
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    before, video, after = wide.tensor_split([first, first + frames * height * width], dim=1)
    images = video.reshape(-1, height, width, x.shape[2]).movedim(3, 1)  # (rows * frames, channels, height, width)
    if math.isinf(sigma):
        images = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    else:
        for dim, size in ((2, height), (3, width)):
            weights = torch.tensor(kernel(size, sigma), dtype=wide.dtype, device=x.device)
            shape = [1, 1, len(weights), 1] if dim == 2 else [1, 1, 1, len(weights)]
            reach = len(weights) // 2
            padded = F.pad(images, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="reflect")
            every = weights.reshape(shape).expand(x.shape[2], *shape[1:])
            images = F.conv2d(padded, every, groups=x.shape[2])
    video = images.movedim(1, 3).reshape(video.shape)
    return torch.cat([before, video, after], dim=1).to(x.dtype)
