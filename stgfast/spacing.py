"""Which steps compute a value that the others extrapolate: each n-th step, or a list. This module needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stgfast.errors import SettingsError, wrong

Spacing = int | tuple[int, ...]  # 1 is off: every step computes
EVERY = 1
REUSE = BRANCHES, CFG, BLOCKS = ("reuse", "reuse_cfg", "reuse_blocks")
ORDER = "reuse_order"


def checked(name: str, given: object) -> Spacing:
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        steps = tuple(given)
        whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
        if steps and whole and steps[0] >= 0 and list(steps) == sorted(set(steps)):
            return steps
    raise wrong(name, given, "a number of steps, 1 (off) or more, or the numbers of the steps that compute, rising")


def settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of reuse, with the order of the polynomial; no order if nothing is reused."""
    made: dict[str, Any] = {name: checked(name, given[name]) for name in REUSE}
    reused, order = [name for name in REUSE if made[name] != EVERY], given[ORDER]
    if BLOCKS in reused and len(reused) > 1:
        raise SettingsError(f"{BLOCKS} with {' and '.join(reused[:-1])}: got both, expected one of them")
    if order is None:
        return {**made, ORDER: (1 if BLOCKS in reused else 2) if reused else None}
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= 2:
        raise wrong(ORDER, order, "0, 1 or 2")
    if not reused:
        raise wrong(ORDER, order, f"{', '.join(REUSE[:-1])} or {REUSE[-1]} above 1 beside it")
    return {**made, ORDER: order}


def check_steps(name: str, spacing: Spacing, steps: int) -> None:
    """Raise if a run of this number of steps does not have the listed steps."""
    if isinstance(spacing, tuple) and spacing[-1] >= steps:
        raise SettingsError(f"{name}: got step {spacing[-1]}, expected those of a run of {steps} steps, from 0")


def due(spacing: Spacing, computed: Sequence[int], step: int, warm: int) -> bool:
    """Whether a step computes the value, given the steps that did. The first `first` steps all do."""
    if len(computed) < warm:
        return True
    return step in spacing if isinstance(spacing, tuple) else step - computed[-1] >= spacing


def in_words(spacing: Spacing) -> str:
    return f"{spacing}" if isinstance(spacing, int) else f"but in steps {', '.join(map(str, spacing))}"


def when(spacing: Spacing) -> str:
    """The steps that compute, in words."""
    if isinstance(spacing, int):
        return f"every {({2: '2nd', 3: '3rd'}).get(spacing, f'{spacing}th')} step"
    return f"steps {', '.join(map(str, spacing))}"


def spaced(steps: int, first: int, gap: int) -> tuple[int, ...]:
    """The steps that compute, out of a number of steps: the first few, then each n-th one, and the last one."""
    return tuple(sorted({*range(min(first, steps)), *range(first - 1 + gap, steps, gap), steps - 1}))


def eased(steps: int, first: int, gap: int) -> tuple[int, ...]:
    """Like `spaced`, with gaps that grow to that size one by one."""
    found, at, growing = set(range(min(first, steps))), first - 1, 1
    while at < steps:
        found.add(at)
        growing = min(growing + 1, gap)
        at += growing
    return tuple(sorted({*found, steps - 1}))


def thinning(steps: int, first: int, growth: float) -> tuple[int, ...]:
    """The steps that compute, out of a number of steps: the first few, then each second one, then fewer and fewer."""
    found, gap, at = list(range(min(first, steps))), 2.0, first + 1.0
    while at < steps:
        found.append(round(at))
        gap *= 1 + growth
        at += gap
    return tuple(step for step in found if step < steps)
