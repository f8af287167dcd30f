"""The plain method: each branch alone, through each block of the model, combined by the formula.

It does not use plans or stacks. A perturbed branch is the model's own call with some parts replaced:

    residual    a block returns its input
    attention   scaled dot product attention returns its values
    blur        the part of an attention that makes queries returns them blurred within each frame
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stgfast.batching.arguments import Arguments
from stgfast.batching.seam import Call, Handler, handling_also, held
from stgfast.errors import EngineError
from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.kinds import ATTENTION, BLUR, RESIDUAL, TEMPORAL
from stgfast.perturbation import Perturbation

KINDS = (RESIDUAL, ATTENTION, BLUR)  # that the plain method has
Lies = Callable[[int], tuple[int, tuple[int, int, int]]]


@dataclass(frozen=True)
class Part:
    """One of the parts that a model runs in order: a block, its layer number if it has one, its self-attentions by
    axis.
    """

    module: Any
    layer: int | None
    attentions: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def perturbing(
    parts: Sequence[Part],
    how: Perturbation,
    *,
    unchanged: Callable[[Part, Arguments], Any],
    lies: Lies | None = None,
    query: str = "to_q",
    values: Handler | None = None,
) -> Iterator[None]:
    """Perturb the model for all rows, within the block.

    Args:
        unchanged: the output of a block that does nothing, from its arguments.
        lies: by the number of tokens from which queries are made, the first token of the video and its (frames, height,
            width). Only needed for a blur.
        query: the part of the self-attention that makes the queries.
        values: a call of a self-attention with output = V. Needed if it does not call torch's attention.
    """
    handlers: dict[nn.Module, Handler] = {}
    for part in parts:
        if part.layer not in how.layers:
            continue
        attentions = [module for axis, module in part.attentions.items() if module and how.axis in ("", axis)]
        if how.kind == ATTENTION:
            handlers |= dict.fromkeys(attentions, values or values_alone)
        elif how.kind == BLUR:
            blur = functools.partial(_blurred, lies, how.sigma or math.inf)
            spatial = [module for axis, module in part.attentions.items() if axis != TEMPORAL]
            handlers |= {getattr(module, query): blur for module in spatial}
        elif how.kind == RESIDUAL and (attentions or not any(part.attentions.values())):
            handlers[part.module] = functools.partial(_passed, unchanged, part)
    with held(handlers), handling_also(handlers):
        yield


def guided(
    cond: Tensor,
    uncond: Tensor | None,
    scale: Any,
    perturbed: Sequence[tuple[float, str, Tensor]] = (),
    phi: float = 0.0,
    *,
    half: bool = False,
) -> Tensor:
    """The formula. `perturbed` has the scale, the base and the prediction of each perturbed branch. With `half`, only
    the first half of the channels is noise, and only its deviation is rescaled.
    """
    plain = {COND: cond, GUIDED: cond}
    if uncond is not None:
        plain |= {UNCOND: uncond, GUIDED: uncond + scale * (cond - uncond)}
    result = plain[GUIDED].clone()
    for number, base, prediction in perturbed:
        result += number * (plain[base] - prediction)
    if phi:
        channels = cond.shape[1] // 2 if half else cond.shape[1]
        for c, g in zip(cond[:, :channels], result[:, :channels], strict=True):
            g.mul_(phi * c.std() / g.std() + 1 - phi)
    return result


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur (rows, height, width, channels) by a Gaussian, with three sigma to each side if there are enough tokens."""
    if sigma == math.inf:
        return images.mean(dim=(1, 2), keepdim=True).expand_as(images)
    down, across = (min(math.ceil(6 * sigma) // 2, size // 2, size - 1) for size in images.shape[1:3])
    padded = F.pad(images.movedim(3, 1), (across, across, down, down), mode="reflect").movedim(1, 3)
    result, total = torch.zeros_like(images), 0.0
    for i in range(-down, down + 1):
        for j in range(-across, across + 1):
            weight = math.exp(-(i**2 + j**2) / (2 * sigma**2))
            rows, columns = slice(down + i, down + i + images.shape[1]), slice(across + j, across + j + images.shape[2])
            result, total = result + weight * padded[:, rows, columns], total + weight
    return result / total


def values_alone(plain: Call, arguments: Arguments) -> Any:
    """A call of an attention module in which each token attends to itself only."""
    values = ValuesAlone()
    with values:
        output = arguments.given_to(plain)
    if not values.seen:
        raise UnseenError(
            f"{type(arguments.module).__name__} calls no torch.nn.functional.scaled_dot_product_attention, so that its "
            f"attention cannot be made the identity from outside"
        )
    return output


class ValuesAlone(TorchFunctionMode):
    """Let torch's attention return its values, within the block and in this thread."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.seen += 1
        given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
        heads, value = given[0].shape[-3], given[2]
        return value.repeat_interleave(heads // value.shape[-3], -3) if kwargs.get("enable_gqa") else value


class UnseenError(EngineError):
    """An attention was computed in a way that the plain method does not see."""


def _passed(unchanged: Callable[[Part, Arguments], Any], part: Part, plain: Call, arguments: Arguments) -> Any:
    return unchanged(part, arguments)


def _blurred(lies: Lies | None, sigma: float, plain: Call, arguments: Arguments) -> Any:
    """Queries with each frame blurred."""
    if lies is None:
        raise EngineError("blur of queries: the positions of the tokens are not known")
    made = arguments.given_to(plain).clone()
    start, (frames, height, width) = lies(made.shape[1])
    for number in range(frames):
        frame = slice(start + number * height * width, start + (number + 1) * height * width)
        made[:, frame] = blurred(made[:, frame].unflatten(1, (height, width)), sigma).flatten(1, 2)
    return made
