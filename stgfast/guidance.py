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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from stgfast import formulas, spacing
from stgfast.errors import SettingsError, wrong
from stgfast.formulas import COND, GUIDED, UNCOND, Formula
from stgfast.perturbation import Perturbation
from stgfast.presets import PRESETS
from stgfast.schedules import BySigma, Moment, Schedule, checked, finite, in_words, plain, set_frozen, value
from stgfast.spacing import ORDER, REUSE, Spacing

MOST = 5  # perturbations: with cond, uncond and the CFG result, the eight predictions that a kernel combines
# A pipeline's CFG scale: none, a number, or a number for every frame in whatever form the pipeline has it.
Scale = None | float | Any


@dataclass(frozen=True)
class Guidance:
    """All that guides a clip.

    perturbations  the weak branches, one or several
    rescale        phi in the formula above, 0 (off) to 1
    cfg            the CFG scale, step by step, in place of the pipeline's own `guidance_scale`; None leaves it alone
    start, stop    guidance acts on the steps with `start <= progress < stop`; the others are the pipeline's own
    project        one of two differences loses its part along another direction:
                   `orthogonal`: of the second perturbation's, what the first one's says already (the paper's Eq. 21);
                   `along-uncond`: of `c - u`, what lies along `u` (the optimised scale of CFG-Zero*, whose zeroed first
                   steps are `start`); `along-cond`: what lies along `c` (the projection of APG, without its momentum
                   and its bound on the norm)
    eta            how much of that part `along-cond` leaves
    reuse          an approximation, off at 1: the differences `base_i - p_i` are computed in every `reuse`-th step, or
                   in the steps of these numbers, and carried on to the others
    reuse_cfg      the same for `c - u`
    reuse_blocks   the same for what all blocks together add, to every branch: in the other steps none of them runs
    reuse_order    how: 0 holds the last difference, 1 goes on by a line through the last two, 2 by a parabola through
                   the last three; 2 where it is left out and something is reused
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

    if TYPE_CHECKING:  # what the constructor takes is wider than what the fields hold afterwards

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
            raise wrong("eta", self.eta, f"0: it is that of project={sharing}")

    def weights(self, moment: Moment, cfg: Scale) -> dict[str, float]:
        """The weight of every branch at this moment; the weights add up to 1, and a branch of weight 0 is left out.

        `cfg` is the pipeline's own scale, None where it runs without CFG. Where that is no single number, the CFG
        result is a branch of its own, `guided`.
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
        """Whether uncond has to be known where these branches have a weight."""
        weak = [part.of for name, part in zip(self.names, self.perturbations, strict=True) if name in weighed]
        return not {UNCOND, GUIDED}.isdisjoint(weighed) or UNCOND in weak

    def cfg_at(self, moment: Moment, own: Scale) -> Scale:
        """The CFG scale, which in a run without CFG is none."""
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
        """Whether anything is carried on from step to step."""
        return self.reuse_order is not None

    @property
    def exact(self) -> Guidance:
        """The same, with nothing carried on."""
        return replace(self, reuse=spacing.EVERY, reuse_cfg=spacing.EVERY, reuse_blocks=spacing.EVERY, reuse_order=None)

    @property
    def changes_cfg(self) -> bool:
        """Whether CFG alone is not the pipeline's own."""
        return self.cfg is not None or self.projects_cfg or {self.reuse_cfg, self.reuse_blocks} != {spacing.EVERY}

    @property
    def formula(self) -> Formula | None:
        """What its projection is."""
        return formulas.FORMULAS.get(self.project)

    @property
    def projects_cfg(self) -> bool:
        return self.formula is not None and self.formula.of_cfg

    @property
    def names(self) -> tuple[str, ...]:
        """The perturbed branches by name, in order."""
        return tuple(f"perturbed{i}" for i in range(len(self.perturbations)))

    @property
    def bases(self) -> dict[str, str]:
        """What every perturbed branch is held against."""
        return dict(zip(self.names, (part.base for part in self.perturbations), strict=True))

    @property
    def inert(self) -> bool:
        """Whether no step can differ from the pipeline's own."""
        scales = [p.scale for p in self.perturbations]
        return not self.changes_cfg and all(isinstance(s, float) and s == 0.0 for s in (*scales, self.rescale))

    @property
    def by_sigma(self) -> bool:
        return any(isinstance(schedule, BySigma) for _, schedule in self._schedules())

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
        kind = self.perturbations[0].kind
        # A sigma goes with the kind that it was of.
        settled = {**({"sigma": None} if changes.get("kind", kind) != kind else {}), **changes}
        return replace(self, perturbations=tuple(replace(part, **settled) for part in self.perturbations))

    def check_steps(self, steps: int) -> None:
        """Evaluate every schedule for a run of `steps` steps, so that a wrong one stops before the first."""
        for name in REUSE:
            spacing.check_steps(name, getattr(self, name), steps)
        for name, schedule in self._schedules():
            if isinstance(schedule, tuple) and len(schedule) != steps:
                raise SettingsError(f"{name}: got {len(schedule)} numbers, expected {steps}, one for every step")
            for step in range(0 if isinstance(schedule, BySigma) else steps):  # whose numbers are known already
                number = value(schedule, Moment(step, steps), name)
                if name == "rescale" and not 0 <= number <= 1:
                    raise wrong(f"rescale at step {step}", number, "a number from 0 to 1")

    def _schedules(self) -> list[tuple[str, Schedule]]:
        named = [(f"scale of {n}", p.scale) for n, p in zip(self.names, self.perturbations, strict=True)]
        return [*named, ("rescale", self.rescale), *([] if self.cfg is None else [("cfg", self.cfg)])]

    def __str__(self) -> str:
        """In words; perturbations that differ in their axis alone are told once."""
        axes: dict[Perturbation, list[str]] = {}
        for part in self.perturbations:
            axes.setdefault(replace(part, axis=""), []).append(part.axis)
        words = []
        for part, along in axes.items():
            of = "" if part.of == part.base == COND else f" of {part.of} against {part.base}"
            where = f"layer{'s' if len(part.layers) > 1 else ''} {', '.join(map(str, part.layers))}"
            blur = "" if part.sigma in (None, math.inf) else f", sigma {part.sigma:g}"
            named = "".join(f", {axis}" for axis in along if axis)
            words.append(f"{part.kind}{of}, {where}{named}{blur}, scale {in_words(part.scale)}")
        if self.cfg is not None:
            words.append(f"CFG scale {in_words(self.cfg)}")
        if self.rescale != 0.0:
            words.append(f"rescale {in_words(self.rescale)}")
        if (self.start, self.stop) != (0.0, 1.0):
            words.append(f"from {self.start:g} to {self.stop:g} of the run")
        if self.project:
            words.append(f"{self.project}{f', eta {self.eta:g}' if self.eta else ''}")
        for name in REUSE:
            if getattr(self, name) != spacing.EVERY:
                words.append(f"{name} {spacing.in_words(getattr(self, name))}")
        if self.reuse_order:
            words.append(f"order {self.reuse_order}")
        return "; ".join(words) or "CFG alone"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same as what `from_dict` takes."""
        for name, schedule in self._schedules():
            if callable(schedule):
                raise wrong(f"{name} to be written as data", schedule, "a number or one number for every step")
        mine = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        mine["perturbations"] = [{f.name: _plain(getattr(p, f.name)) for f in fields(p)} for p in self.perturbations]
        return mine

    @classmethod
    def preset(cls, name: str) -> Guidance:
        """Published settings by name."""
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
