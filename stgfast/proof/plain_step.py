"""One step of a call by the plain method."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.outputs import prediction_in, with_prediction
from stgfast.batching.seam import Call, Handler, handling_also, held
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.perturbation import Perturbation
from stgfast.proof.links import Links, named
from stgfast.proof.measure import Combined
from stgfast.proof.plain import Part, UnseenError, guided, perturbing
from stgfast.proof.watch import Answer, Watch
from stgfast.schedules import Moment, value

# How far two right predictions may be apart, in parts of what changes where every block's output is rounded once more:
# roundings of the model's own numbers, and those of sums, which are taken in float32 and in another order. Over all
# families, two right predictions were 0.4 of these apart in bfloat16, and 15 in float32.
ROUNDINGS, SUMS = 2.0, 40.0


class PlainStep:
    """One step by the plain method.

    Attributes:
        watch: the call; `stub` answers its other steps.
        combined: how the pipeline combines in this step.
        predictions: by branch, in float64.
        own: what the pipeline itself sends to the scheduler.
        sent: what it sends for the plain method's result.
    """

    def __init__(
        self, watch: Watch, stub: Answer, layout: Layout, guidance: Guidance, combined: Combined, moment: Moment
    ):
        self.watch, self.layout, self.guidance, self.combined, self.moment = watch, layout, guidance, combined, moment
        self.stub = stub
        self.predictions: dict[str, Tensor] = {}
        self.links = Links(layout)
        self.jitter = 0.0
        self.notes: list[str] = []
        self.alone: dict[nn.Module, float] = {}  # rows of one branch, by block

        def alone(step: int, turn: int, name: str, plain: Call, arguments: Arguments) -> Any:
            if step != moment.step:
                return stub(step, turn, name, plain, arguments)
            return self._branches(turn, plain, arguments)

        with torch.compiler.set_stance("force_eager"):
            step = watch.run(alone, steps=moment.step + 1)[moment.step]
        self.outputs, self.own = [asked.output for asked in step.asked], step.combined
        self.dtype = prediction_in(self.outputs[0]).dtype
        self.result = self._guided()
        self.sent = self._sent(self.result)

    def _sent(self, result: Tensor) -> list[Tensor]:
        """What the scheduler receives if each prediction of the step is this one."""

        def together(step: int, turn: int, name: str, plain: Call, arguments: Arguments) -> Any:
            if step != self.moment.step:
                return self.stub(step, turn, name, plain, arguments)
            copies = len(prediction_in(self.outputs[turn])) // self.combined.rows
            return with_prediction(self.outputs[turn], torch.cat([result.to(self.dtype)] * copies))

        return self.watch.run(together, steps=self.moment.step + 1)[self.moment.step].combined

    def own_by_formula(self, rescale: float) -> list[Tensor]:
        """What it receives for CFG alone with this rescale: the pipeline's own step, if it does no more."""
        scale = self.combined.weights[self.combined.cond].to(self.result.device)
        return self._sent(self._formed(scale, [], rescale))

    @property
    def budget(self) -> float:
        """How far rounding may move a prediction."""
        return allowed(max(self.jitter, epsilon(self.dtype)), self.dtype)

    def block_rows(self, rows: Mapping[nn.Module, int]) -> float:
        """The rows that blocks ran on, in units of those for one branch of one step."""
        return sum(rows[module] / alone for module, alone in self.alone.items())

    def distinguishable(self, branch: str, error: float) -> float | None:
        """How far a perturbed branch may be off and still be distinguished from its base; None if rounding, which
        moves a right one by `error`, hides the difference.
        """
        of = dict(zip(self.guidance.names, (part.of for part in self.guidance.perturbations), strict=True)).get(branch)
        if of is None:
            return self.budget
        effect = apart([self.predictions[of]], [self.predictions[branch]])
        return min(self.budget, effect / 2) if effect > 8 * error else None

    @property
    def grown(self) -> float:
        """How much further rounding may move the result: weights above 1 increase it."""
        scale = 1.0 if len(self.combined.weights) == 1 else float(self.combined.weights[self.combined.cond].abs().max())
        perturbed = sum(abs(value(part.scale, self.moment)) for part in self.guidance.perturbations)
        largest = max(float(prediction.norm()) for prediction in self.predictions.values())
        return (2 * scale + 2 * perturbed + 1) * largest / float(self.result.norm())

    def _branches(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        """The pipeline's own call, and the same call with each perturbation of its branches."""
        names = self._names(turn)
        self.links.arguments.append(named(arguments))
        with held([unit.module for unit in self.layout.units]), handling_also(self.links.handlers()):
            output = arguments.given_to(plain)
        self.predictions |= dict(zip(names, self._split(output), strict=True))
        self.alone |= {module: rows / len(names) for module, rows in self.links.rows.items()}
        if COND in names:
            self.jitter = self._jittered(plain, arguments, output)
        for name, part in zip(self.guidance.names, self.guidance.perturbations, strict=True):
            if part.of in names and value(part.scale, self.moment):
                perturbed = self._perturbed(part, plain, arguments)
                self.predictions[name] = self._split(perturbed)[names.index(part.of)]
        return output

    def _names(self, turn: int) -> list[str]:
        """The branches of a call, by how they are combined and not by what the adapter says."""
        before = sum(self.combined.groups[:turn])
        numbers = range(before, before + self.combined.groups[turn])
        return [COND if number == self.combined.cond else UNCOND for number in numbers]

    def _split(self, output: Any) -> Sequence[Tensor]:
        return list(torch.split(prediction_in(output).double(), self.combined.rows))

    def _perturbed(self, part: Perturbation, plain: Call, arguments: Arguments) -> Any:
        parts = [
            Part(unit.module, unit.layer, {axis: module})
            for unit in self.layout.units
            for axis, module in unit.attentions or (("", None),)
        ]
        grid, links = self.layout.blocks.grid, self.links

        def lies(tokens: int) -> tuple[int, tuple[int, int, int]]:
            assert grid is not None
            assert links.given is not None
            size = grid.size(self.watch.copied_call, arguments, links.given)
            return (tokens - math.prod(size) if grid.last else 0), size

        whole = {unit.module: links.noted for unit in self.layout.units}
        query = "" if grid is None else grid.query

        def run(values: Handler | None) -> Any:
            perturbed = perturbing(parts, part, unchanged=links.unchanged, lies=lies, query=query, values=values)
            with held(whole), handling_also(whole), perturbed:
                return arguments.given_to(plain)

        try:
            return run(None)
        except UnseenError as error:
            self.notes.append(f"{error}: the adapter's own identity was taken as it is.")
            return run(self._identity)

    def _identity(self, plain: Call, arguments: Arguments) -> Any:
        return arguments.given_to(functools.partial(self.layout.blocks.identity, arguments.module))

    def _jittered(self, plain: Call, arguments: Arguments, output: Any) -> float:
        """How far the prediction moves if the samples and each block's output are rounded once more."""
        generator = torch.Generator().manual_seed(0)

        def rounded(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            signs = torch.rand(value.shape, generator=generator).round().to(value.device, value.dtype) * 2 - 1
            return value * (1 + torch.finfo(value.dtype).eps * signs)

        def handler(plain: Call, arguments: Arguments) -> Any:
            made = arguments.given_to(plain)
            return tuple(map(rounded, made)) if isinstance(made, tuple) else rounded(made)

        units = {unit.module: handler for unit in self.layout.units}
        moved = arguments.replaced({self.watch.sample: rounded(arguments[self.watch.sample])})
        with held(units), handling_also(units):
            return apart([prediction_in(moved.given_to(plain))], [prediction_in(output)])

    def _guided(self) -> Tensor:
        scale: Any = self.combined.weights[self.combined.cond].to(self.predictions[COND].device)
        if self.guidance.cfg is not None:
            scale = value(self.guidance.cfg, self.moment)
        named = zip(self.guidance.names, self.guidance.perturbations, strict=True)
        perturbed = [
            (value(part.scale, self.moment), part.base, self.predictions[name])
            for name, part in named
            if name in self.predictions
        ]
        return self._formed(scale, perturbed, self.guidance.phi(self.moment))

    def _formed(self, scale: Any, perturbed: Sequence[tuple[float, str, Tensor]], phi: float) -> Tensor:
        cond = self.predictions[COND]
        half = self.own[0].ndim == cond.ndim and self.own[0].shape[1] * 2 == cond.shape[1]
        return guided(cond, self.predictions.get(UNCOND), scale, perturbed, phi, half=half)


def apart(made: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The distance of results, as a fraction of the expected ones."""
    squares = sum(
        float((one.double() - other.double()).square().sum()) for one, other in zip(made, expected, strict=True)
    )
    return math.sqrt(squares / sum(float(other.double().square().sum()) for other in expected))


def allowed(moved: float, dtype: torch.dtype) -> float:
    """The distance that is allowed for results which one more rounding moves by this much."""
    return moved * (ROUNDINGS + SUMS * torch.finfo(torch.float32).eps / epsilon(dtype))


def epsilon(dtype: torch.dtype) -> float:
    """One rounding; at least that of float32, because models in float64 compute some parts in it."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
