"""The second perturbation's difference loses its part along the first one's (arXiv 2411.18664, Eq. 21)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from stgfast.errors import wrong
from stgfast.formulas import COND, Formula, Lost, register

if TYPE_CHECKING:
    from stgfast.guidance import Guidance


class Orthogonal(Formula):
    name = "orthogonal"
    words = "the part of the second perturbation along the first one is removed"

    def check(self, guidance: Guidance) -> None:
        held = [f"{part.of} against {part.base}" for part in guidance.perturbations]
        if held != [f"{COND} against {COND}"] * 2:
            raise wrong("perturbations with project='orthogonal'", held, f"two of {COND} against {COND}")

    def lost(self, guidance: Guidance, branches: Collection[str]) -> Lost | None:
        first, second = guidance.names
        return Lost(second, {COND: 1.0, first: -1.0}) if {first, second} <= set(branches) else None


register(Orthogonal())
