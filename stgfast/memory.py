"""What a run keeps from step to step, so that a step need not compute it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from stgfast.guidance import Scale

if TYPE_CHECKING:
    from torch import Tensor


class Memory(Protocol):
    """One way to keep what branches gave, by the branch and by the denoiser that it was computed with."""

    def recalled(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        """Those of a step's branches that need not be computed, with a model that is called by this name."""

    def forget(self) -> None:
        """What is kept says nothing of the steps that follow: noise was added."""

    def complete(
        self, predictions: dict[str, tuple[Tensor, ...]], recalled: Collection[str], scale: Scale = None
    ) -> None:
        """Put in the recalled branches, and keep what later steps need of the others. A prediction has as many tensors
        as the denoiser has outputs."""
