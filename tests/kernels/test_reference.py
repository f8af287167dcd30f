"""The formula of the combination, against the same in float64 written another way."""

import pytest
import torch

from stgfast.kernels.reference import combine

WEIGHTS = (5.5, -3.5, -1.0)


def branches(dtype, mean=0.0, prompts=3):
    cond = torch.randn(prompts, 4, 5, 6) + mean
    return [(cond + 0.1 * torch.randn_like(cond)).to(dtype) for _ in range(3)]


def exact(given, weights, rescale=0.0, orthogonal=None, x0=None, cfg_zero=None, apg=None):
    """Prompt by prompt, each step as the formula has it, in x0 space where it is meant there."""
    results = []
    for prompt in range(len(given[0])):
        x = [tensor[prompt].double() for tensor in given]
        if x0 is not None:
            sample = x0[0][prompt].double()
            sigma = torch.as_tensor(x0[1]).double().expand(len(given[0]))[prompt].to(sample.device)
            x = [sample - sigma * velocity for velocity in x]
        if orthogonal is not None:
            i, j = orthogonal
            towards, other = x[i] - x[0], x[j] - x[0]
            if towards.any():
                x[j] = x[j] - (other * towards).sum() / (towards * towards).sum() * towards
        if cfg_zero is not None:
            u = x[cfg_zero]
            x[cfg_zero] = (x[0] * u).sum() / (u * u).sum() * u
        if apg is not None:
            b, eta = apg
            parallel = ((x[b] - x[0]) * x[0]).sum() / (x[0] * x[0]).sum() * x[0]
            x[b] = x[0] + (x[b] - x[0] - parallel) + eta * parallel
        g = sum(weight * tensor for weight, tensor in zip(weights, x, strict=True))
        if rescale:
            g = g * (rescale * x[0].std() / g.std() + 1 - rescale)
        results.append(g if x0 is None else (sample - g) / sigma)
    return torch.stack(results)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_is_the_weighted_sum(dtype, rescale):
    given = branches(dtype)
    result = combine(given, WEIGHTS, rescale=rescale)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (result.double() - exact(given, WEIGHTS, rescale)).norm() / exact(given, WEIGHTS, rescale).norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("form", ["plain", "float", "scalar", "each"])
@pytest.mark.parametrize("orthogonal", [None, (1, 2), (2, 1)])
def test_options(rescale, form, orthogonal):
    given = branches(torch.float32)
    sigma = {"float": 0.3, "scalar": torch.tensor(0.3), "each": torch.tensor([0.9, 0.3, 0.1])}.get(form)
    options = {"rescale": rescale, "orthogonal": orthogonal}
    options["x0"] = None if sigma is None else (torch.randn_like(given[0]), sigma)
    right = exact(given, WEIGHTS, **options)
    result = combine(given, WEIGHTS, **options)
    assert (result - right).norm() / right.norm() < 2e-6
    wide = [tensor.double() for tensor in given]
    assert (combine(wide, WEIGHTS, **options) - right).norm() / right.norm() < 1e-7  # sigma is float32


def test_orthogonal():
    """Of the second difference, only what the first does not say already."""
    base, first, second = branches(torch.float64)
    only_second = combine([base, first, second], (2.0, 0.0, -1.0), orthogonal=(1, 2)) - base
    for prompt in range(3):
        assert abs((only_second[prompt] * (base - first)[prompt]).sum()) < 1e-10
    torch.testing.assert_close(combine([base, first, first], (2.0, 0.0, -1.0), orthogonal=(1, 2)), base)


DIRECTED = [{"cfg_zero": 1}, {"cfg_zero": 2}, {"apg": (1, 0.0)}, {"apg": (2, 0.3)}]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("directed", DIRECTED, ids=str)
def test_directed(rescale, directed):
    given = branches(torch.float32, mean=0.5)
    right = exact(given, WEIGHTS, rescale, **directed)
    assert (combine(given, WEIGHTS, rescale=rescale, **directed) - right).norm() / right.norm() < 2e-6
    wide = [tensor.double() for tensor in given]
    made = combine(wide, WEIGHTS, rescale=rescale, **directed)
    assert (made - right).norm() / right.norm() < 1e-10
    assert (combine(wide, WEIGHTS, rescale=rescale) - right).norm() / right.norm() > 1e-3


def test_apg_with_all_of_the_parallel_part_is_cfg():
    given = branches(torch.float64)
    torch.testing.assert_close(combine(given, WEIGHTS, apg=(1, 1.0)), combine(given, WEIGHTS))


def test_nothing_is_orthogonal_to_no_difference():
    base, _, second = branches(torch.float32)
    with_part = combine([base, base, second], (2.0, 0.0, -1.0), orthogonal=(1, 2))
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
