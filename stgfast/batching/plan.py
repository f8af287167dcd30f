"""Which rows each block computes. Pure Python: branches in, a plan out.

Two branches are one computation as long as they have the same history: the same source row and the same perturbations
so far. A `group` is one such computation, with one row for each prompt of the batch. At each block

    run    the groups that it computes, each plainly or perturbed within the block (`marks`)
    keep   the groups that pass it unchanged
    order  the stack after it, as indices into run + keep

so a stack grows only where histories fork. Groups that run come first: the other rows are then a tail, and the input of
a block is a leading slice, a view and not a copy. If a model uses the rows between its blocks, the stack is full: each
block leaves one row for each branch, as copies of what it computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.kinds import Mark, kind_of
from stgfast.perturbation import Perturbation


@dataclass(frozen=True)
class Branch:
    """One prediction that guidance needs: its source row, and its perturbation at each layer."""

    name: str
    source: str
    marks: Mapping[int, Mark] = field(default_factory=dict)


class Step(NamedTuple):
    """What one block does. Indices count groups: `run` and `keep` in the stack before it, `order` in run + keep."""

    before: int  # groups in the stack
    run: tuple[int, ...]
    marks: tuple[Mark | None, ...]  # for each group in `run`: None, or its mark inside the block
    keep: tuple[int, ...]
    order: tuple[int, ...]
    rows_of: tuple[int, ...]  # for each group in `run`: the branch whose per-row arguments it uses


@dataclass(frozen=True)
class Plan:
    """The stack has one group for each branch before the first block and after the last one."""

    branches: tuple[Branch, ...]
    steps: tuple[Step, ...]

    @property
    def computed(self) -> tuple[int, ...]:
        """The number of groups that each block computes."""
        return tuple(len(step.run) for step in self.steps)


def make_plan(branches: Sequence[Branch], depth: int, *, full: bool = False) -> Plan:
    """The plan for `depth` blocks that computes no history twice; with `full`, the stack is full after each block."""
    # A group represents the branches that share its history, and uses the per-row arguments of the first one.
    by_source: dict[str, list[int]] = {}
    for number, branch in enumerate(branches):
        by_source.setdefault(branch.source, []).append(number)
    groups = list(by_source.values())
    # The position of each group in the stack; at first, one group per branch.
    places = [members[0] for members in groups]
    before = len(branches)
    steps = []
    for layer in range(depth):
        run: list[tuple[int, Mark | None, list[int]]] = []
        keep: list[tuple[int, list[int]]] = []
        for place, members in zip(places, groups, strict=True):
            by_mark: dict[Mark | None, list[int]] = {}
            for number in members:
                by_mark.setdefault(branches[number].marks.get(layer), []).append(number)
            for mark, same in by_mark.items():
                if mark is not None and kind_of(mark).passes:
                    keep.append((place, same))
                else:
                    run.append((place, mark, same))
        groups = [same for *_, same in run] + [same for _, same in keep]
        if full or layer == depth - 1:
            order = tuple(next(i for i, same in enumerate(groups) if n in same) for n in range(len(branches)))
            places = [members[0] for members in groups]
        else:
            order = tuple(range(len(groups)))
            places = list(order)
        steps.append(
            Step(
                before=before,
                run=tuple(place for place, *_ in run),
                marks=tuple(mark for _, mark, _ in run),
                keep=tuple(place for place, _ in keep),
                order=order,
                rows_of=tuple(same[0] for *_, same in run),
            )
        )
        before = len(order)
    return Plan(tuple(branches), tuple(steps))


def passing(plan: Plan, skips: bool) -> Plan:
    """The plan, or, for a step that skips its blocks, a plan in which the same branches pass all blocks."""
    if not skips:
        return plan
    every = tuple(range(len(plan.branches)))
    step = Step(before=len(every), run=(), marks=(), keep=every, order=every, rows_of=())
    return Plan(plan.branches, (step,) * len(plan.steps))


def branches_for(
    guidance: Guidance,
    sources: Sequence[str],
    weighed: Collection[str],
    marks: Callable[[Perturbation], Mapping[int, Mark]],
) -> tuple[Branch, ...]:
    """The branches that a call of the denoiser computes, given its rows, the branches with a weight in this step, and
    what a perturbation does to which blocks.

    The conditional branch is always among them, because all differences are taken from it.
    """
    plain = [Branch(source, source) for source in sources if source in weighed or source == COND]
    perturbed = [
        Branch(name, part.of, marks(part))
        for name, part in zip(guidance.names, guidance.perturbations, strict=True)
        if name in weighed and part.of in sources
    ]
    return (*plain, *perturbed)
