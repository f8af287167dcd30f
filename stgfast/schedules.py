"""Numbers that change during a run: by step, by progress, or by noise level. This module needs no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from stgfast.errors import SettingsError, wrong

BY_SIGMA = "by_sigma"  # in settings as data


@dataclass(frozen=True)
class BySigma:
    """A schedule that depends on sigma, the scheduler's noise level, which falls during a run.

    Args:
        levels: pairs of sigma and number, with falling sigmas. A number applies while sigma is at least its level.

    Example:
        1 while sigma is 0.99 or more, then 6 down to 0.9, then 3:

        >>> scale = stgfast.BySigma([(0.99, 1.0), (0.9, 6.0), (0.6, 3.0)])
        >>> perturbation = stgfast.Perturbation([2], scale=scale)
    """

    levels: tuple[tuple[float, float], ...]

    if TYPE_CHECKING:

        def __init__(self, levels: Sequence[Sequence[float]]) -> None: ...

    def __post_init__(self) -> None:
        right = "pairs of sigma and number, with falling sigmas, such as [(0.99, 1.0), (0.9, 6.0)]"
        levels: object = self.levels
        if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
            raise wrong("levels of BySigma", levels, right)
        if not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in levels):
            raise wrong("levels of BySigma", levels, right)
        pairs = tuple((finite("sigma of BySigma", one), finite("number of BySigma", two)) for one, two in levels)
        if any(one <= other for (one, _), (other, _) in itertools.pairwise(pairs)):
            raise wrong("sigmas of BySigma", [sigma for sigma, _ in pairs], "falling numbers")
        set_frozen(self, "levels", pairs)

    def at(self, sigma: float) -> float:
        return next((number for level, number in self.levels if sigma >= level), self.levels[-1][1])


# A number; one number for every step; a function of the step's progress, from 0 up to (not including) 1; or by sigma.
Schedule = float | Sequence[float] | Callable[[float], float] | BySigma


class Moment(NamedTuple):
    """A position in a denoising run: step `step` of `steps`, counted from 0, and its sigma if it is known."""

    step: int
    steps: int
    sigma: float | None = None

    @property
    def progress(self) -> float:
        return self.step / self.steps


def value(schedule: Schedule, moment: Moment, name: str = "schedule") -> float:
    """The number of a schedule at a moment."""
    if isinstance(schedule, float):
        return schedule
    if isinstance(schedule, BySigma):
        if moment.sigma is None:
            raise SettingsError(
                f"{name} over sigma: got a run whose sigmas are not known, expected a schedule over steps"
            )
        return schedule.at(moment.sigma)
    if callable(schedule):
        return finite(f"{name} at progress {moment.progress:g}", schedule(moment.progress))
    return schedule[moment.step * len(schedule) // moment.steps]


def set_frozen(frozen: object, name: str, new: object) -> None:
    object.__setattr__(frozen, name, new)


def finite(name: str, number: object) -> float:
    if isinstance(number, bool) or not hasattr(number, "__float__"):
        raise wrong(name, number, "a finite number")
    try:
        plain = float(cast(Real, number))
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several numbers
        raise wrong(name, number, "a finite number") from error
    if not math.isfinite(plain):
        raise wrong(name, plain, "a finite number")
    return plain


def checked(name: str, given: object) -> Schedule:
    if isinstance(given, Mapping) and set(given) == {BY_SIGMA}:  # as `to_dict` writes it
        given = BySigma(given[BY_SIGMA])
    if isinstance(given, BySigma):
        if name == "rescale" and not all(0 <= number <= 1 for _, number in given.levels):
            raise wrong(name, given, "numbers from 0 to 1")
        return given
    if callable(given):
        return cast(Schedule, given)
    if hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1:  # an array or a tensor
        given = given.tolist()
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) and not hasattr(given, "ndim"):
        given = list(given)  # a range, a deque, a generator
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        if not given:
            raise wrong(name, given, "one finite number for every step")
        return tuple(finite(f"{name} at step {i}", number) for i, number in enumerate(given))
    number = finite(name, given)
    if name == "rescale" and not 0 <= number <= 1:
        raise wrong(name, number, "a number from 0 to 1")
    return number


def plain(schedule: Schedule) -> Any:
    """A schedule as plain data, as `checked` takes it."""
    if isinstance(schedule, BySigma):
        return {BY_SIGMA: [list(pair) for pair in schedule.levels]}
    return list(schedule) if isinstance(schedule, tuple) else schedule


def in_words(schedule: Schedule) -> str:
    """A schedule in a few words."""
    if isinstance(schedule, BySigma):
        *before, (_, last) = schedule.levels
        return f"by sigma ({''.join(f'{number:g} down to {sigma:g}, ' for sigma, number in before)}then {last:g})"
    if callable(schedule):
        return "a function of progress"
    return f"{schedule:g}" if isinstance(schedule, float) else f"one of {len(schedule)} numbers in every step"
