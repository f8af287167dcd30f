"""Differences between branches, kept from the step that computed them for steps after it.

An approximation, and off by default. What guidance adds, `base - p` and `c - u`, changes slowly from step to step; the
predictions themselves do not. A branch that is not computed is taken to be as far from its base as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import Tensor

from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.guidance import Guidance, Scale


class KeptDifferences:
    """A memory of how far branches were from their bases."""

    def __init__(self, guidance: Guidance):
        every = {UNCOND: guidance.reuse_cfg, **dict.fromkeys(guidance.names, guidance.reuse)}
        self.every = {name: steps for name, steps in every.items() if steps > 1}
        # In the order in which they can be put together: a perturbed branch may be held against the CFG result.
        self.base = {UNCOND: COND, **dict(zip(guidance.names, (p.base for p in guidance.perturbations), strict=True))}
        self.model = ""
        self.step: dict[str, int] = {}  # in which a branch was computed last
        self.differences: dict[str, Tensor] = {}

    def recalled(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        if model != self.model:
            self.model, self.step, self.differences = model, {}, {}
        known = [name for name in branches if name in self.step]
        recalled = frozenset(name for name in known if step - self.step[name] < self.every[name])
        self.step |= {name: step for name in branches if name in self.every and name not in recalled}
        return recalled

    def complete(self, predictions: dict[str, Tensor], recalled: Collection[str], scale: Scale) -> None:
        for name, base in self.base.items():
            if name in recalled:
                predictions[name] = self._of(base, predictions, scale) - self.differences[name]
            elif name in self.every and name in predictions:
                self.differences[name] = self._of(base, predictions, scale) - predictions[name]

    def _of(self, base: str, predictions: Mapping[str, Tensor], scale: Scale) -> Tensor:
        if base != GUIDED:
            return predictions[base]
        if UNCOND not in predictions:
            return predictions[COND]
        uncond = predictions[UNCOND]
        return uncond + cast(Tensor, scale) * (predictions[COND] - uncond)
