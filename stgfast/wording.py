"""Guidance settings in words, as `print(guidance)` and `explain` show them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from stgfast import spacing
from stgfast.formulas import COND
from stgfast.perturbation import Perturbation
from stgfast.schedules import in_words
from stgfast.spacing import REUSE

if TYPE_CHECKING:
    from stgfast.guidance import Guidance


def of_guidance(guidance: Guidance) -> str:
    """One line of text. Perturbations that differ only in their axis are one entry."""
    axes: dict[Perturbation, list[str]] = {}
    for part in guidance.perturbations:
        axes.setdefault(replace(part, axis=""), []).append(part.axis)
    words = [_of_perturbation(part, along) for part, along in axes.items()]
    if guidance.cfg is not None:
        words.append(f"CFG scale {in_words(guidance.cfg)}")
    if guidance.rescale != 0.0:
        words.append(f"rescale {in_words(guidance.rescale)}")
    if (guidance.start, guidance.stop) != (0.0, 1.0):
        words.append(f"from {guidance.start:g} to {guidance.stop:g} of the run")
    if guidance.project:
        words.append(f"{guidance.project}{f', eta {guidance.eta:g}' if guidance.eta else ''}")
    for name in REUSE:
        if getattr(guidance, name) != spacing.EVERY:
            words.append(f"{name} {spacing.in_words(getattr(guidance, name))}")
    if guidance.reuse_order:
        words.append(f"order {guidance.reuse_order}")
    return "; ".join(words) or "CFG alone"


def _of_perturbation(part: Perturbation, axes: list[str]) -> str:
    of = "" if part.of == part.base == COND else f" of {part.of} against {part.base}"
    where = f"layer{'s' if len(part.layers) > 1 else ''} {', '.join(map(str, part.layers))}"
    blur = "" if part.sigma in (None, math.inf) else f", sigma {part.sigma:g}"
    named = "".join(f", {axis}" for axis in axes if axis)
    return f"{part.kind}{of}, {where}{named}{blur}, scale {in_words(part.scale)}"
