"""Differences between branches, kept from the step that computed them for steps after it.

An approximation, and off by default. What guidance adds, `base - p` and `c - u`, changes slowly from step to step; the
predictions themselves do not. A branch that is not computed is taken to be as far from its base as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import Tensor

from stgfast.guidance import COND, GUIDED, UNCOND, Guidance, Scale


class Kept:
    """The differences that one run keeps."""

    def __init__(self, guidance: Guidance):
        every = {UNCOND: guidance.reuse_cfg, **dict.fromkeys(guidance.names, guidance.reuse)}
        self.every = {name: steps for name, steps in every.items() if steps > 1}
        # In the order in which they can be put together: a perturbed branch may be held against the CFG result.
        self.base = {UNCOND: COND, **dict(zip(guidance.names, (p.base for p in guidance.perturbations), strict=True))}
        self.model = ""
        self.step: dict[str, int] = {}  # in which a branch was computed last
        self.far: dict[str, Tensor] = {}

    def old(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        """Those of a step's branches that need not be computed, with a model that is called by this name."""
        if model != self.model:
            self.model, self.step, self.far = model, {}, {}
        old = frozenset(name for name in branches if name in self.step and step - self.step[name] < self.every[name])
        self.step |= {name: step for name in branches if name in self.every and name not in old}
        return old

    def complete(self, predictions: dict[str, Tensor], old: Collection[str], scale: Scale) -> None:
        """Put in the old branches, and keep how far the new ones are from their bases."""
        for name, base in self.base.items():
            if name in old:
                predictions[name] = self._of(base, predictions, scale) - self.far[name]
            elif name in self.every and name in predictions:
                self.far[name] = self._of(base, predictions, scale) - predictions[name]

    def _of(self, base: str, predictions: Mapping[str, Tensor], scale: Scale) -> Tensor:
        if base != GUIDED:
            return predictions[base]
        if UNCOND not in predictions:
            return predictions[COND]
        uncond = predictions[UNCOND]
        return uncond + cast(Tensor, scale) * (predictions[COND] - uncond)
