"""A block returns its input (STG-R, skip-layer guidance)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stgfast.errors import wrong
from stgfast.kinds import RESIDUAL, Kind, Mark, register

if TYPE_CHECKING:
    from stgfast.batching.layout import Layout, Unit
    from stgfast.perturbation import Perturbation


class Residual(Kind):
    name = RESIDUAL
    alias = "STG-R"
    passes = True

    def mark(self, part: Perturbation, unit: Unit, layout: Layout) -> Mark:
        if part.axis and unit.axes != {part.axis}:
            raise wrong(
                "residual perturbation along an axis", part.axis, "none: the blocks of this model are not split by axis"
            )
        return Mark(self.name)


register(Residual())
