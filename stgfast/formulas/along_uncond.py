"""cond - uncond loses its part along uncond: uncond is scaled to be as near to cond as possible.

This is the optimized scale of CFG-Zero* (arXiv 2503.18886). Its zeroed first steps are `start` of the guidance.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from stgfast.formulas import UNCOND, Formula, Lost, register

if TYPE_CHECKING:
    from stgfast.guidance import Guidance


class AlongUncond(Formula):
    name = "along-uncond"
    words = "the part of cond - uncond along uncond is removed (CFG-Zero*'s scale)"
    of_cfg = True

    def lost(self, guidance: Guidance, branches: Collection[str]) -> Lost | None:
        return Lost(UNCOND, {UNCOND: 1.0}) if UNCOND in branches else None


register(AlongUncond())
