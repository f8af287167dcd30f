"""Which recipes are tried, which are dropped on the way, and which one is chosen. This module needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stgfast.errors import SettingsError, wrong
from stgfast.recipes import Recipe
from stgfast.spacing import EVERY, Spacing, eased, thinning

SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.33, 0.25)  # of the usual steps
FEWEST = 4  # steps
FIRST = 4  # steps that compute at the beginning
LOOKED_AT = 2  # clips of a recipe before it may be dropped
MUCH = 0.8  # a ratio of distances that is more than chance


@dataclass
class Trial:
    """A recipe and its measurements."""

    recipe: Recipe
    cost: float  # as a fraction of the usual clip's block-rows
    distances: dict[int, float] = field(default_factory=dict)  # from the converged clip, by clip number
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        return statistics.median(self.distances.values()) if self.distances else math.inf

    def times(self, usual: Trial) -> float:
        """The cost of its clips, as a fraction of the usual ones."""
        both = [self.seconds[clip] / usual.seconds[clip] for clip in self.seconds if usual.seconds.get(clip)]
        return statistics.median(both) if both else math.nan


def candidates(usual: Recipe, solvers: Sequence[str], *, perturbed: bool, cfg: bool, blocks: bool) -> Iterator[Recipe]:
    """Recipes for a model whose usual clip is `usual`, by these solvers, the best guesses first.

    `perturbed`, `cfg`, `blocks`: whether there are perturbed branches, an unconditional branch, and blocks to reuse.
    """
    counts = sorted({max(FEWEST, round(usual.steps * share)) for share in SHARES}, reverse=True)
    for solver in sorted({*solvers, usual.solver}, key=lambda name: (name != "unipc", name)):
        for steps in counts:
            exact = replace(usual, solver=solver, steps=steps)
            if exact != usual:
                yield exact
            if blocks and steps > FIRST + 2:
                for first, gap in ((FIRST + 1, 3), (FIRST + 2, 2)):
                    yield replace(exact, reuse_blocks=eased(steps, first, gap), reuse_order=1)
            if not (perturbed or cfg) or steps <= FIRST:
                continue
            thinned = dict.fromkeys(thinning(steps, FIRST, growth) for growth in (0.1, 0.2))
            spacings: list[tuple[Spacing, int]] = [(2, 2), (2, 1), *((named, 1) for named in thinned)]
            for spacing, order in spacings:
                reuse, reuse_cfg = spacing if perturbed else EVERY, spacing if cfg else EVERY
                yield replace(exact, reuse=reuse, reuse_cfg=reuse_cfg, reuse_order=order)


def given_up(trials: Sequence[Trial]) -> list[Trial]:
    """The recipes to drop: another one is much nearer at no more cost, over the clips that both made."""
    seen = [trial for trial in trials if len(trial.distances) >= LOOKED_AT]
    return [
        trial
        for trial in seen
        if any(other.cost <= trial.cost and _ratio(other, trial) < MUCH for other in seen if other is not trial)
    ]


def _ratio(one: Trial, other: Trial) -> float:
    """The mean ratio of their distances."""
    both = one.distances.keys() & other.distances.keys()
    if not both or not all(one.distances[clip] and other.distances[clip] for clip in both):
        return 1.0
    return math.exp(statistics.fmean(math.log(one.distances[clip] / other.distances[clip]) for clip in both))


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Among the recipes with the most clips, those for which no other is both cheaper and nearer, by cost."""
    most = max(len(trial.distances) for trial in trials)
    whole = [trial for trial in trials if len(trial.distances) == most]
    found: list[Trial] = []
    for trial in sorted(whole, key=lambda trial: (trial.cost, trial.distance)):
        if not found or trial.distance < found[-1].distance:
            found.append(trial)
    return found


@dataclass(frozen=True)
class Aim:
    """What to find: the cheapest recipe within a distance, or the nearest within a cost. If neither is given, the
    cheapest that is as near as the usual clip.
    """

    distance: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if self.distance is not None and self.cost is not None:
            raise SettingsError("distance and cost: got both, expected one of them")
        for name in ("distance", "cost"):
            number = getattr(self, name)
            if number is not None and not (isinstance(number, (int, float)) and math.isfinite(number) and number > 0):
                raise wrong(name, number, "a number above 0")

    def choose(self, trials: Sequence[Trial], usual: Trial) -> Trial | None:
        """The chosen recipe, or None."""
        best = front(trials)
        if self.cost is not None:
            within = [trial for trial in best if trial.cost <= self.cost]
            return within[-1] if within else None
        limit = usual.distance if self.distance is None else self.distance
        return next((trial for trial in best if trial.distance <= limit), None)

    def __str__(self) -> str:
        if self.cost is not None:
            return f"the nearest within {self.cost:g} of the usual clip's block-rows"
        within = "as near as the usual clip" if self.distance is None else f"within {self.distance:g}"
        return f"the cheapest that is {within}"


def described(trial: Trial, usual: Trial, about: Mapping[str, object]) -> Recipe:
    """The recipe of a trial, with its measurements."""
    measured = {
        "distance": round(trial.distance, 5),
        "cost": round(trial.cost, 4),
        "seconds": round(trial.times(usual), 3),
        "clips": len(trial.distances),
        "usual": {"steps": usual.recipe.steps, "distance": round(usual.distance, 5)},
    }
    return replace(trial.recipe, found={**measured, **about})
