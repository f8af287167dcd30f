"""The kinds of perturbation, one in each file: how a branch is perturbed, and how a block computes it.

A file has one subclass of `Kind` and calls `register(...)`. Files in this folder are found automatically; one elsewhere
counts when it is imported. Settings need no torch, so none of these files imports it at the top.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stgfast.errors import wrong

if TYPE_CHECKING:
    from stgfast.batching.attention import Attention
    from stgfast.batching.layout import Layout, Unit
    from stgfast.perturbation import Perturbation

KINDS: dict[str, Kind] = {}
RESIDUAL, ATTENTION, BLUR, ISOLATE = "residual", "attention", "blur", "isolate"  # those here
AXES = SPATIAL, TEMPORAL = ("spatial", "temporal")


@dataclass(frozen=True)
class Mark:
    """What a perturbation does to one unit of a model. Equal marks do the same.

    Attributes:
        axis: the axis whose attention changes, if the unit has attention along several.
    """

    kind: str
    axis: str = ""
    sigma: float | None = None


class Kind:
    """One kind of perturbation.

    Attributes:
        name: its name in settings.
        alias: its name in papers, for messages.
        passes: the block does not run: it returns its input.
        inside: the block runs, and `attend` replaces its self-attention.
        values: the output of self-attention is V, which one attention call can compute beside rows that attend.
        grid: it needs the positions of tokens.
    """

    name = ""
    alias = ""
    passes = False
    inside = False
    values = False
    grid = False

    def sigma(self, given: float | None) -> float | None:
        """The sigma of a perturbation of this kind; most kinds have none."""
        if given is not None:
            raise wrong(f"sigma of a perturbation of kind {self.name!r}", given, "none: only kind 'blur' has a sigma")
        return None

    def check(self, part: Perturbation) -> None:
        """Raise if a perturbation is wrong for any model."""

    def suits(self, layout: Layout) -> bool:
        """Whether a model supports this kind."""
        return True

    def mark(self, part: Perturbation, unit: Unit, layout: Layout) -> Mark | None:
        """What the perturbation does to a unit in its layers and along its axis: a mark, or None."""
        return Mark(self.name)

    def changes(self, layout: Layout) -> Mapping[str, Any]:
        """The arguments of a block that ask for this kind, for a model that supports it itself."""
        return layout.blocks.changes.get(self.name, {})

    def concerns(self, mark: Mark, axis: str) -> bool:
        """Whether the attention along an axis changes."""
        return mark.axis in ("", axis)

    def attend(self, mark: Mark, attention: Attention) -> Any:
        """The output of a self-attention in the block, for rows with this mark."""
        raise NotImplementedError(f"kind {self.name!r} changes no attention")


def register(kind: Kind) -> None:
    """Make a kind known to settings."""
    KINDS[kind.name] = kind


def kind_of(mark: Mark) -> Kind:
    return KINDS[mark.kind]


def names() -> str:
    """All kinds with their aliases, for messages."""
    *others, last = (f"{name!r} ({kind.alias})" if kind.alias else repr(name) for name, kind in KINDS.items())
    return f"{', '.join(others)} or {last}"


for found in sorted(pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{found.name}")
