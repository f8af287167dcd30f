"""Differences between branches, computed in some steps and carried on to the others.

An approximation, and off by default. What guidance adds, `base - p` and `c - u`, changes smoothly from step to step;
the predictions themselves do not. Where a branch is not computed, its difference is taken from a polynomial through the
last values that were computed: order 0 is the last one, order 1 a line through two, order 2 a parabola through three.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.guidance import Guidance, Scale

WARM = 2  # steps that are computed first, where values are carried on and not only held


class KeptDifferences:
    """A memory of how far branches were from their bases.

    What is kept of a branch is its own: one that was left out for a while, as its weight was 0, begins anew, and so do
    all with another denoiser. Refreshes of several branches are staggered, so that steps cost about the same.
    """

    def __init__(self, guidance: Guidance):
        self.order = guidance.reuse_order or 0
        every = {UNCOND: guidance.reuse_cfg, **dict.fromkeys(guidance.names, guidance.reuse)}
        self.every = {name: steps for name, steps in every.items() if steps > 1}
        staggered = {name: WARM + number % self.every[name] for number, name in enumerate(self.every)}
        self.warm = staggered if self.order else dict.fromkeys(self.every, 1)
        # In the order in which they can be put together: a perturbed branch may be held against the CFG result.
        self.base = {UNCOND: COND, **dict(zip(guidance.names, (p.base for p in guidance.perturbations), strict=True))}
        self.model, self.step = "", 0
        self.asked: dict[str, int] = {}  # the last step that needed a branch
        self.computed: dict[str, list[int]] = {}  # the steps in which it was computed
        self.differences: dict[str, list[Tensor]] = {}  # the last of these, oldest first

    def recalled(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        if model != self.model:
            self.forget()
        self.model, self.step = model, step
        mine = [name for name in branches if name in self.every]
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

    def complete(self, predictions: dict[str, Tensor], recalled: Collection[str], scale: Scale) -> None:
        for name, base in self.base.items():
            if name in recalled:
                predictions[name] = self._of(base, predictions, scale) - self._carried_on(name)
            elif name in self.every and name in predictions:
                known = self.differences.get(name, [])
                difference = self._of(base, predictions, scale) - predictions[name]
                self.differences[name] = [*known, difference][-self.order - 1 :]

    def _due(self, name: str, step: int) -> bool:
        computed = self.computed.get(name, [])
        return len(computed) < self.warm[name] or step - computed[-1] >= self.every[name]

    def _carried_on(self, name: str) -> Tensor:
        known = self.differences[name]
        if len(known) == 1:
            return known[0]
        weights = polynomial(self.computed[name][-len(known) :], self.step)
        wide = torch.promote_types(known[0].dtype, torch.float32)
        total = sum(weight * value.to(wide) for weight, value in zip(weights, known, strict=True))
        return cast(Tensor, total).to(known[0].dtype)

    def _of(self, base: str, predictions: Mapping[str, Tensor], scale: Scale) -> Tensor:
        if base != GUIDED:
            return predictions[base]
        if UNCOND not in predictions:
            return predictions[COND]
        uncond = predictions[UNCOND]
        return uncond + cast(Tensor, scale) * (predictions[COND] - uncond)


def polynomial(steps: Sequence[int], step: int) -> list[float]:
    """By how much each of the values at these steps counts at another, on the polynomial through all of them."""
    weights = []
    for one in steps:
        weight = 1.0
        for other in steps:
            weight *= (step - other) / (one - other) if other != one else 1.0
        weights.append(weight)
    return weights
