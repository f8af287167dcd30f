"""Take and join rows of a stack, as slices: no index tensor, so no copy to the device and no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stgfast.errors import EngineError
from stgfast.kernels.layout import spans

__all__ = ["alone", "as_given", "as_tuple", "chunks", "join", "spans", "take", "take_packed"]


def take(value: Any, where: Sequence[slice], rows: int, name: str) -> Any:
    """The rows `where` of an argument that has `rows` rows. An argument without rows stays as it is.

    A sample may have several neighboring rows, for example its frames: then that many are taken for each sample.
    """
    if isinstance(value, dict):
        return {key: take(part, where, rows, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, tuple | list):
        if len(value) == rows and all(isinstance(part, int) for part in value):
            return type(value)(number for part in where for number in value[part])  # one number for each sample
        return type(value)(take(part, where, rows, name) for part in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or (value.shape[0] == 1 and rows > 1):
        return value
    each, left = divmod(value.shape[0], rows)
    if left:
        raise EngineError(f"argument {name!r}: got {value.shape[0]} rows, expected {rows} or a multiple of it")
    if list(where) == [slice(0, rows)]:
        return value
    return join([value[part.start * each : part.stop * each] for part in where])


def take_packed(value: Tensor, counts: Sequence[int], where: Sequence[slice], rows: int, name: str) -> Tensor:
    """The rows `where` of samples that lie one after another along dimension 1, with this number of tokens each."""
    if len(counts) != rows or sum(counts) != value.shape[1]:
        raise EngineError(
            f"argument {name!r}: got {value.shape[1]} tokens for {len(counts)} samples of {sum(counts)} tokens in all, "
            f"expected {rows} samples"
        )
    samples = value.split(list(counts), dim=1)
    return torch.cat([sample for part in where for sample in samples[part]], dim=1)


def alone(value: Any) -> Any:
    """The same memory as a tensor that is not a view.

    Compiled code also depends on the shape of the tensor that an argument is a view of. Taken rows are views of
    different numbers of rows, which would cause compilations.
    """
    if isinstance(value, dict):
        return {key: alone(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(alone(part) for part in value)
    return value.detach() if isinstance(value, Tensor) and not value.requires_grad else value


def join(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def as_given(outputs: Sequence[Any], *, wrapped: bool = False) -> Any:
    """Outputs in the form in which modules return them: one alone, several as a tuple."""
    return tuple(outputs) if wrapped or len(outputs) > 1 else outputs[0]


def chunks(rows: int, limit: int | None) -> list[slice]:
    """`rows` rows in as few and as even chunks of at most `limit` as possible."""
    count = 1 if limit is None else -(-rows // limit)
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
