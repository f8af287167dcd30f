"""A block's self-attention is the identity: the output of each token is its V (STG-A, perturbed-attention guidance)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stgfast.errors import wrong
from stgfast.kinds import ATTENTION, RESIDUAL, Kind, Mark, register

if TYPE_CHECKING:
    from stgfast.batching.attention import Attention
    from stgfast.batching.layout import Layout, Unit
    from stgfast.perturbation import Perturbation


class IdentityAttention(Kind):
    name = ATTENTION
    alias = "STG-A"
    inside = True
    values = True

    def mark(self, part: Perturbation, unit: Unit, layout: Layout) -> Mark:
        if not unit.attentions and not self.changes(layout):
            raise wrong(f"kind of perturbation at layer {unit.layer}", part.kind, f"{RESIDUAL!r} for this model")
        if any("IPAdapter" in name for name in unit.processors):
            raise wrong(
                f"kind of perturbation at layer {unit.layer}, whose attention has an IP-Adapter",
                part.kind,
                f"{RESIDUAL!r}, or a layer without an IP-Adapter",
            )
        return Mark(self.name, axis="" if unit.axes == {part.axis} else part.axis)

    def attend(self, mark: Mark, attention: Attention) -> Any:
        return attention.identity()


register(IdentityAttention())
