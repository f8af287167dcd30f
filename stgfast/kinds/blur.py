"""The queries of a block's self-attention are blurred by a Gaussian over space, within each frame (SEG)."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from stgfast.errors import SettingsError, wrong
from stgfast.kinds import BLUR, TEMPORAL, Kind, Mark, register

if TYPE_CHECKING:
    from torch import Tensor

    from stgfast.batching.attention import Attention
    from stgfast.batching.layout import Layout, Unit
    from stgfast.perturbation import Perturbation


class Blur(Kind):
    name = BLUR
    alias = "SEG"
    inside = True
    grid = True

    def sigma(self, given: float | None) -> float:
        right = "a number of tokens above 0, or infinity"
        # JSON has no number for infinity.
        number: object = math.inf if given is None or str(given) == "inf" else given
        if isinstance(number, bool) or not hasattr(number, "__float__"):
            raise wrong("sigma", given, right)
        plain = float(cast(Real, number))
        if not plain > 0:
            raise wrong("sigma", given, right)
        return plain

    def check(self, part: Perturbation) -> None:
        if part.axis == TEMPORAL:
            raise wrong("axis of a blur", part.axis, "'spatial' or '': queries are blurred within frames")

    def suits(self, layout: Layout) -> bool:
        return layout.blocks.grid is not None

    def mark(self, part: Perturbation, unit: Unit, layout: Layout) -> Mark | None:
        attentions = [attention for axis, attention in unit.attentions if axis != TEMPORAL]
        if any(getattr(attention, "fused_projections", False) for attention in attentions):
            raise SettingsError(
                f"blur of the queries at layer {unit.layer}: got fused projections, expected one of the queries alone; "
                f"call unfuse_qkv_projections()"
            )
        return Mark(self.name, sigma=part.sigma) if attentions else None

    def concerns(self, mark: Mark, axis: str) -> bool:
        return axis != TEMPORAL

    def attend(self, mark: Mark, attention: Attention) -> Any:
        from stgfast.kernels import blur

        frames, height, width = grid = attention.tokens

        def blurred(queries: Tensor) -> Tensor:
            first = queries.shape[1] - frames * height * width if attention.video_last else 0
            return blur(queries, grid, cast(float, mark.sigma), first=first)

        return attention.with_queries(blurred)


register(Blur())
