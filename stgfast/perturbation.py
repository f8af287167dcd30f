"""One weak branch: frozen settings, checked when they are made. No tensors here."""

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
    """One weak branch: which layers are perturbed, how, and how far the result is pushed away from it.

    layers  block numbers, from 0, in the order in which the model runs them
    kind    `residual` (STG-R): the block passes its input through;
            `attention` (STG-A): the block's self-attention is the identity, output = V;
            `blur` (SEG, arXiv 2408.00760): its queries are blurred with a Gaussian over space, within every frame;
            `isolate`: attention between video and audio is off, for models that have both
    scale   w in the formula above; a step where it is 0 does not compute the branch
    of      the branch that is made weak: `cond`, or `uncond`
    base    what it is held against: `cond`, `uncond`, or `guided` (the CFG result). Left out: the same as `of`
    axis    `spatial` or `temporal`, for models with blocks or attention along each; left out: both
    sigma   of a blur, in tokens; infinity, which is the default as it is of SEG: the mean of the frame
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
        """What its kind is."""
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
