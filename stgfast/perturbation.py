"""The settings of one perturbed branch: frozen, and checked when they are made. This module needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stgfast import kinds
from stgfast.errors import wrong
from stgfast.formulas import COND, GUIDED, UNCOND
from stgfast.kinds import AXES, Kind
from stgfast.schedules import Schedule, checked, set_frozen


@dataclass(frozen=True)
class Perturbation:
    """One perturbed branch: which layers are perturbed, how, and how far the result is pushed away from it.

    Args:
        layers: block numbers, from 0, in the order in which the model runs them.
        kind: `"residual"` (STG-R): the block returns its input. `"attention"` (STG-A): the block's self-attention is
            the identity, output = V. `"blur"` (SEG, arXiv 2408.00760): its queries are blurred by a Gaussian within
            each frame. `"isolate"`: no attention between video and audio, for models that have both.
        scale: the weight w of the difference, or a schedule. A step where it is 0 does not compute the branch.
        of: the branch that is perturbed: `"cond"` or `"uncond"`.
        base: the branch that it is subtracted from: `"cond"`, `"uncond"` or `"guided"` (the CFG result). Default: `of`.
        axis: `"spatial"` or `"temporal"`, for models with blocks or attention along each. Default: both.
        sigma: the width of a blur, in tokens. Default: infinity, the mean of the frame.

    Raises:
        SettingsError: a setting is wrong.

    Example:
        >>> stgfast.Perturbation([8], kind="attention", scale=2.0).layers
        (8,)
    """

    layers: Sequence[int]
    kind: str = "residual"
    scale: Schedule = 1.0
    of: str = COND
    base: str = ""
    axis: str = ""
    sigma: float | None = None

    def __post_init__(self) -> None:
        set_frozen(self, "layers", _layers(self.layers))
        if not isinstance(self.kind, str) or self.kind not in kinds.KINDS:
            raise wrong("kind of perturbation", self.kind, kinds.names())
        set_frozen(self, "scale", checked("scale", self.scale))
        if self.of not in (COND, UNCOND):
            raise wrong("perturbed branch `of`", self.of, "'cond' or 'uncond'")
        set_frozen(self, "base", self.base or self.of)
        if self.base not in (COND, UNCOND, GUIDED):
            raise wrong("`base` of a perturbation", self.base, "'cond', 'uncond' or 'guided'")
        if self.axis not in ("", *AXES):
            raise wrong("axis of a perturbation", self.axis, "'spatial', 'temporal', or '' for both")
        set_frozen(self, "sigma", self.how.sigma(self.sigma))
        self.how.check(self)

    @property
    def how(self) -> Kind:
        """The implementation of its kind."""
        return kinds.KINDS[self.kind]

    @property
    def needs_cfg(self) -> bool:
        return UNCOND in (self.of, self.base)


def _layers(given: object) -> tuple[int, ...]:
    right = "layer numbers such as [8] or [7, 8, 9], counted from 0"
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise wrong("layers", given, right)
    layers = list(given)
    if not layers or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 0 for n in layers):
        raise wrong("layers", layers, right)
    return tuple(sorted({n.__index__() for n in layers}))
