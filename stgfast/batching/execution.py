"""How a guided call runs, whatever its guidance is: its result is the same, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stgfast.batching.room import Rows

AUTO = "auto"


@dataclass(frozen=True)
class Execution:
    """What `accelerate` was asked for beside guidance.

    max_rows     the most samples that a block computes at once
    compilation  the arguments of torch.compile, where blocks are to be compiled
    attention    AUTO: the fastest for every shape, in layers that nothing is done to as well; None: as the model has it
    """

    max_rows: Rows = None
    compilation: Mapping[str, Any] | None = None
    attention: str | None = None


AS_IT_IS = Execution()
