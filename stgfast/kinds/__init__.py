"""The kinds of perturbation, one a file: what makes a branch weak, and how a model's block does it.

A file has one subclass of `Kind`, and says `register(...)`. Files here are found by themselves; one that lies elsewhere
is known once it is imported. No tensors are needed to read settings, so none of these files imports torch at its top.
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
    """What a perturbation does to one unit of a model. Marks that are equal do the same.

    axis  where it changes the attentions along one axis alone, and the unit has more
    """

    kind: str
    axis: str = ""
    sigma: float | None = None


class Kind:
    """One kind of perturbation.

    name    as settings have it
    alias   as papers have it, for messages
    passes  the block does not run: it passes its input through
    inside  the block runs, and `attend` stands in for its self-attentions
    values  the output of these is V, which an attention for many rows can do beside rows that attend
    grid    it has to know where tokens lie
    """

    name = ""
    alias = ""
    passes = False
    inside = False
    values = False
    grid = False

    def sigma(self, given: float | None) -> float | None:
        """The sigma of a perturbation of this kind, as it is settled; most have none."""
        if given is not None:
            raise wrong(f"sigma of a perturbation of kind {self.name!r}", given, "none: it is that of 'blur'")
        return None

    def check(self, part: Perturbation) -> None:
        """Whatever else of a perturbation cannot be, whatever the model."""

    def suits(self, layout: Layout) -> bool:
        """Whether a model has this kind at all."""
        return True

    def mark(self, part: Perturbation, unit: Unit, layout: Layout) -> Mark | None:
        """What the perturbation does to a unit of its layers that has its axis: nothing, or what the mark says."""
        return Mark(self.name)

    def changes(self, layout: Layout) -> Mapping[str, Any]:
        """The arguments with which a block is called, in place of others, where the model itself knows the kind."""
        return layout.blocks.changes.get(self.name, {})

    def concerns(self, mark: Mark, axis: str) -> bool:
        """Whether an attention along an axis is changed."""
        return mark.axis in ("", axis)

    def attend(self, mark: Mark, attention: Attention) -> Any:
        """What an attention inside of the block returns, for rows with this mark."""
        raise NotImplementedError(f"kind {self.name!r} changes no attention")


def register(kind: Kind) -> None:
    """Settings may say this kind from now on."""
    KINDS[kind.name] = kind


def kind_of(mark: Mark) -> Kind:
    return KINDS[mark.kind]


def names() -> str:
    """Every kind with its alias, as a message has them."""
    *others, last = (f"{name!r} ({kind.alias})" if kind.alias else repr(name) for name, kind in KINDS.items())
    return f"{', '.join(others)} or {last}"


for found in sorted(pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{found.name}")
