"""Which rows every block computes. Pure Python: branches in, a plan out.

Two branches are one computation for as long as they have the same history: the same source row and the same
perturbations so far. A `group` is one such computation, with one row for every prompt in the batch. At every block

    run    the groups it computes, each plainly or perturbed within the block (`marks`)
    keep   the groups that pass it untouched
    order  the stack it leaves behind, in terms of run + keep

so that a stack grows only where histories part. Groups that run come first: the others' rows are then a tail, and
what runs is a leading slice, a view and not a copy. Where a model itself handles the rows between its blocks, the
stack is full: every block leaves a row for every branch behind, copies of what it computed once.
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
    """One prediction that guidance needs: the row it starts from, and what is done to it at which layers."""

    name: str
    source: str
    marks: Mapping[int, Mark] = field(default_factory=dict)


class Step(NamedTuple):
    """What one block does. Indices count groups: `run` and `keep` in the stack before it, `order` in run + keep."""

    before: int  # groups in the stack
    run: tuple[int, ...]
    marks: tuple[Mark | None, ...]  # for every group in `run`: none, or what is done to it inside the block
    keep: tuple[int, ...]
    order: tuple[int, ...]
    rows_of: tuple[int, ...]  # for every group in `run`: the branch whose per-row arguments it takes


@dataclass(frozen=True)
class Plan:
    """The stack enters the first block, and leaves the last one, with one group per branch."""

    branches: tuple[Branch, ...]
    steps: tuple[Step, ...]

    @property
    def computed(self) -> tuple[int, ...]:
        """Groups computed, block by block."""
        return tuple(len(step.run) for step in self.steps)


def make_plan(branches: Sequence[Branch], depth: int, *, full: bool = False) -> Plan:
    """The plan for `depth` blocks that computes no history twice; `full`: with a full stack after every block."""
    # A group stands for the branches that share its history; the first of them lends it its per-row arguments.
    by_source: dict[str, list[int]] = {}
    for number, branch in enumerate(branches):
        by_source.setdefault(branch.source, []).append(number)
    groups = list(by_source.values())
    places = [members[0] for members in groups]  # where each group lies in the stack: first, one group per branch
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
    """The plan itself, or where a step skips its blocks the same branches, whose rows pass all of them."""
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
    """The branches that a call of the denoiser computes, given the rows it was called on, the branches that have a
    weight in this step, and what a perturbation does to which blocks.

    The conditional branch is always among them: every difference is taken from it.
    """
    plain = [Branch(source, source) for source in sources if source in weighed or source == COND]
    weak = [
        Branch(name, part.of, marks(part))
        for name, part in zip(guidance.names, guidance.perturbations, strict=True)
        if name in weighed and part.of in sources
    ]
    return (*plain, *weak)
