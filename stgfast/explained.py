"""The result of `explain`: what a call would compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from stgfast.batching.plan import Plan, make_plan
from stgfast.batching.room import ALL, Rows
from stgfast.batching.rows import spans
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.perturbation import Perturbation
from stgfast.ranks.division import Division, divide
from stgfast.recipes import Recipe
from stgfast.schedules import in_words
from stgfast.spacing import EVERY, when


@dataclass(frozen=True)
class Phase:
    """Steps that compute the same branches in the same way."""

    first: int
    last: int
    weights: dict[str, float]  # at the first step of the phase; empty if the pipeline runs unchanged
    rescale: float  # at the first step of the phase
    varies: bool  # whether weights change within the phase
    # The number of steps with these plans, one for each call of the denoiser that computes anything. There
    # are several kinds of steps if some reuse branches of others.
    kinds: tuple[tuple[int, tuple[Plan, ...]], ...]
    branches: tuple[str, ...]  # all branches that are needed
    announced: bool = False  # the pipeline asks for these branches and combines them itself

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that each block computes in the first step of the phase, for one prompt."""
        return _rows(self.kinds[0][1])

    @property
    def block_rows(self) -> int:
        return sum(steps * sum(_rows(plans)) for steps, plans in self.kinds)


@dataclass(frozen=True)
class Explanation:
    """The plan of a call. Block-rows are counted for one prompt: one block that runs on one sample."""

    pipeline: str
    protocol: str
    depth: int
    cfg: float | None
    guidance: Guidance
    recipe: Recipe | None
    max_rows: Rows
    phases: tuple[Phase, ...]
    notice: str = ""  # what the call gets that it does not seem to ask for
    # How identity rows are computed, and in which blocks.
    attention: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ranks: int = 1  # processes over which branches are divided
    full: bool = False  # the stack is full after every block

    @property
    def block_rows(self) -> int:
        """The block-rows that the call computes."""
        return sum(phase.block_rows for phase in self.phases)

    @property
    def longest(self) -> int:
        """The block-rows of the rank that computes most in each step."""
        kinds = [kind for phase in self.phases for kind in phase.kinds]
        return sum(steps * self.division(plans).longest for steps, plans in kinds)

    def division(self, plans: Sequence[Plan]) -> Division:
        """Which rank computes which branches of a step."""
        return divide([plan.branches for plan in plans], self.depth, self.ranks, full=self.full)

    @property
    def unshared(self) -> int:
        """The block-rows without sharing: each branch through each block."""
        return sum(phase.steps * len(phase.branches) * self.depth for phase in self.phases)

    @property
    def cfg_alone(self) -> int:
        """The block-rows of the pipeline without stgfast."""
        if any(phase.announced for phase in self.phases):
            return self.unshared
        return sum(phase.steps for phase in self.phases) * self.depth * (1 if self.cfg is None else 2)

    @property
    def rows_held(self) -> int:
        """The largest number of rows between two blocks, for one prompt. It determines memory."""
        return max(max(step.before, len(step.order)) for plan in self.plans for step in plan.steps)

    @property
    def rows_of_pipeline(self) -> int:
        """The largest number of rows in one of the pipeline's own calls, for one prompt."""
        return max(len({branch.source for branch in plan.branches}) for plan in self.plans)

    @property
    def rows_at_once(self) -> int:
        """The largest number of rows that a block computes at once, for one prompt, unless a GPU has room for more."""
        most = max(max(plan.computed) for plan in self.plans)
        bound = self.rows_of_pipeline if self.max_rows is None else most if self.max_rows == ALL else int(self.max_rows)
        return min(most, bound)

    @property
    def plans(self) -> list[Plan]:
        """The plans of all calls of the denoiser."""
        return [plan for phase in self.phases for _, plans in phase.kinds for plan in plans if plan.branches]

    def __str__(self) -> str:
        scale = ", without CFG" if self.cfg is None else f", CFG scale {self.cfg:g}"
        scale = "" if any(phase.announced for phase in self.phases) else scale
        lines = [f"{self.pipeline}: {self.depth} blocks, {self.protocol}{scale}", *self._settings()]
        lines += [f"note: {self.notice}"] if self.notice else []
        total = sum(phase.steps for phase in self.phases)
        for phase in self.phases:
            lines.append(f"steps {phase.first} to {phase.last} of {total}: {_formula(phase)}")
            if phase.weights or phase.announced:
                for steps, plans in phase.kinds:
                    lines += [f"  in {steps} of them:"] if len(phase.kinds) > 1 else []
                    lines += [f"  {line}" for line in _blocks(_rows(plans))]
                    lines += [f"  {line}" for line in self._divided(plans)]
        lines.append(
            f"block-rows per prompt: {self.block_rows}; {self.unshared} without sharing "
            f"({1 - self.block_rows / self.unshared:.1%} saved); {self.cfg_alone} without stgfast"
        )
        if self.ranks > 1:
            lines.append(
                f"over {self.ranks} ranks: {self.longest} block-rows per prompt on the busiest one; "
                f"{self.block_rows / self.ranks:g} if the number of prompts is a multiple of the ranks"
            )
        lines += [f"attention of {_numbered('block', where)}: {way}" for way, where in self.attention.items()]
        lines.append(
            f"memory, in rows per prompt: {self.rows_at_once} in a block at once, {self.rows_held} kept between "
            f"blocks; {self.rows_of_pipeline} in the pipeline's own calls"
        )
        return "\n".join(lines)

    def _divided(self, plans: Sequence[Plan]) -> list[str]:
        """What each rank computes and receives, in words."""
        if self.ranks == 1:
            return []
        division, lines = self.division(plans), []
        names = [branch.name for plan in plans for branch in plan.branches]
        for rank, (share, load) in enumerate(zip(division.shares, division.loads, strict=True)):
            own = [[branch for branch in plan.branches if branch.name in share] for plan in plans]
            made = [make_plan(branches, self.depth, full=self.full) for branches in own if branches]
            computed, got = ", ".join(name for name in names if name in share), len(names) - len(share)
            lines.append(
                f"rank {rank} computes {computed}: {'; '.join(_blocks(_rows(made)))}; {load} block-rows, "
                f"and receives {_counted(got, 'prediction')}"
            )
        idle = range(len(division.shares), self.ranks)
        if idle:
            lines.append(f"{_numbered('rank', idle)}: no gain, repeat the work of the others")
        return lines

    def _settings(self) -> list[str]:
        lines = [
            f"{name}: {part.of} with {_kind(part)} at {_plural('layer', part.layers)}, scale {in_words(part.scale)}, "
            f"base {part.base}"
            for name, part in zip(self.guidance.names, self.guidance.perturbations, strict=True)
        ]
        if self.guidance.rescale != 0.0:
            lines.append(f"rescale: {in_words(self.guidance.rescale)}")
        if self.guidance.cfg is not None:
            lines.append(f"CFG scale in place of the pipeline's: {in_words(self.guidance.cfg)}")
        if self.guidance.formula is not None:
            eta = f", eta {self.guidance.eta:g}" if self.guidance.eta else ""
            lines.append(f"projection: {self.guidance.formula.words}{eta}")
        lines += [f"approximately, by a recipe: {self.recipe}"] if self.recipe is not None else []
        lines += _reused(self.guidance, {name for phase in self.phases for name in phase.branches})
        return lines


