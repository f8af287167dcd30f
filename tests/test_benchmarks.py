"""The time of kernels on a CPU, with `pytest -o addopts= tests/test_benchmarks.py --benchmark-only`. Wrong results
fail.
"""

import pytest
import torch

from stgfast.kernels import Projection, blur, combine, masked_attention, reference

WEIGHTS = (5.5, -3.5, -1.0)
SHAPES = {"few": (1, 16, 3, 16, 16), "many": (1, 16, 9, 32, 32)}
TOKENS = (256, 1024)
GRIDS = {"few": (2, 8, 8), "many": (4, 16, 16)}


def close(made, right):
    torch.testing.assert_close(made.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rescale": 0.7}, {"project": Projection(2, (1.0, -1.0, 0.0))}],
    ids=["plain", "rescale", "project"],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_combine(benchmark, shape, settings):
    branches = [torch.randn(shape) for _ in WEIGHTS]
    right = reference.combine([branch.double() for branch in branches], WEIGHTS, dtype=torch.float64, **settings)
    close(benchmark(lambda: combine(branches, WEIGHTS, **settings)), right)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "math"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_masked_attention(benchmark, tokens, impl):
    """A stack of three rows, one of which is the identity."""
    q, k, v = torch.randn(3, 3, 4, tokens, 64)
    stack = [False, False, True]
    right = masked_attention(q.double(), k.double(), v.double(), stack, impl="reference").double()
    close(benchmark(lambda: masked_attention(q, k, v, stack, impl=impl)), right)


@pytest.mark.parametrize("sigma", [1.5, float("inf")], ids=["Gaussian", "mean"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_blur(benchmark, grid, sigma):
    frames, height, width = grid
    x = torch.randn(2, frames * height * width, 256)
    close(benchmark(lambda: blur(x, grid, sigma)), reference.blur(x.double(), grid, sigma))
