"""The dtypes in which tests compute, and the tolerances of comparisons.

Exactness is shown in float64, where the order of additions on a processor does not matter: two correct results differ
by about 1e-15, and by at most 1e-12 after the longest run here, while a wrong index or a wrong weight changes a result
by more than 1e-3. `EXACT` lies between.

In float32 and bfloat16 two correct results differ by roundings, so both are compared with the same run in float64: the
error of the engine may be `FACTOR` times that of the plain method in the same dtype. Both errors have the same size,
but each is random: over all families, three instruction sets, and one and two threads, their ratio was at most 2.3
(with the floor), and `FACTOR` is more than twice that. The floor, one rounding of the result, is for runs in which the
plain method happens to be exact to the last bit.

Every comparison is recorded; `pytest --tightest` prints those that come closest to their budget.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

EXACT = 1e-10
FACTOR = 6.0
# Where float64 is not possible (other threads, other processes, encoders): float32 through a few steps, with errors of
# at most 4e-6 on all machines tried, while a wrong row or a wrong seed changes a result by 1e-2 and more.
NEAR = 1e-4

compared: list[tuple[float, float]] = []  # (error, budget) of the test that runs


F32, F64 = torch.float32, torch.float64
DRAWN = [(torch, "randn"), (torch, "rand")]
# Other random initializations draw by one of these two. `trunc_normal_` also computes with what it has drawn.
DRAWN_INTO = [(torch.Tensor, "normal_"), (torch.Tensor, "uniform_"), (torch.nn.init, "trunc_normal_")]
# Functions that may request float32. A missing one is noticed, because a result in float32 is not exact.
TYPED = [
    *((torch.Tensor, name) for name in ("to", "type", "softmax", "sum", "mean", "cumsum", "new_tensor", "new_zeros")),
    *((torch, name) for name in ("arange", "linspace", "logspace", "zeros", "ones", "full", "empty", "eye", "tensor")),
    *((torch, name) for name in ("as_tensor", "asarray", "zeros_like", "ones_like", "full_like", "empty_like")),
    *((torch, name) for name in ("promote_types", "softmax", "sum", "mean", "cumsum")),
    *((torch.nn.functional, "softmax"), (torch.linalg, "vector_norm"), (torch._C._nn, "_parse_to")),
]


def _typed(function: Any) -> Any:
    """Use float64 where float32 is requested."""

    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if arg is F32:
                args = tuple(F64 if each is F32 else each for each in args)
                break
        if kwargs and kwargs.get("dtype") is F32:
            kwargs["dtype"] = F64
        return function(*args, **kwargs)

    return wide


def _drawn(function: Any, wide: bool) -> Any:
    """Random numbers that are the same for every dtype."""

    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return _to(function(*args, **{**kwargs, "dtype": F32}), F64 if wide and dtype is F32 else dtype)

    return drawn


def _drawn_into(function: Any) -> Any:
    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        into, *others = kwargs.pop("tensor", None), *args
        into = others.pop(0) if into is None else into
        if into.dtype is F32:
            return function(into, *others, **kwargs)
        with torch.no_grad():
            return into.copy_(function(_empty_like(into, dtype=F32), *others, **kwargs))

    return drawn


def _from_numpy(array: Any, from_numpy: Any = torch.from_numpy) -> Tensor:
    made: Tensor = from_numpy(array)
    return _to(made, F64) if made.dtype is F32 else made


_to, _empty_like = torch.Tensor.to, torch.empty_like


def _replacements() -> dict[bool, list[tuple[Any, str, Any]]]:
    """Replacements for functions of torch, in float64 (True) and in other dtypes."""
    into = [(*at, _drawn_into(getattr(*at))) for at in DRAWN_INTO]
    found = {wide: [*into, *((*at, _drawn(getattr(*at), wide)) for at in DRAWN)] for wide in (False, True)}
    found[True] += [(*at, _typed(getattr(*at))) for at in TYPED if hasattr(*at)]
    found[True] += [(torch.Tensor, "float", torch.Tensor.double), (torch, "from_numpy", _from_numpy)]
    return found


REPLACEMENTS = _replacements()
with torch.device("cpu"):  # torch remembers its own functions at the first use of a device as a context, not ours
    torch.empty(0)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Keep models and pipelines in these dtypes within the block; in float64, all their computation. Functions of torch
    are replaced one by one: a mode that intercepts all of them takes a quarter of a test's time.
    """
    wide = dtype is F64
    with ExitStack() as stack:
        if wide:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
        for owner, name, function in REPLACEMENTS[wide]:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def distance(made: Tensor, expected: Tensor) -> float:
    """The distance of two results, as a fraction of the second."""
    return float((made.double() - expected.double()).norm() / expected.double().norm())


def same(made: Any, expected: Any, budget: float = EXACT) -> None:
    """Compare two ways to compute the same in float64, or several such pairs."""
    if isinstance(made, Tensor):
        assert made.shape == expected.shape
        assert made.dtype == expected.dtype == torch.float64, "exactness is shown in float64"
        within(distance(made, expected), budget)
    else:
        for one, other in zip(made, expected, strict=True):
            same(one, other, budget)


def no_worse(made: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Compare two results of the same dtype, the engine's and the plain method's, with one in float64."""
    assert made.dtype == plain.dtype != torch.float64
    within(distance(made, exact), FACTOR * (distance(plain, exact) + torch.finfo(made.dtype).eps))


def near(made: Tensor, expected: Tensor) -> None:
    """Compare two ways to compute the same in float32."""
    within(distance(made, expected), NEAR)


def within(far: float, budget: float) -> None:
    compared.append((far, budget))
    assert far <= budget, f"{far:.3g} apart, where {budget:.3g} is allowed"
