"""How a guided call runs, whatever its guidance is: its result is the same, but for rounding."""

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

    max_rows     the most samples that a block computes at once
    compilation  the arguments of torch.compile, where blocks are to be compiled
    attention    AUTO: the fastest for every shape, in layers that nothing is done to as well; None: as the model has it
    ranks        the processes over which the branches of every step are divided
    """

    max_rows: Rows = None
    compilation: Mapping[str, Any] | None = None
    attention: str | None = None
    ranks: Ranks | None = None


AS_IT_IS = Execution()
