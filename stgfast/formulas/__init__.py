"""The formulas beside a weighted sum, one a file: of which difference is something lost, and along which direction.

A file has one subclass of `Formula`, and says `register(...)`. Files here are found by themselves; one that lies
elsewhere is known once it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from stgfast.guidance import Guidance

FORMULAS: dict[str, Formula] = {}
COND, UNCOND, GUIDED = "cond", "uncond", "guided"  # branches by name; the last one is the CFG result


class Lost(NamedTuple):
    """Of the difference of a branch from cond, what lies along a sum of branches is lost, but for a share of it.

    along  the direction: numbers by branch
    """

    of: str
    along: Mapping[str, float]
    left: float = 0.0


class Formula:
    """One formula.

    name    as `Guidance(project=...)` has it
    words   what it does, as `explain` says it
    of_cfg  it is about cond - uncond, so that a call without CFG has none of it
    shares  `eta` of a guidance says how much is left
    """

    name = ""
    words = ""
    of_cfg = False
    shares = False

    def check(self, guidance: Guidance) -> None:
        """Raise where a guidance is none of this formula."""

    def lost(self, guidance: Guidance, branches: Collection[str]) -> Lost | None:
        """What is lost in a step that weighs these branches; none where one of those that it needs has no weight."""
        raise NotImplementedError


def register(formula: Formula) -> None:
    """Settings may say this formula from now on."""
    FORMULAS[formula.name] = formula


for found in sorted(pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{found.name}")
