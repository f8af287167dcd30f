"""One call of a pipeline, run on a copy of it as often as needed.

Each run starts from the same random state and leaves nothing behind on the pipeline. The scheduler returns the sample
that it received, so all runs have the same samples whatever the predictions are. Each step records the calls of
denoisers and what the scheduler received.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.outputs import prediction_in
from stgfast.batching.seam import Call, Handler, handling, held

# `answer(step, turn, name of the denoiser, its own forward, its arguments)`: what the pipeline gets for a call.
Answer = Callable[[int, int, str, Call, Arguments], Any]


class Enough(BaseException):
    """Ends a run. It is not an Exception, so that a pipeline which catches errors lets it through."""


THIN = 1 << 16  # the number of values stored for each step, if all steps are stored


@dataclass
class Asked:
    """One call of a denoiser, its output, and the number of rows of its prediction."""

    name: str
    arguments: Arguments
    output: Any
    rows: int = 0


@dataclass
class Seen:
    """One step: its calls of denoisers, and the predictions that the scheduler received."""

    asked: list[Asked] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)

    @property
    def combined(self) -> list[Tensor]:
        """What was sent after predictions were combined. A pipeline may first send them together, for x0 of each."""
        rows = min(len(sent) for sent in self.sent)
        return [sent for sent in self.sent if len(sent) == rows]


class Watch:
    """The runs of one call.

    Attributes:
        cls: the pipeline's own class, by which it is called.
        call: the arguments by name, including `self`.
        sample: the denoiser's argument with the noisy latents.
        copy, copied_call: the pipeline of the last run, and its arguments.
        still: whether all steps of all runs have the same samples. Without a scheduler this is not possible.
    """

    def __init__(
        self,
        pipe: Any,
        cls: type[Any],
        call: Mapping[str, Any],
        denoisers: Mapping[str, nn.Module],
        sample: str = "hidden_states",
    ):
        self.pipe, self.cls, self.call, self.sample = pipe, cls, call, sample
        self.still = hasattr(getattr(pipe, "scheduler", None), "step")
        self.denoisers = {name: unwrapped(module) for name, module in denoisers.items()}
        parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
        # Text encoders and similar models give the same in each run: they only run in the first one.
        self._others = {name: unwrapped(part) for name, part in parts.items() if name not in self.denoisers}
        self._outputs: dict[str, list[Any]] | None = None
        self.thin = False
        self.steps: list[Seen] = []

    def run(self, answer: Answer, *, steps: int | None = None, thin: bool = False) -> list[Seen]:
        """Run the call with these outputs, to its end or for a number of steps.

        With `thin`, only the tensors of the first step are stored, and a part of what is sent in each.
        """
        self.thin = thin
        modules = [*self.denoisers.values(), *self._others.values()]

        def act(pipe: Any, call: Mapping[str, Any]) -> None:
            handlers: dict[nn.Module, Handler] = {
                module: functools.partial(self._asked, answer, steps, name) for name, module in self.denoisers.items()
            }
            with held(modules), self._once() as replayed, handling(handlers | replayed):
                self.given(call)()

        return self.act(act)

    def act(self, act: Callable[[Any, Mapping[str, Any]], None]) -> list[Seen]:
        """The steps of the call that `act(copy of the pipeline, its arguments)` makes."""
        self.steps = []
        self.copy = pipe = self._copied()
        self.copied_call = call = {name: _again(value) for name, value in self.call.items()} | {"self": pipe}
        _ask_for_latents(call)
        devices = sorted({part.device.index or 0 for part in _tensors(self.denoisers) if part.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                act(pipe, call)
        except Enough:
            pass
        finally:
            free = getattr(pipe, "maybe_free_model_hooks", None)  # the call itself undoes offloading in its last line
            if free is not None:
                free()
            if "_all_hooks" in vars(pipe):
                self.pipe._all_hooks = pipe._all_hooks
        return self.steps

    def begin(self, arguments: Arguments, steps: int | None = None) -> int:
        """Record a call of a denoiser; return the number of its step."""
        if not self.still and self.steps:
            self._moved(arguments)
        if not self.steps or self.steps[-1].sent:
            if len(self.steps) == steps:
                raise Enough
            self.steps.append(Seen())
        return len(self.steps) - 1

    def _asked(self, answer: Answer, steps: int | None, name: str, plain: Call, arguments: Arguments) -> Any:
        step = self.begin(arguments, steps)
        seen = self.steps[step]
        output = answer(step, len(seen.asked), name, plain, arguments)
        rows = len(prediction_in(output))
        if self.thin and self.still and step:
            arguments, kept = Arguments(arguments.module, (), {}), None
        else:
            kept = output
        seen.asked.append(Asked(name, arguments, kept, rows))
        return output

    def _moved(self, arguments: Arguments) -> None:
        """Without a scheduler, a step ends when the next call has other samples: these stand for what was sent."""
        before, now = (one[self.sample] for one in (self.steps[-1].asked[0].arguments, arguments))
        if before.shape != now.shape or not torch.equal(before, now):
            half = len(now) // 2
            twice = len(now) % 2 == 0 and torch.equal(now[:half], now[half:])
            self.steps[-1].sent.append(now[:half] if twice else now)

    def given(self, call: Mapping[str, Any]) -> Callable[[], Any]:
        bound = inspect.BoundArguments(inspect.signature(self.cls.__call__), dict(call))
        return functools.partial(self.cls.__call__, *bound.args, **bound.kwargs)

    def _copied(self) -> Any:
        """A pipeline of the same class around the same models, with its own scheduler and guider."""
        pipe = object.__new__(self.cls)
        vars(pipe).update(vars(self.pipe))
        vars(pipe).update(self.denoisers)
        for name, part in vars(self.pipe).items():
            if hasattr(part, "set_timesteps") or hasattr(part, "set_state"):
                vars(pipe)[name] = copy.deepcopy(part)
        if "_blocks" in vars(pipe):  # of a modular pipeline
            pipe._blocks = copy.deepcopy(pipe._blocks)
            _silence(pipe._blocks)
        elif hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        if self.still:
            pipe.scheduler.__class__ = self._standing_still(type(pipe.scheduler))
        return pipe

    def _standing_still(self, cls: type[Any]) -> type[Any]:
        """A scheduler class that records what it receives, and returns the sample unchanged.

        It is a class and not an attribute of one scheduler, because pipelines copy theirs.
        """
        signature = inspect.signature(cls.step)

        @functools.wraps(cls.step)  # pipelines read its signature
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(scheduler, *args, **kwargs).arguments
            if self.steps:
                sent = given["model_output"].detach()
                self.steps[-1].sent.append(_thinned(sent) if self.thin else sent.clone())
            made = cls.step(scheduler, *args, **kwargs)
            sample = given["sample"]
            if isinstance(made, tuple):
                return (sample, *made[1:])
            made.prev_sample = sample
            return made

        return type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})

    @contextmanager
    def _once(self) -> Iterator[dict[nn.Module, Handler]]:
        """Handlers by which models other than denoisers run in the first run, and return the same later."""
        recorded, replayed = self._outputs, dict.fromkeys(self._others, 0)
        outputs: dict[str, list[Any]] = {name: [] for name in self._others}

        def handler(name: str, plain: Call, arguments: Arguments) -> Any:
            if recorded is None or replayed[name] == len(recorded[name]):
                outputs[name].append(arguments.given_to(plain))
                return outputs[name][-1]
            replayed[name] += 1
            return recorded[name][replayed[name] - 1]

        try:
            yield {module: functools.partial(handler, name) for name, module in self._others.items()}
        finally:
            if recorded is None:
                self._outputs = outputs


def _thinned(sent: Tensor) -> Tensor:
    """Each n-th number along the last dimensions."""
    for dim in range(sent.ndim - 1, 1, -1):
        every = min(-(-sent.numel() // THIN), sent.shape[dim])
        sent = sent[(slice(None),) * dim + (slice(None, None, max(every, 1)),)]
    return sent.to("cpu", copy=True)


def _silence(blocks: Any) -> None:
    """Switch off the progress bars of a modular pipeline's blocks, at any depth."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        _silence(block)
    if hasattr(type(blocks), "progress_bar"):
        blocks._progress_bar_config = {"disable": True}


def _ask_for_latents(call: dict[str, Any]) -> None:
    """Change the call so that no run decodes, and none calls the user's callback."""
    for name, value in (("output_type", "latent"), ("callback_on_step_end", None)):
        if name in call:
            call[name] = value


def _again(value: Any) -> Any:
    """An argument as it was given, with random generators in their original state."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, list | tuple) and any(isinstance(part, torch.Generator) for part in value):
        return [_again(part) for part in value]
    return {name: _again(part) for name, part in value.items()} if type(value) is dict else value


def _tensors(modules: Mapping[str, nn.Module]) -> list[Tensor]:
    return [next(module.parameters()) for module in modules.values()]
