"""The formula of the combination, against another form of it in float64."""

import pytest
import torch

from stgfast.kernels import Projection
from stgfast.kernels.reference import combine

WEIGHTS = (5.5, -3.5, -1.0)


def branches(dtype, mean=0.0, prompts=3):
    cond = torch.randn(prompts, 4, 5, 6) + mean
    return [(cond + 0.1 * torch.randn_like(cond)).to(dtype) for _ in range(3)]


def orthogonal(i, j):
    """The part of the second difference along the first one is removed."""
    return Projection(j, tuple(1.0 if b == 0 else -1.0 if b == i else 0.0 for b in range(3)))


def along(of, branch, left=0.0):
    return Projection(of, tuple(float(b == branch) for b in range(3)), left)


PROJECTIONS = {
    "orthogonal": orthogonal(1, 2),
    "orthogonal, the other way": orthogonal(2, 1),
    "along the branch itself": along(1, 1),
    "along the branch itself, the last": along(2, 2),
    "along the base": along(1, 0),
    "along the base, but for a share": along(2, 0, 0.3),
    "along a sum": Projection(1, (0.5, -2.0, 1.0), 0.25),
}


def exact(given, weights, rescale=0.0, project=None):
    """Prompt by prompt, in float64, each step as in the formula."""
    results = []
    for prompt in range(len(given[0])):
        x = [tensor[prompt].double() for tensor in given]
        if project is not None:
            of, coefficients, left = project
            direction = sum(number * tensor for number, tensor in zip(coefficients, x, strict=True))
            if direction.any():
                lost = ((x[of] - x[0]) * direction).sum() / (direction * direction).sum() * direction
                x[of] = x[of] - lost + left * lost
        g = sum(weight * tensor for weight, tensor in zip(weights, x, strict=True))
        if rescale:
            g = g * (rescale * x[0].std() / g.std() + 1 - rescale)
        results.append(g)
    return torch.stack(results)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_is_the_weighted_sum(dtype, rescale):
    given = branches(dtype)
    result = combine(given, WEIGHTS, rescale=rescale)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (result.double() - exact(given, WEIGHTS, rescale)).norm() / exact(given, WEIGHTS, rescale).norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)


def test_orthogonal():
    """Only the part of the second difference orthogonal to the first one remains."""
    base, first, second = branches(torch.float64)
    only_second = combine([base, first, second], (2.0, 0.0, -1.0), project=orthogonal(1, 2)) - base
    for prompt in range(3):
        assert abs((only_second[prompt] * (base - first)[prompt]).sum()) < 1e-10
    torch.testing.assert_close(combine([base, first, first], (2.0, 0.0, -1.0), project=orthogonal(1, 2)), base)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
def test_projected(rescale, project):
    given = branches(torch.float32, mean=0.5)
    right = exact(given, WEIGHTS, rescale, project)
    assert (combine(given, WEIGHTS, rescale=rescale, project=project) - right).norm() / right.norm() < 2e-6
    wide = [tensor.double() for tensor in given]
    made = combine(wide, WEIGHTS, rescale=rescale, project=project)
    assert (made - right).norm() / right.norm() < 1e-10
    assert (combine(wide, WEIGHTS, rescale=rescale) - right).norm() / right.norm() > 1e-4


def test_a_projection_that_leaves_all_of_it_is_none():
    given = branches(torch.float64)
    torch.testing.assert_close(combine(given, WEIGHTS, project=along(1, 0, 1.0)), combine(given, WEIGHTS))


def test_nothing_is_orthogonal_to_no_difference():
    base, _, second = branches(torch.float32)
    with_part = combine([base, base, second], (2.0, 0.0, -1.0), project=orthogonal(1, 2))
    assert torch.equal(with_part, combine([base, base, second], (2.0, 0.0, -1.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_dtype(dtype):
    given = branches(torch.float16)
    assert torch.equal(combine(given, WEIGHTS, dtype=dtype), combine(given, WEIGHTS).to(dtype))


def test_the_result_is_a_new_tensor():
    given = branches(torch.float32)[:1]
    assert combine(given, (1.0,)).data_ptr() != given[0].data_ptr()


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
