"""How a pipeline combines the predictions of a step, measured without running its model.

The denoiser's outputs are random numbers. A pipeline changes all predictions alike before the scheduler receives them,
for example by a crop or a change of sign. So what is sent for different predictions is compared with what is sent for
equal ones:

    sent(all a) - sent(all b)              one unit
    sent(one a, others b) - sent(all b)    the weight of that prediction, in these units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.outputs import prediction_in, with_prediction
from stgfast.batching.seam import Call
from stgfast.errors import EngineError
from stgfast.proof.watch import Seen, Watch

LINEAR = 1e-3  # how far rounding may move what is sent from a weighted sum


class Combined(NamedTuple):
    """How one step combines.

    Attributes:
        names: the denoiser of each call.
        rows: samples in a prediction.
        groups: the number of predictions in each call, for all samples: 2 for `[uncond | cond]`.
        weights: the weight of each prediction in what is sent, in order: a number, or one for each index along a
            dimension such as frames.
        off: what is sent in addition to this sum, as a fraction of it; 0 if nothing is.
    """

    names: tuple[str, ...]
    rows: int
    groups: tuple[int, ...]
    weights: tuple[Tensor, ...]
    off: float

    @property
    def exactness(self) -> float:
        """How exactly the weights are known."""
        return LINEAR if self.off <= LINEAR else 10 * LINEAR

    @property
    def cond(self) -> int:
        """The number of the conditional prediction: it has the largest weight at any CFG scale."""
        return max(range(len(self.weights)), key=lambda number: float(self.weights[number].max()))


class Form(NamedTuple):
    """The output of a denoiser, in which other predictions can be put, and the shape of its samples."""

    output: Any
    samples: torch.Size

    def filled(self, prediction: Tensor) -> Any:
        return with_prediction(self.output, prediction)

    def shape(self, samples: torch.Size) -> torch.Size:
        """The shape of a prediction for samples of another shape."""
        rows, *made = prediction_in(self.output).shape
        # If a prediction has the size of the samples, it changes with them.
        if len(self.samples) == len(samples) == len(made) + 1:
            made = [
                new if size == old else size for size, old, new in zip(made, self.samples[1:], samples[1:], strict=True)
            ]
        return torch.Size([rows * samples[0] // self.samples[0], *made])


class Stand:
    """Outputs in place of a pipeline's denoisers that cost nothing: `fill(shape, number of the prediction's group)`.

    Each denoiser runs once, at its first call, to know the form of its output. Predictions are in float32, or in the
    denoiser's type with `own`.
    """

    def __init__(self, watch: Watch):
        self.watch = watch
        self.forms: dict[str, Form] = {}

    def answer(self, fill: Callable[[Any, int], Tensor], rows: int, *, own: bool = False) -> Callable[..., Any]:
        def answer(step: int, turn: int, name: str, plain: Call, arguments: Arguments) -> Any:
            samples = arguments[self.watch.sample].shape
            if name not in self.forms:
                self.forms[name] = Form(arguments.given_to(plain), samples)
            form = self.forms[name]
            shape = form.shape(samples)
            done = sum(asked.rows for asked in self.watch.steps[step].asked) // (rows or shape[0])
            each = torch.Size([rows or shape[0], *shape[1:]])
            parts = [fill(each, done + number) for number in range(shape[0] // each[0])]
            like = prediction_in(form.output)
            dtype = like.dtype if own else torch.promote_types(like.dtype, torch.float32)
            return form.filled(torch.cat(parts).to(like.device, dtype))

        return answer


def measured(watch: Watch, stand: Stand) -> list[Combined]:
    """How each step of the call combines.

    If a pipeline does more than a weighted sum, for example a rescale, predictions close to each other are measured
    too: the part across a prediction then shows the weights, and a rescale only changes the part along it.
    """
    apart = _measured(watch, stand, _apart)
    if all(combined.off <= LINEAR for combined in apart):
        return apart
    near = _measured(watch, stand, _near)
    return [one._replace(off=other.off) for one, other in zip(near, apart, strict=True)]


def _measured(watch: Watch, stand: Stand, draw: Callable[[torch.Size, int], Tensor]) -> list[Combined]:
    made = _kept(draw)
    first = watch.run(stand.answer(lambda shape, group: made(shape, 0), 0), thin=True)
    if not first or not first[0].sent:
        raise EngineError("the call makes no step that sends a prediction to a scheduler, or that another step follows")
    rows = _rows_of(first[0], watch.sample)
    most = max(sum(_groups(step, rows)) for step in first)
    zero = watch.run(stand.answer(lambda shape, group: made(shape, 0), rows), thin=True)
    one = watch.run(stand.answer(lambda shape, group: made(shape, 1), rows), thin=True)

    def one_of(number: int) -> list[Seen]:
        return watch.run(stand.answer(lambda shape, group: made(shape, int(group == number)), rows), thin=True)

    each = [one_of(number) for number in range(most - 1)]
    steps = len(zero) if watch.still else 1
    return [_combined(zero[k], one[k], [run[k] for run in each], rows) for k in range(steps)]


def _rows_of(step: Seen, sample: str) -> int:
    """The number of samples in a prediction: as many as the scheduler receives, unless it receives single frames."""
    rows, made = len(step.combined[0]), step.asked[0].rows
    if made % rows == 0:
        return rows
    samples = step.asked[0].arguments[sample]
    half = len(samples) // 2
    twice = len(samples) % 2 == 0 and torch.equal(samples[:half], samples[half:])
    return made // 2 if twice else made


def _combined(zero: Seen, one: Seen, each: Sequence[Seen], rows: int) -> Combined:
    groups = _groups(zero, rows)
    unit = _difference(one, zero)
    weights, off = [], 0.0
    for run in each[: sum(groups) - 1]:
        weight, beside = _weight(_difference(run, zero), unit)
        weights.append(weight)
        off = max(off, beside)
    last = torch.ones(()).double() - sum(weights)
    return Combined(tuple(asked.name for asked in zero.asked), rows, groups, (*weights, last), off)


def _weight(moved: Sequence[Tensor], unit: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The number by which `unit` is nearest to `moved`, or one number for each index along a dimension if that is
    nearer; and the remaining distance.
    """
    best, off = torch.ones(()).double(), float("inf")
    for dim in [None, *range(1, unit[0].ndim)]:
        others = [d for d in range(unit[0].ndim) if d != dim]
        if dim is not None and (off < LINEAR or len({part.shape[dim] for part in unit}) > 1):
            break
        product: Any = sum((m * u).sum(others, keepdim=dim is not None) for m, u in zip(moved, unit, strict=True))
        square: Any = sum((u * u).sum(others, keepdim=dim is not None) for u in unit)
        weight = product / square
        left = sum(float((m - weight * u).square().sum()) for m, u in zip(moved, unit, strict=True))
        beside = (left / sum(float(u.square().sum()) for u in unit)) ** 0.5
        if beside < 0.5 * off:
            best, off = weight, beside
    return best, off


def _groups(step: Seen, rows: int) -> tuple[int, ...]:
    return tuple(asked.rows // rows for asked in step.asked)


def _difference(one: Seen, other: Seen) -> list[Tensor]:
    return [a.double() - b.double() for a, b in zip(one.combined, other.combined, strict=True)]


def _apart(shape: torch.Size, number: int) -> Tensor:
    """Random numbers that are independent of those for another number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _near(shape: torch.Size, number: int) -> Tensor:
    """The same random numbers at each second place; for number 1, slightly different ones between them."""
    base, more = _apart(shape, 0).flatten(), _apart(shape, 1).flatten()
    base[1::2] = 0.01 * more[1::2] * number
    return base.view(shape)


def _kept(draw: Callable[[torch.Size, int], Tensor]) -> Callable[[torch.Size, int], Tensor]:
    """The same numbers in each run, drawn once."""
    made: dict[tuple[Any, int], Tensor] = {}

    def drawn(shape: torch.Size, number: int) -> Tensor:
        if (shape, number) not in made:
            made[shape, number] = draw(shape, number)
        return made[shape, number]

    return drawn
