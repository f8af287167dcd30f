"""The blur of queries, against the formula token by token."""

import math
import re

import pytest
import torch

from stgfast.kernels import blur, reference


def token_by_token(x, grid, sigma, first):
    """Each token of a frame is a Gaussian mean of all others within 3 sigma to each side, with reflection at the
    borders.
    """
    frames, height, width = grid
    out = x.clone()

    def near(size):
        reach = min(math.ceil(6 * sigma) // 2, size // 2, size - 1)
        weights = {offset: math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-reach, reach + 1)}
        return {offset: weight / sum(weights.values()) for offset, weight in weights.items()}

    def inside(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for frame in range(frames):
        start = first + frame * height * width
        for i in range(height):
            for j in range(width):
                value = torch.zeros_like(x[:, 0])
                for di, a in near(height).items():
                    for dj, b in near(width).items():
                        value += a * b * x[:, start + inside(i + di, height) * width + inside(j + dj, width)]
                out[:, start + i * width + j] = value
    return out


GRIDS = {"one token": (1, 1, 1), "a line": (2, 1, 5), "video": (3, 4, 6), "odd": (2, 5, 3)}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("first", [0, 3])
def test_is_the_formula(grid, sigma, first):
    x = torch.randn(2, first + math.prod(grid) + 2, 5, dtype=torch.float64)
    expected = token_by_token(x, grid, sigma, first)
    for made in (blur(x, grid, sigma, first=first), reference.blur(x, grid, sigma, first=first)):
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
        assert torch.equal(made[:, :first], x[:, :first])
        assert torch.equal(made[:, -2:], x[:, -2:])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_an_infinite_one_is_the_mean_of_a_frame(grid):
    x = torch.randn(2, math.prod(grid), 5, dtype=torch.float64)
    expected = x.reshape(2, grid[0], -1, 5).mean(2, keepdim=True).expand(2, grid[0], grid[1] * grid[2], 5).flatten(1, 2)
    for made in (blur(x, grid, math.inf), reference.blur(x, grid, math.inf)):
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.7, math.inf])
def test_half_precision_is_as_exact_as_its_specification(dtype, sigma):
    x, grid = torch.randn(2, 3 * 8 * 9, 16).to(dtype), (3, 8, 9)
    exact = reference.blur(x.double(), grid, sigma)
    off = (reference.blur(x, grid, sigma).double() - exact).abs().max()
    # two products round their weights and their results
    assert (blur(x, grid, sigma).double() - exact).abs().max() <= 2 * off + 2 * torch.finfo(
        dtype
    ).eps * exact.abs().max()


X = torch.zeros(1, 12, 4)
WRONG = {
    "four dimensions": ((X[None], (1, 3, 4), 1.0), {}, "x: got (1, 1, 12, 4), torch.float32, expected (rows, tokens"),
    "whole numbers": ((X.int(), (1, 3, 4), 1.0), {}, "x: got (1, 12, 4), torch.int32"),
    "a flat grid": ((X, (3, 4), 1.0), {}, "grid: got (3, 4), expected frames, height and width"),
    "an empty grid": ((X, (0, 3, 4), 1.0), {}, "grid: got (0, 3, 4)"),
    "too large": ((X, (2, 3, 4), 1.0), {}, "grid and first: got ((2, 3, 4), 0), expected a range within 12 tokens"),
    "too late": ((X, (1, 3, 4), 1.0), {"first": 1}, "grid and first: got ((1, 3, 4), 1)"),
    "no blur": ((X, (1, 3, 4), 0.0), {}, "sigma: got 0.0, expected a number above 0, or infinity"),
    "no number": ((X, (1, 3, 4), math.nan), {}, "sigma: got nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_so(name):
    given, options, message = WRONG[name]
    for made_by in (blur, reference.blur):
        with pytest.raises(ValueError, match=re.escape(message)):
            made_by(*given, **options)
