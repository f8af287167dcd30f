"""What guides a clip: frozen settings, checked when they are made. No tensors here.

A guided prediction is a weighted sum of branch predictions. With `u` the unconditional branch, `c` the conditional one
and `p_i` the perturbed ones, CFG and Spatiotemporal Skip Guidance (arXiv 2411.18664) together are

    g = u + s (c - u) + sum_i w_i (base_i - p_i)

where `base_i` is what the perturbed branch is held against: the branch it is a weak copy of, or the CFG result. An
optional rescale follows: `g *= phi * std(c) / std(g) + 1 - phi`, the standard deviations taken per prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from stgfast.errors import SettingsError, wrong

RESIDUAL, ATTENTION, ISOLATE = KINDS = ("residual", "attention", "isolate")
COND, UNCOND, GUIDED = "cond", "uncond", "guided"
AXES = ("spatial", "temporal")

# A number; one number for every step; or a function of the step's progress, from 0 up to (not including) 1.
Schedule = float | Sequence[float] | Callable[[float], float]
# A pipeline's CFG scale: none, a number, or a number for every frame in whatever form the pipeline has it.
Scale = None | float | Any


class Moment(NamedTuple):
    """Where a denoising run stands: step `step` of `steps`, counted from 0."""

    step: int
    steps: int

    @property
    def progress(self) -> float:
        return self.step / self.steps


@dataclass(frozen=True)
class Perturbation:
    """One weak branch: which layers are perturbed, how, and how far the result is pushed away from it.

    layers  block numbers, from 0, in the order in which the model runs them
    kind    `residual` (STG-R): the block passes its input through;
            `attention` (STG-A): the block's self-attention is the identity, output = V;
            `isolate`: attention between video and audio is off, for models that have both
    scale   w in the formula above; a step where it is 0 does not compute the branch
    of      the branch that is made weak: `cond`, or `uncond`
    base    what it is held against: `cond`, `uncond`, or `guided` (the CFG result). Left out: the same as `of`
    axis    `spatial` or `temporal`, for models with blocks or attention along each; left out: both
    """

    layers: Sequence[int]
    kind: str = "residual"
    scale: Schedule = 1.0
    of: str = COND
    base: str = ""
    axis: str = ""

    def __post_init__(self) -> None:
        _set(self, "layers", _layers(self.layers))
        if self.kind not in KINDS:
            raise wrong("kind of perturbation", self.kind, "'residual' (STG-R), 'attention' (STG-A) or 'isolate'")
        _set(self, "scale", _schedule("scale", self.scale))
        if self.of not in (COND, UNCOND):
            raise wrong("perturbed branch `of`", self.of, "'cond' or 'uncond'")
        _set(self, "base", self.base or self.of)
        if self.base not in (COND, UNCOND, GUIDED):
            raise wrong("`base` of a perturbation", self.base, "'cond', 'uncond' or 'guided'")
        if self.axis not in ("", *AXES):
            raise wrong("axis of a perturbation", self.axis, "'spatial', 'temporal', or '' for both")

    @property
    def needs_cfg(self) -> bool:
        return UNCOND in (self.of, self.base)


@dataclass(frozen=True)
class Guidance:
    """All that guides a clip.

    perturbations  the weak branches, one or several
    rescale        phi in the formula above, 0 (off) to 1
    cfg            the CFG scale, step by step, in place of the pipeline's own `guidance_scale`; None leaves it alone
    start, stop    guidance acts on the steps with `start <= progress < stop`; the others are the pipeline's own
    """

    perturbations: tuple[Perturbation, ...] = ()
    rescale: Schedule = 0.0
    cfg: Schedule | None = None
    start: float = 0.0
    stop: float = 1.0

    if TYPE_CHECKING:  # what the constructor takes is wider than what the fields hold afterwards

        def __init__(
            self,
            perturbations: Perturbation | Sequence[Perturbation] = (),
            rescale: Schedule = 0.0,
            cfg: Schedule | None = None,
            start: float = 0.0,
            stop: float = 1.0,
        ) -> None: ...

    def __post_init__(self) -> None:
        _set(self, "perturbations", _perturbations(self.perturbations))
        _set(self, "rescale", _schedule("rescale", self.rescale))
        if self.cfg is not None:
            _set(self, "cfg", _schedule("cfg", self.cfg))
        for name in ("start", "stop"):
            _set(self, name, _finite(name, getattr(self, name)))
        if not 0 <= self.start < self.stop <= 1:
            raise wrong("start and stop", (self.start, self.stop), "fractions of the run with 0 <= start < stop <= 1")

    def weights(self, moment: Moment, cfg: Scale) -> dict[str, float]:
        """The weight of every branch at this moment; the weights add up to 1, and a branch of weight 0 is left out.

        `cfg` is the pipeline's own scale, None where it runs without CFG. Where that is no single number, the CFG
        result is a branch of its own, `guided`.
        """
        if cfg is not None and self.cfg is not None:
            cfg = value(self.cfg, moment)
        if isinstance(cfg, float):
            guided = {UNCOND: 1.0 - cfg, COND: cfg}
        else:
            guided = {COND if cfg is None else GUIDED: 1.0}
        total = dict(guided)
        for name, perturbation in zip(self.names, self.perturbations, strict=True):
            scale = value(perturbation.scale, moment)
            base = guided if perturbation.base == GUIDED else {perturbation.base: 1.0}
            for branch, weight in base.items():
                total[branch] = total.get(branch, 0.0) + scale * weight
            total[name] = -scale
        return {branch: weight for branch, weight in total.items() if weight != 0.0}

    def phi(self, moment: Moment) -> float:
        return value(self.rescale, moment)

    def acts(self, moment: Moment) -> bool:
        """Whether this step differs from the pipeline's own."""
        if not self.start <= moment.progress < self.stop:
            return False
        scales = [p.scale for p in self.perturbations]
        return self.cfg is not None or any(value(s, moment) != 0.0 for s in (*scales, self.rescale))

    @property
    def names(self) -> tuple[str, ...]:
        """The perturbed branches by name, in order."""
        return tuple(f"perturbed{i}" for i in range(len(self.perturbations)))

    @property
    def inert(self) -> bool:
        """Whether no step can differ from the pipeline's own."""
        scales = [p.scale for p in self.perturbations]
        return self.cfg is None and all(isinstance(s, float) and s == 0.0 for s in (*scales, self.rescale))

    def with_perturbation(self, **changes: Any) -> Guidance:
        """The same guidance with fields of its one perturbation changed, as a call's arguments ask; the same along
        several axes are one."""
        if len({replace(part, axis="") for part in self.perturbations}) > 1:
            raise SettingsError(
                f"{', '.join(changes)} of one perturbation: got {len(self.perturbations)} perturbations in the "
                f"pipeline's guidance, expected stg=Guidance(...) for this call"
            )
        if not self.perturbations:
            if "layers" not in changes:
                raise wrong("stg_layers", None, "layer numbers, as the pipeline's guidance has no perturbation")
            return replace(self, perturbations=(Perturbation(**changes),))
        return replace(self, perturbations=tuple(replace(part, **changes) for part in self.perturbations))

    def check_steps(self, steps: int) -> None:
        """Evaluate every schedule for a run of `steps` steps, so that a wrong one stops before the first."""
        for name, schedule in self._schedules():
            if isinstance(schedule, tuple) and len(schedule) != steps:
                raise SettingsError(f"{name}: got {len(schedule)} numbers, expected {steps}, one for every step")
            for step in range(steps):
                number = value(schedule, Moment(step, steps), name)
                if name == "rescale" and not 0 <= number <= 1:
                    raise wrong(f"rescale at step {step}", number, "a number from 0 to 1")

    def _schedules(self) -> list[tuple[str, Schedule]]:
        named = [(f"scale of {n}", p.scale) for n, p in zip(self.names, self.perturbations, strict=True)]
        return [*named, ("rescale", self.rescale), *([] if self.cfg is None else [("cfg", self.cfg)])]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same as what `from_dict` takes."""
        for name, schedule in self._schedules():
            if callable(schedule):
                raise wrong(f"{name} to be written as data", schedule, "a number or one number for every step")
        mine = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        mine["perturbations"] = [{f.name: _plain(getattr(p, f.name)) for f in fields(p)} for p in self.perturbations]
        return mine

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guidance:
        _known("Guidance", data, cls)
        parts = data.get("perturbations", ())
        for part in parts:
            _known("Perturbation", part, Perturbation)
        return cls(**{**data, "perturbations": [Perturbation(**part) for part in parts]})

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Guidance:
        return cls.from_dict(json.loads(text))


def value(schedule: Schedule, moment: Moment, name: str = "schedule") -> float:
    """A schedule's number at a moment."""
    if isinstance(schedule, float):
        return schedule
    if callable(schedule):
        return _finite(f"{name} at progress {moment.progress:g}", schedule(moment.progress))
    return schedule[moment.step * len(schedule) // moment.steps]


def _set(frozen: object, name: str, new: object) -> None:
    object.__setattr__(frozen, name, new)


def _finite(name: str, number: object) -> float:
    if isinstance(number, bool) or not hasattr(number, "__float__"):
        raise wrong(name, number, "a finite number")
    plain = float(cast(Real, number))
    if not math.isfinite(plain):
        raise wrong(name, plain, "a finite number")
    return plain


def _schedule(name: str, given: object) -> Schedule:
    if callable(given):
        return cast(Schedule, given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        if not given:
            raise wrong(name, given, "one finite number for every step")
        return tuple(_finite(f"{name} at step {i}", number) for i, number in enumerate(given))
    number = _finite(name, given)
    if name == "rescale" and not 0 <= number <= 1:
        raise wrong(name, number, "a number from 0 to 1")
    return number


def _layers(given: object) -> tuple[int, ...]:
    right = "layer numbers such as [8] or [7, 8, 9], counted from 0"
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise wrong("layers", given, right)
    layers = list(given)
    if not layers or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 0 for n in layers):
        raise wrong("layers", layers, right)
    return tuple(sorted({n.__index__() for n in layers}))


def _perturbations(given: object) -> tuple[Perturbation, ...]:
    parts = [given] if isinstance(given, Perturbation) else given
    if not isinstance(parts, Sequence) or not all(isinstance(part, Perturbation) for part in parts):
        raise wrong("perturbations", given, "a Perturbation or a list of them")
    return tuple(parts)


def _known(what: str, data: Mapping[str, Any], cls: type) -> None:
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise wrong(f"fields of {what}", unknown, f"some of {names}")


def _plain(setting: Any) -> Any:
    return list(setting) if isinstance(setting, tuple) else setting
