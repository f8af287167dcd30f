"""One observed step of a call by the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.outputs import prediction_in
from stgfast.batching.plan import Plan
from stgfast.batching.seam import Call
from stgfast.engine import Run, Step, Strategy
from stgfast.integrations.steps import CallArguments
from stgfast.proof.watch import Answer, Asked, Watch


class EngineStep:
    """One step by the engine: predictions by branch if it combines, and what the scheduler receives.

    Attributes:
        make: makes the run for a copy of the pipeline and the arguments of a call.
        rows: counted by hooks on the blocks, by block.
    """

    def __init__(self, watch: Watch, stub: Answer | None, step: int, make: Callable[[Any, CallArguments], Run]):
        self.strategy: _Watched | None = None
        self.rows: Counter[nn.Module] = Counter()

        def act(pipe: Any, call: CallArguments) -> None:
            run = make(pipe, call)
            run.strategy = self.strategy = _Watched(run.strategy, watch, stub, step)
            units = [unit.module for layout in run.layouts.values() for unit in layout.units]
            with self._counted([] if run.compiles else units):
                run.whole(watch.given(call))

        self.seen = watch.act(act)[step]
        inner: Any = self.strategy.inner if self.strategy is not None else None
        self.predictions: dict[str, Tensor] = getattr(inner, "predictions", {})

    @property
    def plans(self) -> list[Plan]:
        """The plans of the step's calls."""
        made = self.strategy.strategy if self.strategy is not None else None
        return list(getattr(made, "plans", {}).values())

    @contextmanager
    def _counted(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Count rows by hooks. Compiled blocks are not counted, because hooks would compile them again."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.rows[module] += next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

        hooks = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watched:
    """A strategy that records its steps. Steps before the compared one run no model."""

    def __init__(self, strategy: Strategy, watch: Watch, stub: Answer | None, step: int):
        self.strategy, self.watch, self.stub, self.step = strategy, watch, stub, step
        self.inner: Step | None = None  # the compared step

    def begin(self, run: Run, name: str) -> Step:
        number = run.steps_done
        if number == self.step:
            self.inner = self.strategy.begin(run, name)
            return _Recorded(self, name, self.inner.calls, self.inner.answer)
        if self.inner is not None:  # this step is the end of the run
            return _Recorded(self, name, self.inner.calls, self.inner.answer)
        calls = run.adapter.calls(run.adapter.live(run.pipe, run.call, name) is not None)

        def answer(turn: int, plain: Call, arguments: Arguments) -> Any:
            assert self.stub is not None
            return self.stub(number, turn, name, plain, arguments)

        return _Recorded(self, name, calls, answer)

    def perturbed_layers(self, layout: Layout) -> Collection[int | None]:
        return self.strategy.perturbed_layers(layout)


class _Recorded:
    """A step that is recorded."""

    def __init__(self, by: _Watched, name: str, calls: tuple[tuple[str, ...], ...], answer: Callable[..., Any]):
        self.by, self.name, self.calls, self._answer = by, name, calls, answer

    def answer(self, turn: int, plain: Call, arguments: Arguments) -> Any:
        watch = self.by.watch
        watch.begin(arguments, self.by.step + 1)
        output = self._answer(turn, plain, arguments)
        watch.steps[-1].asked.append(Asked(self.name, arguments, output, len(prediction_in(output))))
        return output
