"""The settings that guide a clip: frozen, and checked when they are made. This module needs no torch.

A guided prediction is a weighted sum of branch predictions. With `u` the unconditional branch, `c` the conditional one
and `p_i` the perturbed ones, CFG and Spatiotemporal Skip Guidance (arXiv 2411.18664) together are

    g = u + s (c - u) + sum_i w_i (base_i - p_i)

where `base_i` is the branch that `p_i` is subtracted from: the branch that it perturbs, or the CFG result. An optional
rescale follows: `g *= phi * std(c) / std(g) + 1 - phi`, with standard deviations over each prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from stgfast import formulas, spacing, wording
from stgfast.errors import SettingsError, wrong
from stgfast.formulas import COND, GUIDED, UNCOND, Formula
from stgfast.perturbation import Perturbation
from stgfast.presets import PRESETS
from stgfast.schedules import BySigma, Moment, Schedule, checked, finite, plain, set_frozen, value
from stgfast.spacing import ORDER, REUSE, Spacing

MOST = 5  # perturbations: with cond, uncond and the CFG result, the eight predictions that a kernel combines
# A pipeline's CFG scale: None, a number, or one number for each frame in the pipeline's own form.
Scale = None | float | Any


@dataclass(frozen=True)
class Guidance:
    """The settings that guide a clip. A schedule is a number, one number for each step, a function of progress (0 to
    1), or a `BySigma`.

    Args:
        perturbations: the perturbed branches, one `Perturbation` or several.
        rescale: phi of the formula, 0 (off) to 1, or a schedule.
        cfg: the CFG scale or a schedule of it. Default: the pipeline's own `guidance_scale`.
        start, stop: guidance acts on the steps with `start <= progress < stop`. The others are the pipeline's own.
        project: one of two differences loses its part along another direction. `"orthogonal"`: the second
            perturbation's difference, along the first one's (Eq. 21 of the paper). `"along-uncond"`: `c - u`, along `u`
            (the optimized scale of CFG-Zero*; its zeroed first steps are `start`). `"along-cond"`: `c - u`, along `c`
            (the projection of APG, without its momentum and norm threshold).
        eta: the fraction of that part that `"along-cond"` keeps.
        reuse: an approximation, off at 1. The differences `base_i - p_i` are computed in each `reuse`-th step, or in
            the steps with these numbers, and extrapolated to the others.
        reuse_cfg: the same for `c - u`.
        reuse_blocks: the same for the sum that all blocks add to the hidden states of a branch. In the other steps no
            block runs.
        reuse_order: the order of the extrapolation: 0 keeps the last value, 1 is linear, 2 quadratic. Default: 2.

    Raises:
        SettingsError: a setting is wrong.

    Example:
        >>> guidance = stgfast.Guidance(stgfast.Perturbation([30], scale=1.5), rescale=0.7, stop=0.8)
        >>> print(guidance)
        residual, layer 30, scale 1.5; rescale 0.7; from 0 to 0.8 of the run
        >>> guidance == stgfast.Guidance.from_json(guidance.to_json())
        True
    """

    perturbations: tuple[Perturbation, ...] = ()
    rescale: Schedule = 0.0
    cfg: Schedule | None = None
    start: float = 0.0
    stop: float = 1.0
    project: str = ""
    eta: float = 0.0
    reuse: Spacing = spacing.EVERY
    reuse_cfg: Spacing = spacing.EVERY
    reuse_blocks: Spacing = spacing.EVERY
    reuse_order: int | None = None

    if TYPE_CHECKING:  # the constructor accepts more types than the fields have afterwards

        def __init__(
            self,
            perturbations: Perturbation | Sequence[Perturbation] = (),
            rescale: Schedule = 0.0,
            cfg: Schedule | None = None,
            start: float = 0.0,
            stop: float = 1.0,
            project: str = "",
            eta: float = 0.0,
            reuse: int | Sequence[int] = spacing.EVERY,
            reuse_cfg: int | Sequence[int] = spacing.EVERY,
            reuse_blocks: int | Sequence[int] = spacing.EVERY,
            reuse_order: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_frozen(self, "perturbations", _perturbations(self.perturbations))
        if len(self.perturbations) > MOST:
            raise wrong("perturbations", f"{len(self.perturbations)} of them", f"at most {MOST}")
        set_frozen(self, "rescale", checked("rescale", self.rescale))
        if self.cfg is not None:
            set_frozen(self, "cfg", checked("cfg", self.cfg))
        for name in ("start", "stop"):
            set_frozen(self, name, finite(name, getattr(self, name)))
        if not 0 <= self.start < self.stop <= 1:
            raise wrong("start and stop", (self.start, self.stop), "fractions of the run with 0 <= start < stop <= 1")
        self._check_projection()
        for name, setting in spacing.settled({name: getattr(self, name) for name in (*REUSE, ORDER)}).items():
            set_frozen(self, name, setting)

    def _check_projection(self) -> None:
        known = formulas.FORMULAS
        if not isinstance(self.project, str) or self.project not in ("", *known):
            raise wrong("project", self.project, f"{', '.join(map(repr, known))}, or '' for none")
        if self.formula is not None:
            self.formula.check(self)
        set_frozen(self, "eta", finite("eta", self.eta))
        if self.eta and not (self.formula is not None and self.formula.shares):
            sharing = " or ".join(repr(name) for name, formula in known.items() if formula.shares)
            raise wrong("eta", self.eta, f"0: only project={sharing} uses it")

    def weights(self, moment: Moment, cfg: Scale) -> dict[str, float]:
        """The weight of each branch at this moment. Weights add up to 1; branches with weight 0 are left out.

        `cfg` is the pipeline's own scale, or None if it runs without CFG. If it is not a single number, the CFG result
        is a branch of its own, `guided`.
        """
        cfg = self.cfg_at(moment, cfg)
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

    def needs_uncond(self, weighed: Collection[str]) -> bool:
        """Whether the unconditional branch is needed, given the branches that have a weight."""
        sources = [part.of for name, part in zip(self.names, self.perturbations, strict=True) if name in weighed]
        return not {UNCOND, GUIDED}.isdisjoint(weighed) or UNCOND in sources

    def cfg_at(self, moment: Moment, own: Scale) -> Scale:
        """The CFG scale at this moment; None in a run without CFG."""
        return own if own is None or self.cfg is None else value(self.cfg, moment)

    def phi(self, moment: Moment) -> float:
        return value(self.rescale, moment)

    def acts(self, moment: Moment) -> bool:
        """Whether this step differs from the pipeline's own."""
        if not self.start <= moment.progress < self.stop:
            return False
        scales = [p.scale for p in self.perturbations]
        return self.changes_cfg or any(value(s, moment) != 0.0 for s in (*scales, self.rescale))

    @property
    def reuses(self) -> bool:
        """Whether anything is reused across steps."""
        return self.reuse_order is not None

    @property
    def exact(self) -> Guidance:
        """The same guidance without reuse."""
        return replace(self, reuse=spacing.EVERY, reuse_cfg=spacing.EVERY, reuse_blocks=spacing.EVERY, reuse_order=None)

    @property
    def changes_cfg(self) -> bool:
        """Whether the CFG result differs from the pipeline's own."""
        return self.cfg is not None or self.projects_cfg or {self.reuse_cfg, self.reuse_blocks} != {spacing.EVERY}

    @property
    def formula(self) -> Formula | None:
        """The implementation of its projection, if it has one."""
        return formulas.FORMULAS.get(self.project)

    @property
    def projects_cfg(self) -> bool:
        return self.formula is not None and self.formula.of_cfg

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the perturbed branches, in order."""
        return tuple(f"perturbed{i}" for i in range(len(self.perturbations)))

    @property
    def bases(self) -> dict[str, str]:
        """The base of each perturbed branch."""
        return dict(zip(self.names, (part.base for part in self.perturbations), strict=True))

    @property
    def inert(self) -> bool:
        """Whether every step is the pipeline's own."""
        scales = [p.scale for p in self.perturbations]
        return not self.changes_cfg and all(isinstance(s, float) and s == 0.0 for s in (*scales, self.rescale))

    @property
    def by_sigma(self) -> bool:
        return any(isinstance(schedule, BySigma) for _, schedule in self._schedules())

    def with_perturbation(self, **changes: Any) -> Guidance:
        """The same guidance with other fields of its perturbation, as the arguments of one call ask. Perturbations that
        differ only in their axis count as one.
        """
        if len({replace(part, axis="") for part in self.perturbations}) > 1:
            raise SettingsError(
                f"{', '.join(changes)} of one perturbation: got {len(self.perturbations)} perturbations in the "
                f"pipeline's guidance, expected stg=Guidance(...) for this call"
            )
        if not self.perturbations:
            if "layers" not in changes:
                raise wrong("stg_layers", None, "layer numbers, as the pipeline's guidance has no perturbation")
            return replace(self, perturbations=(Perturbation(**changes),))
        kind = self.perturbations[0].kind
        # A sigma belongs to its kind.
        settled = {**({"sigma": None} if changes.get("kind", kind) != kind else {}), **changes}
        return replace(self, perturbations=tuple(replace(part, **settled) for part in self.perturbations))

    def check_steps(self, steps: int) -> None:
        """Evaluate each schedule for a run of `steps` steps, so that a wrong one raises before the first step."""
        for name in REUSE:
            spacing.check_steps(name, getattr(self, name), steps)
        for name, schedule in self._schedules():
            if isinstance(schedule, tuple) and len(schedule) != steps:
                raise SettingsError(f"{name}: got {len(schedule)} numbers, expected {steps}, one for every step")
            # Its numbers were checked when it was made.
            for step in range(0 if isinstance(schedule, BySigma) else steps):
                number = value(schedule, Moment(step, steps), name)
                if name == "rescale" and not 0 <= number <= 1:
                    raise wrong(f"rescale at step {step}", number, "a number from 0 to 1")

    def _schedules(self) -> list[tuple[str, Schedule]]:
        named = [(f"scale of {n}", p.scale) for n, p in zip(self.names, self.perturbations, strict=True)]
        return [*named, ("rescale", self.rescale), *([] if self.cfg is None else [("cfg", self.cfg)])]

    def __str__(self) -> str:
        return wording.of_guidance(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, for `from_dict`."""
        for name, schedule in self._schedules():
            if callable(schedule):
                raise wrong(f"{name} to be written as data", schedule, "a number or one number for every step")
        mine = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        mine["perturbations"] = [{f.name: _plain(getattr(p, f.name)) for f in fields(p)} for p in self.perturbations]
        return mine

    @classmethod
    def preset(cls, name: str) -> Guidance:
        """Published settings, by name."""
        if name not in PRESETS:
            raise wrong("preset", name, f"one of {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name].settings)

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
    return "inf" if setting == math.inf else plain(setting)
