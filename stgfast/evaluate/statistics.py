"""Statistics over many clips: means, diversity, Fréchet distance, each with its interval.

Intervals are 95%, from a delete-a-group jackknife: the number is computed again without each of up to 32 groups of
clips. This also works for numbers that are not means, and for the difference of two settings over the same prompts and
seeds, which is known much better than each number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUPS = 32
FEWEST = 4  # groups for a meaningful interval
Array = NDArray[np.float64]
Chosen = NDArray[np.bool_]  # the clips from which a number is computed


@dataclass(frozen=True)
class Estimate:
    """A number and the half-width of its interval; NaN if there are too few clips."""

    value: float
    half: float

    @property
    def apart(self) -> bool:
        """Whether it differs significantly from 0."""
        return abs(self.value) > self.half

    @property
    def sign(self) -> str:
        """The sign of a significant difference, else ""."""
        return "" if not self.apart else " ▲" if self.value > 0 else " ▼"

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.half:.2g}" if math.isfinite(self.half) else f"{self.value:.4g}"


def estimated(statistic: Callable[[Chosen], float], units: NDArray[np.int64]) -> Estimate:
    """The estimate of `statistic` over all clips. Clips of one unit, such as a prompt, stay together."""
    value = statistic(np.ones(len(units), dtype=bool))
    groups = np.unique(units, return_inverse=True)[1] % GROUPS
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < FEWEST:
        return Estimate(value, math.nan)
    without = np.array([statistic(groups != group) for group in range(count)])
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    return Estimate(value, quantile(count - 1) * error)


def quantile(freedom: int) -> float:
    """Student's t at 97.5%, by its expansion around the normal distribution; right to 1% from 3 degrees of freedom."""
    z = 1.959964
    terms: tuple[float, ...] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def mean(values: Array) -> float:
    """The mean of existing values: a clip may have none."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def diversity(features: Array, prompts: NDArray[np.int64]) -> float:
    """The distance between clips of one prompt: root mean square, averaged over prompts."""
    spreads = []
    for prompt in np.unique(prompts):
        own = features[prompts == prompt]
        if len(own) > 1:
            spreads.append(math.sqrt(2 * float(own.var(0, ddof=1).mean())))
    return float(np.mean(spreads)) if spreads else math.nan


@dataclass(frozen=True)
class Cloud:
    """The normal distribution of features, for the Fréchet distance."""

    mean: Array
    root: Array  # of the covariance

    @classmethod
    def of(cls, features: Array) -> Cloud:
        return cls.given(features.mean(0), np.cov(features, rowvar=False))

    @classmethod
    def given(cls, mean: Array, covariance: Array) -> Cloud:
        values, vectors = np.linalg.eigh(covariance)
        root: Array = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return cls(mean, root)

    def distance(self, features: Array) -> float:
        """The Fréchet distance, squared as usual. It falls with the number of clips, so compare equal numbers only."""
        if len(features) < 2:
            return math.nan
        covariance = np.cov(features, rowvar=False)
        shared = np.linalg.eigvalsh(self.root @ covariance @ self.root).clip(0)
        moved = float(np.square(features.mean(0) - self.mean).sum())
        spread = float(np.square(self.root).sum() + np.trace(covariance) - 2 * np.sqrt(shared).sum())
        return moved + spread
