"""The projections of the guidance formula, one in each file: which difference loses its part along which direction.

A file has one subclass of `Formula` and calls `register(...)`. Files in this folder are found automatically; one
elsewhere counts when it is imported.
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
    """The difference of a branch from cond loses its part along a sum of branches, except for a fraction of it.

    Attributes:
        along: the direction, as numbers by branch.
    """

    of: str
    along: Mapping[str, float]
    left: float = 0.0


class Formula:
    """One projection.

    Attributes:
        name: its name in `Guidance(project=...)`.
        words: what it does, as `explain` prints it.
        of_cfg: it changes cond - uncond, so it does nothing without CFG.
        shares: `eta` of the guidance is the fraction that stays.
    """

    name = ""
    words = ""
    of_cfg = False
    shares = False

    def check(self, guidance: Guidance) -> None:
        """Raise if a guidance does not fit this formula."""

    def lost(self, guidance: Guidance, branches: Collection[str]) -> Lost | None:
        """What is removed in a step with these branches; None if a branch that it needs has no weight."""
        raise NotImplementedError


def register(formula: Formula) -> None:
    """Make a formula known to settings."""
    FORMULAS[formula.name] = formula


for found in sorted(pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{found.name}")
