"""How a guided call runs, independent of its guidance. The result is the same up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stgfast.batching.room import Rows

if TYPE_CHECKING:
    from stgfast.ranks.wire import Ranks

AUTO = "auto"


@dataclass(frozen=True)
class Execution:
    """What `accelerate` was asked for beside guidance.

    Attributes:
        max_rows: the largest number of samples that a block computes at once.
        compilation: the arguments of torch.compile, if blocks are compiled.
        attention: AUTO, the fastest kernel for each shape, also in unperturbed layers; None, the model's own.
        ranks: the processes over which the branches of each step are divided.
    """

    max_rows: Rows = None
    compilation: Mapping[str, Any] | None = None
    attention: str | None = None
    ranks: Ranks | None = None


AS_IT_IS = Execution()
