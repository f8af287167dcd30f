"""cond - uncond loses its part along cond, except for a fraction of it.

This is the projection of adaptive projected guidance (APG, arXiv 2410.02416), without its momentum and norm threshold.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from stgfast.formulas import COND, UNCOND, Formula, Lost, register

if TYPE_CHECKING:
    from stgfast.guidance import Guidance


class AlongCond(Formula):
    name = "along-cond"
    words = "the part of cond - uncond along cond is removed (APG's projection)"
    of_cfg = True
    shares = True

    def lost(self, guidance: Guidance, branches: Collection[str]) -> Lost | None:
        return Lost(UNCOND, {COND: 1.0}, guidance.eta) if UNCOND in branches else None


register(AlongCond())
