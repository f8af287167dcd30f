"""What an adapter says: the facts of one diffusers pipeline that the engine has to know. It is data first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from stgfast.batching.seam import compiled_in_place, unwrapped
from stgfast.batching.stack import Layout, Unit
from stgfast.errors import SettingsError
from stgfast.guidance import COND, UNCOND, Guidance, Moment, Perturbation, Scale
from stgfast.integrations.attention import identity_attention

CallArguments = Mapping[str, Any]  # the arguments of one pipeline call by name, defaults filled in


def requested_scale(call: CallArguments) -> float | None:
    """The CFG scale that a call asks for, None where it asks for none."""
    return float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The CFG scale that the pipeline will combine this step with; a callback may have changed it."""
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def nothing_missing(pipe: Any) -> str | None:
    return None


def steps_of_pipe(pipe: Any) -> int:
    return int(pipe.num_timesteps)


def steps_of_call(call: CallArguments, strength: str = "") -> int:
    """The steps that a call asks for; where the argument named by `strength` says how much of them, only so many."""
    own = next((call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None), None)
    steps = len(own) if own is not None else int(call["num_inference_steps"])
    return min(int(steps * call[strength]), steps) if strength else steps


def rescale_of_call(call: CallArguments) -> float | None:
    return call.get("guidance_rescale") or None


class Passes(NamedTuple):
    """A step of a pipeline that asks for its weak branches itself.

    turns  the branches that each call of the denoiser asks for, as rows of one batch
    weak   the copies of the conditional branch, each with what makes it weak, or None
    """

    turns: tuple[tuple[str, ...], ...]
    weak: Mapping[str, Perturbation | None]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The facts of one pipeline class.

    protocol     how a step calls the denoiser. `stacked`: once, on `[uncond | cond]`, combined afterwards;
                 `sequential`: on cond, then on uncond; `embedded`: on cond, the scale being an input, and on uncond
                 after it only where the call asks for true CFG; `announced`: once for every branch, weak ones too, or
                 for several, and the pipeline combines what it gets itself
    blocks       where the blocks are, in the order in which they run
    units        in place of `blocks`, where they are not lists of blocks: what runs, in order, of a denoiser
    state        the arguments that a block passes on, in the order in which it returns them
    order        the rows of a stacked call
    rows         the arguments, of denoiser, block or attention, that have a row for every sample
    packed       those of a block that have the tokens of all samples one after another along dimension 1, each with the
                 argument that says how many tokens a sample has
    attention    the self-attention of a block
    defaults     the paper's settings
    full         the model handles rows between its blocks: it adds to them, reshapes them or keeps them for later
    float32      the pipeline combines in float32, whatever the denoiser's type
    early        the pipeline has worked on what it got for cond before it calls for uncond
    requested    the CFG scale that a call asks for
    live         the CFG scale that the pipeline will combine this step with, as seen by one of its denoisers
    steps        how many steps the pipeline is about to make, once it runs
    steps_asked  how many steps a call asks for, before it runs
    unsupported  what a pipeline instance has that is not supported, if anything
    identity     the call of an attention module with output = V
    attend       `attend(module, masked, source, *args, **kwargs)`: the whole call of an attention module, where the
                 model's own is slow; output row b is of input row `source[b]`, and the identity where `masked[b]`
    attend_on    the kinds of device where it is faster
    processor    the class of attention processor that it does the work of; with another one it is not used
    changes      for a kind of perturbation that the model itself knows, the arguments that ask a block for it
    announces    whether a pipeline instance follows the announced protocol
    passes       what its next step asks for of a denoiser, by the guidance where that says something, else by the call
    own_rescale  the rescale that a call asks for by the pipeline's own means, if any
    preview      `preview(copy of the pipeline, call, moment)`: put it in the state that this step will find
    within       what has to hold around a whole call
    unfit        what of a guidance, or of a call with it, the pipeline cannot do, if anything
    denoisers    the pipeline's components that are called for steps; those that are None are not
    sample       the argument of a denoiser that has what is to be denoised
    """

    pipeline: str
    protocol: str
    rows: frozenset[str]
    defaults: Guidance
    blocks: tuple[str, ...] = ()
    units: Callable[[nn.Module], Sequence[Unit]] | None = None
    state: tuple[str, ...] = ("hidden_states",)
    order: tuple[str, ...] = (UNCOND, COND)
    packed: Mapping[str, str] = field(default_factory=dict)
    attention: str = "attn1"
    full: bool = False
    float32: bool = False
    early: bool = False
    requested: Callable[[CallArguments], float | None] = requested_scale
    live: Callable[[Any, CallArguments, str], Scale] = live_scale
    steps: Callable[[Any], int] = steps_of_pipe
    steps_asked: Callable[[CallArguments], int] = steps_of_call
    unsupported: Callable[[Any], str | None] = nothing_missing
    identity: Callable[..., Any] = identity_attention
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ("cuda",)
    processor: str = ""
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own_rescale: Callable[[CallArguments], float | None] = rescale_of_call
    announces: Callable[[Any], bool] = lambda pipe: False
    passes: Callable[[Any, CallArguments, Guidance, Moment, str], Passes] | None = None
    preview: Callable[[Any, CallArguments, Moment], None] | None = None
    within: Callable[[Any], AbstractContextManager[None]] = lambda pipe: nullcontext()
    unfit: Callable[[Any, Guidance, CallArguments], str | None] = lambda pipe, guidance, call: None
    denoisers: tuple[str, ...] = ("transformer",)
    sample: str = "hidden_states"

    def calls(self, cfg: bool) -> tuple[tuple[str, ...], ...]:
        """The calls of the denoiser that make a step, each with the rows it is called on."""
        if not cfg:
            return ((COND,),)
        return (self.order,) if self.protocol == "stacked" else ((COND,), (UNCOND,))

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        """The blocks of each of a pipeline's denoisers, with what is known about them."""
        there = [name for name in self.denoisers if getattr(pipe, name, None) is not None]
        if not there:
            raise SettingsError(f"pipe.{self.denoisers[0]}: got None, expected the model whose steps are to be guided")
        return {name: self.layout(name, getattr(pipe, name)) for name in there}

    def layout(self, name: str, given: nn.Module) -> Layout:
        denoiser = unwrapped(given)
        if compiled_in_place(denoiser):
            raise SettingsError(
                f"pipe.{name} was compiled in place, as a whole, so its blocks cannot be reached; use "
                f"pipe.{name} = torch.compile(pipe.{name}), or compile its blocks one by one"
            )
        units = self._blocks(denoiser) if self.units is None else self.units(denoiser)
        modules = [module for unit in units for _, module in unit.attentions]
        stock = all(type(getattr(module, "processor", None)).__name__ == self.processor for module in modules)
        attend = self.attend if stock and not any(compiled_in_place(unit.module) for unit in units) else None
        return Layout(
            denoiser=denoiser,
            units=units,
            state=self.state,
            rows=self.rows,
            identity=self.identity,
            full=self.full,
            attend=attend,
            attend_on=self.attend_on,
            changes=self.changes,
            packed=self.packed,
        )

    def _blocks(self, denoiser: nn.Module) -> list[Unit]:
        blocks = [block for path in self.blocks for block in denoiser.get_submodule(path).children()]
        return [Unit(block, i, (("", block.get_submodule(self.attention)),)) for i, block in enumerate(blocks)]
