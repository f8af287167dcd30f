"""Differences between branches: computed in some steps, extrapolated to the others.

An approximation, off by default. The differences `base - p` and `c - u` change smoothly from step to step; the
predictions do not. If a branch is not computed, its difference comes from a polynomial through the last computed
values: order 0 is the last value, order 1 a line through two, order 2 a parabola through three.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.guidance import Guidance, Scale
from stgfast.spacing import EVERY, Spacing, due

WARM = 2  # steps that are computed first, if values are extrapolated


class KeptDifferences:
    """A memory of the differences between branches and their bases.

    Each branch has its own values. If a branch was left out for a while because its weight was 0, it starts again, and
    so do all branches with another denoiser. Several branches are refreshed in different steps, so that steps cost
    about the same.
    """

    def __init__(self, guidance: Guidance, bases: Mapping[str, str]):
        """`bases`: the base of each perturbed branch, in an order in which they can be computed."""
        self.order = guidance.reuse_order or 0
        spacings = {UNCOND: guidance.reuse_cfg, **dict.fromkeys(bases, guidance.reuse)}
        self.spacings = {name: spacing for name, spacing in spacings.items() if spacing != EVERY}
        self.warm = {name: self._first(number) for number, name in enumerate(self.spacings)}
        self.base = {UNCOND: COND, **bases}  # the base of a perturbed branch may be the CFG result
        self.model, self.step = "", 0
        self.asked: dict[str, int] = {}  # the last step that needed a branch
        self.computed: dict[str, list[int]] = {}  # the steps in which it was computed
        self.differences: dict[str, list[tuple[Tensor, ...]]] = {}  # the last values, oldest first

    def recalled(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        if model != self.model:
            self.forget()
        self.model, self.step = model, step
        mine = [name for name in branches if name in self.spacings]
        for name in mine:
            if self.order and self.asked.get(name, step) < step - 1:
                self.computed.pop(name, None)
                self.differences.pop(name, None)
            self.asked[name] = step
        recalled = frozenset(name for name in mine if not self._due(name, step))
        for name in mine:
            if name not in recalled:
                self.computed.setdefault(name, []).append(step)
        return recalled

    def forget(self) -> None:
        self.asked, self.computed, self.differences = {}, {}, {}

    def complete(
        self, predictions: dict[str, tuple[Tensor, ...]], recalled: Collection[str], scale: Scale = None
    ) -> None:
        for name, base in self.base.items():
            if name in recalled:
                there, kept = self._of(base, predictions, scale), self._kept(name)
                predictions[name] = tuple(one - other for one, other in zip(there, kept, strict=True))
            elif name in self.spacings and name in predictions:
                pairs = zip(self._of(base, predictions, scale), predictions[name], strict=True)
                known = self.differences.get(name, [])
                self.differences[name] = [*known, tuple(one - other for one, other in pairs)][-self.order - 1 :]

    def _kept(self, name: str) -> tuple[Tensor, ...]:
        return carried_on(self.computed[name], self.differences[name], self.step)

    def _first(self, number: int) -> int:
        """The number of steps that compute the branch with this number before it is extrapolated."""
        spacing: Spacing = list(self.spacings.values())[number]
        if isinstance(spacing, tuple) or not self.order:
            return 1
        return WARM + number % spacing

    def _due(self, name: str, step: int) -> bool:
        return due(self.spacings[name], self.computed.get(name, []), step, self.warm[name])

    def _of(self, base: str, predictions: Mapping[str, tuple[Tensor, ...]], scale: Scale) -> tuple[Tensor, ...]:
        if base != GUIDED:
            return predictions[base]
        if UNCOND not in predictions:
            return predictions[COND]
        pairs = zip(predictions[UNCOND], predictions[COND], strict=True)
        return tuple(uncond + cast(Tensor, scale) * (cond - uncond) for uncond, cond in pairs)


def carried_on(computed: Sequence[int], known: Sequence[tuple[Tensor, ...]], step: int) -> tuple[Tensor, ...]:
    """Extrapolate the values of the last of these steps to another step."""
    if len(known) == 1:
        return known[0]
    weights = polynomial(computed[-len(known) :], step)
    return tuple(_weighed(weights, values) for values in zip(*known, strict=True))


def polynomial(steps: Sequence[int], step: int) -> list[float]:
    """The weight of each value in the extrapolation to another step."""
    weights = []
    for one in steps:
        weight = 1.0
        for other in steps:
            weight *= (step - other) / (one - other) if other != one else 1.0
        weights.append(weight)
    return weights


def _weighed(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = sum(weight * value.to(wide) for weight, value in zip(weights, values, strict=True))
    return cast(Tensor, total).to(values[0].dtype)
