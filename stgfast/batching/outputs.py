"""The output of a denoiser: a tensor, a tuple that begins with one, or an object with a `sample`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor


def prediction_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output[0] if isinstance(output, tuple) else output.sample)


def tensors_in(output: Any) -> list[Tensor]:
    """The prediction and all other tensors of the same output, for example audio beside video."""
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output if isinstance(output, tuple) else [getattr(output, field.name) for field in dataclasses.fields(output)]
    )
    return [part for part in parts if isinstance(part, Tensor)]


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """A copy of a denoiser's output with another prediction."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return dataclasses.replace(output, sample=prediction)
