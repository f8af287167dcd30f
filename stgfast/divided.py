"""Steps whose branches are divided over processes: each computes some of them and receives the others.

The results of a step are sent once, after its last call. Until then, a pipeline that calls its denoiser for one branch
after another has tensors of zeros, which are filled then.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from stgfast.announced import Answering, AnsweringStep, parts_of, tensors_of, with_tensors
from stgfast.batching.arguments import Arguments
from stgfast.batching.outputs import prediction_in, with_prediction
from stgfast.batching.plan import Branch, branches_for
from stgfast.batching.rows import join
from stgfast.batching.seam import Call
from stgfast.combining import Combining, CombiningStep
from stgfast.engine import Run
from stgfast.errors import EngineError
from stgfast.formulas import COND, UNCOND
from stgfast.integrations.spec import Passes
from stgfast.ranks.shared import Shared


class DividedCombining(Combining):
    """The strategy in which each process combines, all alike."""

    def begin(self, run: Run, name: str) -> DividedStep:
        return DividedStep(self, run, name)


class DividedStep(CombiningStep):
    """The state of one step."""

    def __init__(self, strategy: Combining, run: Run, name: str):
        super().__init__(strategy, run, name)
        self.shared: Shared | None = None  # set at its first call
        self.sample: Tensor | None = None  # the sample of its last call
        self.like: Tensor | None = None  # a prediction, for its form

    def own(self, turn: int, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> Any:
        self.predict(plain, arguments, sources)
        if turn < len(self.calls) - 1:
            return self.hand_out()
        self._gather()
        if len(self.calls) == 1:
            return self.formed(join([self.predictions[source] for source in sources]))
        held = self.held()
        if held is None:
            uncond, cond = self.predictions[UNCOND], self.predictions[COND]
            return self.in_place_of_all(uncond + cast(Tensor, self.cfg) * (cond - uncond))
        for (source,), tensor in zip(self.calls, held, strict=False):
            tensor.copy_(self.predictions[source])
        return self.formed(self.predictions[sources[0]])

    def predict(self, plain: Call, arguments: Arguments, sources: tuple[str, ...]) -> None:
        run, ends = self.run, self.strategy.blocks.ends
        self.shared = shared = self.shared or self._shared(run.prompts(arguments, sources))
        self.sample = arguments[run.adapter.sample]
        plan = self.strategy.plan(self, sources, shared.mine)
        if plan.branches:
            self.take(plan, run.compute(self.name, plain, arguments, sources, plan, ends, shared.prompts))
        elif self.form is None:
            output = run.blank(self.name, plain, arguments, sources)
            self.form, self.like = functools.partial(with_prediction, output), prediction_in(output)

    def hand_out(self) -> Any:
        given = self._alike.new_zeros(cast(Shared, self.shared).all_prompts, *self._alike.shape[1:])
        self.handed.append(weakref.ref(given))
        return self.formed(given)

    def given(self) -> Tensor | None:
        return None

    def end(self) -> Any:
        self._gather()
        return super().end()

    def _shared(self, prompts: int) -> Shared:
        """Which process computes which branches. The division stays the same if processes store what blocks added."""
        computed = self.computed
        if self.acts and self.strategy.blocks.ends is not None:
            computed = frozenset(itertools.chain(*self.calls, self.guidance.names))
        calls = [branches_for(self.guidance, sources, computed, self.layout.marks) for sources in self.calls]
        return self.run.shared(self.name, calls, prompts)

    def _gather(self) -> None:
        """Receive what the other processes computed."""
        shared, plans = cast(Shared, self.shared), [self.strategy.plan(self, sources) for sources in self.calls]
        shared.made = {name: (prediction,) for name, prediction in self.predictions.items()}
        where = self.run.place(self.moment, cast(Tensor, self.sample))
        whole = shared.whole(_names([plan.branches for plan in plans]), [self._alike], where)
        self.predictions = {name: prediction for name, (prediction,) in whole.items()}

    @property
    def _alike(self) -> Tensor:
        """A tensor like each prediction, except for the number of rows."""
        return cast(Tensor, next(iter(self.predictions.values()), self.like))


class DividedAnswering(Answering):
    """The strategy in which the pipeline combines, in each process alike."""

    passes: Passes | None = None  # of the last step

    def foresee(self, passes: Passes) -> None:
        if passes != self.passes:  # another process may hold what blocks added to a branch
            self.blocks.forget()
        self.passes = passes

    def step(self, *of_step: Any) -> DividedAnswer:
        return DividedAnswer(*of_step)


class DividedAnswer(AnsweringStep):
    """The state of one step."""

    def __init__(self, *of_step: Any):
        super().__init__(*of_step)
        computing = [turn for turn, asked in enumerate(self.calls) if self.passes.computed_in(asked, self.recalled)]
        self.computing: Sequence[int] = computing
        self.shared: Shared | None = None
        self.form: Any = None  # an output of the denoiser
        self.handed: list[tuple[tuple[str, ...], list[weakref.ref[Tensor]]]] = []

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        asked = self.calls[turn]
        if turn in self.computing:
            self._compute(turn, plain, arguments)
        return self.answered(asked) if set(asked) <= self.held.keys() else self._hand_out(asked)

    def _compute(self, turn: int, plain: Call, arguments: Arguments) -> None:
        """Compute this process's share of a call. After the last call, return what all processes computed."""
        run, asked = self.run, self.calls[turn]
        # A pipeline that uses a prediction at once must receive it at once.
        turns = [turn] if run.adapter.early else self.computing
        plans = [self.plan(self.calls[one]) for one in turns]
        if turn == turns[0]:
            prompts = run.prompts(arguments, asked)
            self.shared = run.shared(self.name, [plan.branches for plan in plans], prompts)
        shared = cast(Shared, self.shared)
        mine = self.plan(asked, shared.mine)
        if mine.branches:
            self.form = run.compute(self.name, plain, arguments, asked, mine, self.blocks.ends, shared.prompts)
            shared.made |= {name: tensors_of(part) for name, part in parts_of(self.form, mine).items()}
        elif self.form is None:
            self.form = run.blank(self.name, plain, arguments, asked)
        if turn != turns[-1]:
            return
        where = run.place(self.moment, arguments[run.adapter.sample])
        whole = shared.whole(_names([plan.branches for plan in plans]), self._alike, where)
        self.hold(self.form, {name: with_tensors(self.form, tensors) for name, tensors in whole.items()})
        for earlier, given in self.handed:
            self._fill(given, tensors_of(self.answered(earlier)))

    def _fill(self, given: Sequence[weakref.ref[Tensor]], known: Sequence[Tensor]) -> None:
        for reference, tensor in zip(given, known, strict=True):
            held = reference()
            if held is None:
                raise EngineError(
                    "branches over processes: got a pipeline that uses a prediction before it asks for the next one, "
                    "expected one that uses predictions after it has all of them; set early=True in its adapter"
                )
            held.copy_(tensor)

    def _hand_out(self, asked: tuple[str, ...]) -> Any:
        rows = len(asked) * cast(Shared, self.shared).all_prompts
        given = [like.new_zeros(rows, *like.shape[1:]) for like in self._alike]
        self.handed.append((asked, [weakref.ref(tensor) for tensor in given]))
        return with_tensors(self.form, given)

    @property
    def _alike(self) -> tuple[Tensor, ...]:
        """Tensors like each prediction, except for the number of rows."""
        made = cast(Shared, self.shared).made
        return next(iter(made.values()), tensors_of(self.form))


def _names(calls: Sequence[Sequence[Branch]]) -> list[str]:
    return [branch.name for call in calls for branch in call]
