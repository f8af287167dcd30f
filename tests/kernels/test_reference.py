"""The formula of the combination, against the same in float64 written another way."""

import pytest
import torch

from stgfast.kernels import combine

WEIGHTS = (5.5, -3.5, -1.0)


def branches(dtype, mean=0.0, prompts=3):
    cond = torch.randn(prompts, 4, 5, 6) + mean
    return [(cond + 0.1 * torch.randn_like(cond)).to(dtype) for _ in range(3)]


def exact(given, weights, rescale):
    wide = [tensor.double() for tensor in given]
    result = sum(weight * tensor for weight, tensor in zip(weights, wide, strict=True))
    if rescale:
        for prompt in range(len(result)):
            ratio = wide[0][prompt].std() / result[prompt].std()
            result[prompt] *= rescale * ratio + 1 - rescale
    return result


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_is_the_weighted_sum(dtype, rescale):
    given = branches(dtype)
    result = combine(given, WEIGHTS, rescale=rescale)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (result.double() - exact(given, WEIGHTS, rescale)).norm() / exact(given, WEIGHTS, rescale).norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)


def test_full_rescale_gives_the_conditional_standard_deviation():
    given = branches(torch.float32)
    result = combine(given, WEIGHTS, rescale=1.0)
    for prompt in range(3):
        torch.testing.assert_close(result[prompt].std(), given[0][prompt].std())


def test_a_prompt_does_not_know_its_neighbours():
    given = branches(torch.float32)
    alone = combine([tensor[1:2] for tensor in given], WEIGHTS, rescale=0.7)
    assert torch.equal(combine(given, WEIGHTS, rescale=0.7)[1:2], alone)


def test_a_large_mean_loses_nothing():
    given = branches(torch.float32, mean=1000.0)
    off = combine(given, WEIGHTS).double() - exact(given, WEIGHTS, 0.0)
    naive = sum(weight * tensor for weight, tensor in zip(WEIGHTS, given, strict=True)).double()
    assert off.abs().max() < (naive - exact(given, WEIGHTS, 0.0)).abs().max()


def test_inputs_are_left_alone():
    given = branches(torch.float32)
    before = [tensor.clone() for tensor in given]
    combine(given, WEIGHTS, rescale=0.7)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
