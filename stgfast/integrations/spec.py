"""What an adapter contains: the facts about one diffusers pipeline, mostly as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.layout import Blocks, Layout
from stgfast.batching.seam import compiled_in_place
from stgfast.errors import SettingsError, check_names, wrong
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance, Scale
from stgfast.integrations.clips import DEFAULT, Clips
from stgfast.integrations.scales import live_scale, requested_scale, rescale_of_call
from stgfast.integrations.steps import CallArguments, last_sigmas, schedule_of_call, steps_of_call, steps_of_pipe
from stgfast.perturbation import Perturbation
from stgfast.schedules import Moment

PROTOCOLS = ("stacked", "sequential", "embedded", "announced")


def patches(
    call: CallArguments, denoiser: Arguments, block: Arguments, dims: tuple[int, ...] = (2, 3, 4)
) -> tuple[int, int, int]:
    """The (frames, height, width) of tokens in a sample that reaches the denoiser without patches.

    `dims` are their dimensions. If frames are left out, there is one frame, or frames are rows.
    """
    config: Any = denoiser.module.config
    patch = config["patch_size"]
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    shape = denoiser["hidden_states"].shape
    frames, height, width = [1, *(shape[dim] for dim in dims)][-3:]
    return frames // patch[0], height // patch[1], width // patch[2]


class Passes(NamedTuple):
    """One step of a pipeline that asks for perturbed branches itself.

    Attributes:
        turns: the branches that each call of the denoiser asks for, as rows of one batch.
        perturbed: the branches that perturb the conditional one, each with its perturbation, or None.
    """

    turns: tuple[tuple[str, ...], ...]
    perturbed: Mapping[str, Perturbation | None]

    @property
    def branches(self) -> frozenset[str]:
        return frozenset(branch for turn in self.turns for branch in turn)

    @property
    def differing(self) -> frozenset[str]:
        """The branches that can be stored as differences from the conditional one, which is known when they are
        asked for.
        """
        first = next(number for number, turn in enumerate(self.turns) if COND in turn)
        alike = {COND, *(name for name, part in self.perturbed.items() if part is None)}
        return frozenset(branch for turn in self.turns[first:] for branch in turn) - alike

    def computed_in(self, turn: Sequence[str], recalled: Collection[str]) -> bool:
        """Whether this call of the denoiser computes anything."""
        return not set(turn) <= {*self.perturbed, *recalled}


# Defaults of an adapter. Named functions, because an accelerated pipeline is pickled with its adapter.


def nothing_missing(pipe: Any) -> str | None:
    return None


def nothing_else(call: CallArguments) -> str:
    return ""


def always(pipe: Any) -> bool:
    return True


def never(pipe: Any) -> float | None:
    return None


def nothing_within(pipe: Any) -> AbstractContextManager[None]:
    return nullcontext()


def all_fits(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Announced:
    """The facts about a pipeline that asks for perturbed branches itself, and combines them.

    Args:
        perturbed: the names of the perturbed branches that it may ask for.
        passes: the passes that its next step asks of a denoiser, by the guidance or else by the call.
        preview: `preview(copy of the pipeline, call, moment)` puts the copy in the state of this step.
        when: whether a pipeline instance is of that kind.
    """

    perturbed: tuple[str, ...]
    passes: Callable[[Any, CallArguments, Guidance, Moment, str], Passes]
    preview: Callable[[Any, CallArguments, Moment], None]
    when: Callable[[Any], bool] = always


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The facts about one pipeline class. `Adapter.of` proposes them for a pipeline that is not in the table.

    Args:
        pipeline: the name of the class.
        protocol: how a step calls the denoiser. `"stacked"`: once, on `[uncond | cond]`. `"sequential"`: on cond, then
            on uncond. `"embedded"`: on cond, with the CFG scale as an input, and then on uncond only if the call asks
            for true CFG. `"announced"`: once for each branch or for several, perturbed ones included; the pipeline
            combines them itself.
        blocks: the facts about the blocks of its denoisers.
        defaults: the default guidance.
        source: where the defaults come from.
        clips: the facts that rendering needs.
        announced: the facts about a pipeline that asks for perturbed branches itself.
        order: the order of the rows in a stacked call.
        float32: the pipeline combines in float32, whatever the type of the denoiser.
        learned_sigma: the second half of a prediction's channels is not noise. The pipeline drops it after CFG.
        early: the pipeline uses the cond prediction before it calls for uncond.
        requested: the CFG scale that a call asks for.
        cfg_on: how a call asks for CFG, in words.
        live: the CFG scale with which the pipeline will combine this step, for one of its denoisers.
        own_rescale: the rescale that a call asks for by the pipeline's own argument, if it has one.
        steps: the number of steps that a running pipeline will make.
        windowed: the pipeline makes all these steps again for each part of a longer clip.
        steps_asked: the number of steps that a call asks for, before it runs.
        schedule: the arguments of the scheduler's `set_timesteps`, without the device. Used to count the steps that
            `stgfast.restart` adds.
        sigmas: the noise levels of the coming steps, when the scheduler has its timesteps.
        unsupported: what of a pipeline instance is not supported, or None.
        unfit: what of a guidance or call the pipeline cannot do, or None.
        notice: what a call gets that it does not seem to ask for, or "".
        own_solver: why another solver cannot make its steps, or "".
        within: a context manager around a whole call.
        denoisers: the components that predict. Those that are None are ignored.
        second_below: the timestep below which the second of two denoisers is called.
        sample: the name of the denoiser's argument with the noisy latents.

    Raises:
        SettingsError: a fact is impossible.

    Example:
        >>> adapter = stgfast.Adapter.of(pipe, "a prompt")
        >>> adapter.protocol
        'stacked'
    """

    pipeline: str
    protocol: str
    blocks: Blocks
    defaults: Guidance
    source: str = "our choice"
    clips: Clips = DEFAULT
    announced: Announced | None = None
    order: tuple[str, ...] = (UNCOND, COND)
    float32: bool = False
    learned_sigma: bool = False
    early: bool = False
    requested: Callable[[CallArguments], float | None] = requested_scale
    cfg_on: str = "guidance_scale above 1"
    live: Callable[[Any, CallArguments, str], Scale] = live_scale
    own_rescale: Callable[[CallArguments], float | None] = rescale_of_call
    steps: Callable[[Any], int] = steps_of_pipe
    windowed: bool = False
    steps_asked: Callable[[CallArguments], int] = steps_of_call
    schedule: Callable[[Any, CallArguments], Mapping[str, Any]] = schedule_of_call
    sigmas: Callable[[Any, int], list[float]] = last_sigmas
    unsupported: Callable[[Any], str | None] = nothing_missing
    unfit: Callable[[Any, Guidance, CallArguments], str | None] = all_fits
    notice: Callable[[CallArguments], str] = nothing_else
    own_solver: str = ""
    within: Callable[[Any], AbstractContextManager[None]] = nothing_within
    denoisers: tuple[str, ...] = ("transformer",)
    second_below: Callable[[Any], float | None] = never
    sample: str = "hidden_states"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise wrong("protocol of an adapter", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        if (self.protocol == "announced") > (self.announced is not None):
            raise wrong("announced of an adapter", self.announced, "what the pipeline asks for itself, by its protocol")
        for name, kind in {"blocks": Blocks, "clips": Clips, "defaults": Guidance}.items():
            if not isinstance(getattr(self, name), kind):
                raise wrong(f"{name} of an adapter", getattr(self, name), f"a {kind.__name__}")
        for name in ("order", "denoisers"):
            check_names(f"{name} of an adapter", getattr(self, name))

    @staticmethod
    def of(pipe: Any, *args: Any, **call: Any) -> Adapter:
        """Propose the facts of a pipeline that is not in the table, by the first step of this call.

        The proposal is for reading and changing. It is verified at the first call that it guides.

        Example:
            >>> adapter = stgfast.Adapter.of(pipe, "a prompt")
        """
        from stgfast.facts import proposal

        return proposal(pipe, *args, **call)

    def announces(self, pipe: Any) -> bool:
        """Whether a pipeline instance asks for perturbed branches itself."""
        return self.announced is not None and self.announced.when(pipe)

    def calls(self, cfg: bool) -> tuple[tuple[str, ...], ...]:
        """The calls of the denoiser in a step, each with the branches of its rows."""
        if not cfg:
            return ((COND,),)
        return (self.order,) if self.protocol == "stacked" else ((COND,), (UNCOND,))

    def steps_of_run(self, pipe: Any, call: CallArguments) -> int:
        """The number of steps that a call makes: those that it asks for, and those that restarts add."""
        steps = self.steps_asked(call)
        restarts = getattr(getattr(pipe, "scheduler", None), "restarts", None)
        return steps if restarts is None else steps + int(restarts(**self.schedule(pipe, call)))

    def called(self, pipe: Any, steps: int) -> list[str]:
        """The denoiser of each coming step, when the scheduler has its timesteps."""
        below = self.second_below(pipe)
        times = [float(time) for time in pipe.scheduler.timesteps[-steps:]]
        return [self.denoisers[below is not None and time < below] for time in times]

    def on(self, pipe: Any) -> Fitted:
        """This adapter with the blocks of one pipeline."""
        return Fitted(pipe, self, self.layouts(pipe))

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        """The blocks of each of a pipeline's denoisers."""
        there = [name for name in self.denoisers if getattr(pipe, name, None) is not None]
        if not there:
            raise SettingsError(f"pipe.{self.denoisers[0]}: got None, expected the model whose steps are to be guided")
        return {name: self._layout(name, getattr(pipe, name)) for name in there}

    def _layout(self, name: str, given: nn.Module) -> Layout:
        denoiser = unwrapped(given)
        if compiled_in_place(denoiser):
            raise SettingsError(
                f"pipe.{name} was compiled in place, as a whole, so its blocks cannot be reached; use "
                f"pipe.{name} = torch.compile(pipe.{name}), or compile its blocks one by one"
            )
        try:
            layout = self.blocks.of(denoiser)
        except AttributeError as error:  # a wrapper such as DataParallel, or another model
            got, named = type(denoiser).__name__, ", ".join(self.blocks.lists) or "the blocks"
            raise SettingsError(f"pipe.{name}: got {got}, expected a model with {named} ({error})") from error
        parameters = inspect.signature(type(denoiser).forward).parameters
        by_name = all(one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values())
        if by_name and self.sample not in parameters:
            raise wrong("sample of an adapter", self.sample, f"an argument of {type(denoiser).__name__}.forward")
        return layout


class Fitted(NamedTuple):
    """An adapter with one pipeline and the current blocks of its denoisers."""

    pipe: Any
    adapter: Adapter
    layouts: Mapping[str, Layout]
