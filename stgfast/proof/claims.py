"""Compare what an adapter says about the steps of a call with how they combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stgfast.batching.arguments import Arguments
from stgfast.batching.seam import Call
from stgfast.formulas import COND
from stgfast.guidance import Scale
from stgfast.integrations.spec import Adapter
from stgfast.proof.measure import Combined
from stgfast.proof.watch import Answer, Watch


class Claimed(NamedTuple):
    """What the adapter says about one step: the number of steps, the CFG scale, and the branches of each call."""

    steps: int
    scale: Scale
    calls: tuple[tuple[str, ...], ...]

    def mistaken(self, step: int, combined: Combined, adapter: Adapter) -> str:
        """The fact that differs from the measurement, and how; "" if none does."""
        groups = tuple(map(len, self.calls))
        if combined.groups != groups:
            claimed, seen = _calls(groups), _calls(combined.groups)
            where = f"in step {step + 1}"
            return f"protocol: the adapter says {adapter.protocol!r}, {claimed} {where}; the pipeline makes {seen}"
        branches, weights = self.branches, self.weights
        if _alike(weights, combined):
            return ""
        if _alike(weights[::-1], combined):
            return f"order: the adapter says {', '.join(branches)}; the pipeline takes them the other way around"
        cond = branches.index(COND)
        claimed, seen = _numbers(weights[cond]), _numbers(combined.weights[cond])
        return (
            f"live: the adapter says that step {step + 1} combines with a scale of {claimed}; the pipeline with {seen}"
        )

    @property
    def branches(self) -> list[str]:
        return [branch for turn in self.calls for branch in turn]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weights of these branches, by CFG with that scale."""
        scale = torch.as_tensor(1.0 if self.scale is None else self.scale).double().cpu()
        return tuple(scale if branch == COND else 1 - scale for branch in self.branches)


def claims_of(watch: Watch, stub: Answer, adapter: Adapter) -> list[Claimed]:
    """What the adapter says about each step, asked while the steps run, as the engine asks."""
    claims: dict[int, Claimed] = {}

    def answer(step: int, turn: int, name: str, plain: Call, arguments: Arguments) -> Any:
        if step not in claims:
            scale = adapter.live(watch.copy, watch.copied_call, name)
            claims[step] = Claimed(adapter.steps(watch.copy), scale, adapter.calls(scale is not None))
        return stub(step, turn, name, plain, arguments)

    watch.run(answer, thin=True)
    return [claims[step] for step in sorted(claims)]


def end_of_parts(steps: Sequence[int]) -> int:
    """Where the parts of a clip end, from the number of steps that each step's part has."""
    end = 0
    while end < len(steps):
        end += max(steps[end], 1)
    return end


def _alike(claimed: Sequence[Tensor], combined: Combined) -> bool:
    pairs = zip(claimed, combined.weights, strict=True)
    return all(bool(((a - b).abs() <= combined.exactness * (1 + b.abs())).all()) for a, b in pairs)


def _numbers(scale: Tensor) -> str:
    numbers = sorted({round(float(number), 4) for number in scale.flatten()})
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def _calls(groups: tuple[int, ...]) -> str:
    each = " and ".join(f"{count} prediction{'s' if count > 1 else ''}" for count in groups)
    return f"{len(groups)} call{'s' if len(groups) > 1 else ''} ({each})"
