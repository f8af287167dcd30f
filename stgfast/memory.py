"""Values that a run stores from step to step, so that a later step need not compute them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from stgfast.guidance import Scale

if TYPE_CHECKING:
    from torch import Tensor


class Memory(Protocol):
    """One way to store values of branches, by branch and denoiser."""

    def recalled(self, branches: Collection[str], step: int, model: str) -> frozenset[str]:
        """The branches of a step that need not be computed, with the denoiser of this name."""

    def forget(self) -> None:
        """Drop all values: noise was added, so they do not fit the coming steps."""

    def complete(
        self, predictions: dict[str, tuple[Tensor, ...]], recalled: Collection[str], scale: Scale = None
    ) -> None:
        """Add the recalled branches, and store what later steps need of the others. A prediction has one tensor for
        each output of the denoiser.
        """
