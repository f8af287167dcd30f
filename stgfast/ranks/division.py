"""Which rank computes which branches of a step. Pure Python: branches in, a division out.

Branches with a common history share its computation only on one rank. So branches are divided along the tree of their
forks: the rank with the most work has as little as possible; among such divisions, all ranks together have as little as
possible. Prompts share nothing, so they are divided first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from stgfast.batching.plan import Branch, make_plan

Shares = tuple[frozenset[str], ...]
TRIES = 20_000  # the largest number of divisions that are compared; the best of them is used


@dataclass(frozen=True)
class Division:
    """Each rank computes the branches of one share, for a part of the prompts.

    Attributes:
        ranks: the number of ranks.
        parts: the number of parts of the prompts.
        shares: the branches of each share, by name. If there are fewer shares than ranks, several ranks compute the
            same one.
        loads: the block-rows of each share, for one prompt.
    """

    ranks: int
    parts: int
    shares: Shares
    loads: tuple[int, ...]

    def share(self, rank: int) -> frozenset[str]:
        return self.shares[self._number(rank)]

    def load(self, rank: int) -> int:
        """The block-rows of a rank, for one of its prompts."""
        return self.loads[self._number(rank)]

    def part(self, rank: int) -> int:
        """The number of the part of the prompts that a rank computes."""
        return rank // self._each

    @cached_property
    def senders(self) -> tuple[int, ...]:
        """The ranks whose results are used: one for each share and part."""
        return tuple(part * self._each + number for part in range(self.parts) for number in range(len(self.shares)))

    @property
    def longest(self) -> int:
        return max(self.loads)

    @property
    def _each(self) -> int:
        """The number of ranks for one part of the prompts."""
        return self.ranks // self.parts

    def _number(self, rank: int) -> int:
        return rank % self._each % len(self.shares)


def divide(
    calls: Sequence[Sequence[Branch]], depth: int, ranks: int, *, prompts: int = 1, full: bool = False
) -> Division:
    """Divide the branches of a step's calls of the denoiser over a number of ranks."""
    parts = math.gcd(ranks, prompts)
    shares, loads = _best(calls, depth, ranks // parts, full)
    return Division(ranks, parts, shares, loads)


def _best(calls: Sequence[Sequence[Branch]], depth: int, most: int, full: bool) -> tuple[Shares, tuple[int, ...]]:
    known: dict[frozenset[str], int] = {}

    def load(share: frozenset[str]) -> int:
        if share not in known:
            mine = ([branch for branch in call if branch.name in share] for call in calls)
            known[share] = sum(sum(make_plan(branches, depth, full=full).computed) for branches in mine if branches)
        return known[share]

    names = [branch.name for call in calls for branch in call]
    # The heaviest branches are assigned first: early results are then good, and exclude many others.
    order = sorted(names, key=lambda name: -load(frozenset([name])))
    best: Shares = (frozenset(names),)
    least = load(best[0]), load(best[0])
    tries = 0

    def given(shares: Shares, left: Sequence[str]) -> Iterator[Shares]:
        """Divisions that are better than the best one so far."""
        nonlocal tries
        loads = [load(share) for share in shares]
        if loads and (max(loads), sum(loads)) >= least:
            return
        if not left:
            yield shares
            return
        places = sorted(range(len(shares)), key=loads.__getitem__)
        for place in [*([len(shares)] if len(shares) < most else []), *places]:
            tries += 1
            if tries > TRIES:
                return
            share = frozenset([left[0]]).union(*shares[place : place + 1])
            yield from given((*shares[:place], share, *shares[place + 1 :]), left[1:])

    for shares in given((), order):
        loads = [load(share) for share in shares]
        best, least = shares, (max(loads), sum(loads))
    best = tuple(sorted(best, key=lambda share: min(map(names.index, share))))
    return best, tuple(map(load, best))
