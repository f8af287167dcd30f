"""In which numbers the tests compute, and how close two ways to compute the same have to be.

Exactness is shown in float64, where the order in which a processor adds cannot blur it: two right results differ by
some 1e-15, and by no more than 1e-12 after the longest run here, while a wrong index or a wrong weight moves a result
by more than 1e-3. `EXACT` lies between.

In float32 and bfloat16 two right results differ by roundings, so both are held against the same run in float64: the
error of the engine may be `FACTOR` times that of the plain method in the same numbers. Both errors are of the same
size, but each is a matter of chance: over all families, three instruction sets, and one and two threads, their ratio
was at most 2.3 (with floor), and `FACTOR` is more than twice that. The floor, one rounding of the result, is for runs
in which the plain method happens to be right to the last bit.

Every comparison is recorded; `pytest --tightest` prints those that come closest to their budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-10
FACTOR = 6.0
# Where float64 is not to be had (threads of their own, other processes, encoders): float32 through a few steps, off by
# at most 4e-6 wherever it was tried, while a wrong row or a wrong seed moves a result by 1e-2 and more.
NEAR = 1e-4

compared: list[tuple[float, float]] = []  # (error, budget) of the test that runs


F32, F64 = torch.float32, torch.float64
DRAWN = {torch.randn, torch.rand}
DRAWN_INTO = {torch.Tensor.normal_, torch.Tensor.uniform_}
DRAWN_INTO |= {each for name, each in vars(torch.nn.init).items() if name.endswith("_") and callable(each)}


class _Numbers(TorchFunctionMode):
    """Random numbers are the same for every type; with `wide`, whatever asks for float32 is given float64."""

    def __init__(self, wide: bool):
        super().__init__()
        self.wide = wide

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWN_INTO:
            into, *others = kwargs.pop("tensor", None), *args
            into = others.pop(0) if into is None else into
            with torch.no_grad():
                return into.copy_(func(torch.empty_like(into, dtype=F32), *others, **kwargs))
        if func in DRAWN:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            drawn = func(*args, **{**kwargs, "dtype": F32})
            return drawn.to(F64 if self.wide and dtype is F32 else dtype)
        if self.wide:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            for arg in args:
                if arg is F32:
                    args = tuple(F64 if each is F32 else each for each in args)
                    break
            if kwargs.get("dtype") is F32:
                kwargs = {**kwargs, "dtype": F64}
        return func(*args, **kwargs)


def _from_numpy(array: Any, from_numpy: Any = torch.from_numpy) -> Tensor:
    made: Tensor = from_numpy(array)
    return made.to(torch.float64) if made.dtype is torch.float32 else made


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, models and pipelines that are in these numbers stay in them; in float64, all through."""
    with ExitStack() as stack:
        if dtype is torch.float64:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            stack.enter_context(mock.patch("torch.from_numpy", _from_numpy))  # which no mode is asked about
        stack.enter_context(_Numbers(wide=dtype is torch.float64))
        yield


def distance(made: Tensor, expected: Tensor) -> float:
    """The distance of two results, in parts of the second."""
    return float((made.double() - expected.double()).norm() / expected.double().norm())


def same(made: Any, expected: Any, budget: float = EXACT) -> None:
    """Both are results in float64 of two ways to compute the same, or several such results."""
    if isinstance(made, Tensor):
        assert made.shape == expected.shape
        assert made.dtype == expected.dtype == torch.float64, "exactness is shown in float64"
        within(distance(made, expected), budget)
    else:
        for one, other in zip(made, expected, strict=True):
            same(one, other, budget)


def no_worse(made: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Both results of the same numbers, the engine's and the plain method's, against the one in float64."""
    assert made.dtype == plain.dtype != torch.float64
    within(distance(made, exact), FACTOR * (distance(plain, exact) + torch.finfo(made.dtype).eps))


def near(made: Tensor, expected: Tensor) -> None:
    """Both are results in float32 of two ways to compute the same."""
    within(distance(made, expected), NEAR)


def within(far: float, budget: float) -> None:
    compared.append((far, budget))
    assert far <= budget, f"{far:.3g} apart, where {budget:.3g} is allowed"
