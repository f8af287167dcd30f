"""The sum that a model's blocks add to the hidden states: computed in some steps, extrapolated to the others.

An approximation, off by default. In an extrapolated step no block runs: the sum for a branch comes from a polynomial
through the last computed ones, and is added to the input of the first block, which is known. What comes before and
after the blocks runs as usual.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from stgfast.errors import EngineError
from stgfast.guidance import Guidance
from stgfast.reuse import WARM, carried_on
from stgfast.spacing import EVERY, due


class KeptBlocks:
    """A memory of block residuals, by branch: what all blocks together added to the hidden states.

    One decision in each step holds for all branches. It is made before the step, and does not read values from the
    device.
    """

    def __init__(self, guidance: Guidance):
        self.spacing, self.order = guidance.reuse_blocks, guidance.reuse_order or 0
        self.warm = WARM if self.order and not isinstance(self.spacing, tuple) else 1
        self.model, self.step = "", 0
        self.left: tuple[bool, ...] = ()  # which hidden states the last block returns
        self.asked: dict[str, int] = {}  # the last step that needed a branch
        self.computed: dict[str, list[int]] = {}  # the steps in which it was computed
        self.added: dict[str, list[tuple[Tensor, ...]]] = {}  # the last of what was added, oldest first

    @property
    def ends(self) -> KeptBlocks | None:
        """This memory, if there is anything to store."""
        return None if self.spacing == EVERY else self

    def skips(self, branches: Collection[str], step: int, model: str) -> bool:
        """Whether no block runs in this step, which needs these branches."""
        if self.spacing == EVERY:
            return False
        if model != self.model:
            self.forget()
        self.model, self.step = model, step
        for name in branches:
            if self.asked.get(name, step) < step - 1:  # it was left out for a while
                self.computed.pop(name, None)
                self.added.pop(name, None)
            self.asked[name] = step
        computes = any(due(self.spacing, self.computed.get(name, []), step, self.warm) for name in branches)
        for name in branches if computes else ():
            self.computed.setdefault(name, []).append(step)
        return not computes

    def forget(self) -> None:
        self.asked, self.computed, self.added = {}, {}, {}

    def seen(self, branches: Sequence[str], before: Sequence[Tensor], after: Sequence[Tensor | None]) -> None:
        """Store block residuals. Hidden states have the same number of rows for each branch."""
        there = [(one, other) for one, other in zip(before, after, strict=True) if other is not None]
        self.left = tuple(other is not None for other in after)
        for one, other in there:
            if one.shape != other.shape:
                raise EngineError(
                    f"hidden states of reuse_blocks: got {tuple(one.shape)} before the blocks and {tuple(other.shape)} "
                    f"after them, expected the same; reuse and reuse_cfg need no such thing"
                )
        added = [(other - one).chunk(len(branches)) for one, other in there]
        for name, parts in zip(branches, zip(*added, strict=True), strict=True):
            self.added[name] = [*self.added.get(name, []), tuple(parts)][-self.order - 1 :]

    def carried(self, branches: Sequence[str], before: Sequence[Tensor]) -> list[Tensor | None]:
        """The hidden states that the blocks would return."""
        made = [carried_on(self.computed[name], self.added[name], self.step) for name in branches]
        added = iter(torch.cat(parts) for parts in zip(*made, strict=True))
        return [rows + next(added) if left else None for rows, left in zip(before, self.left, strict=True)]