def _formula(phase: Phase) -> str:
    if phase.announced:
        return f"the pipeline asks for {', '.join(phase.branches)} and combines them itself"
    if not phase.weights:
        return "the pipeline's own"
    terms = " ".join(f"{weight:+g} {branch}" for branch, weight in phase.weights.items())
    rescaled = f", rescaled by {phase.rescale:g}" if phase.rescale else ""
    return f"g = {terms}{rescaled}" + (f" at step {phase.first}, then by schedule" if phase.varies else "")


def _rows(plans: Sequence[Plan]) -> tuple[int, ...]:
    return tuple(sum(rows) for rows in zip(*(plan.computed for plan in plans), strict=True))


def _reused(guidance: Guidance, branches: Collection[str]) -> list[str]:
    """What is reused across steps, and how much memory it takes, in words."""
    perturbed, values = len({*branches} - {COND, UNCOND}), (guidance.reuse_order or 0) + 1
    reused = {
        "base - perturbed": (guidance.reuse, _counted(perturbed * values, "prediction") if perturbed else ""),
        "cond - uncond": (guidance.reuse_cfg, _counted(values, "prediction")),
        "block residuals": (guidance.reuse_blocks, _counted(len(branches) * values, "hidden state")),
    }
    how = ("repeated", "extrapolated linearly", "extrapolated quadratically")[guidance.reuse_order or 0]
    return [
        f"approximately: {what} computed in {when(spacing)}, {how} in the others; memory: {kept} per prompt"
        for what, (spacing, kept) in reused.items()
        if spacing != EVERY and kept
    ]


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count != 1 else ''}"


def _blocks(rows: Sequence[int]) -> list[str]:
    lines, first = [], 0
    for count, same in itertools.groupby(rows):
        last = first + len(list(same)) - 1
        where = f"blocks {first} to {last}" if last > first else f"block {first}"
        lines.append(f"{where}: {_counted(count, 'row')}")
        first = last + 1
    return lines


def _kind(part: Perturbation) -> str:
    if part.sigma is None:
        return part.kind
    return f"{part.kind} of {'infinite sigma' if math.isinf(part.sigma) else f'sigma {part.sigma:g}'}"


def _numbered(word: str, numbers: Sequence[int]) -> str:
    """Numbers in words, with runs of neighbors as ranges."""
    runs = ((run.start, run.stop - 1) for run in spans(numbers, 1))
    ranges = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
    return f"{word}{'s' if len(numbers) > 1 else ''} {ranges}"


def _plural(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
