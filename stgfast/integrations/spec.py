"""What an adapter says: the facts of one diffusers pipeline that the engine has to know. It is data first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stgfast.batching.seam import compiled_in_place, unwrapped
from stgfast.batching.stack import Layout, Unit
from stgfast.errors import SettingsError
from stgfast.guidance import COND, UNCOND, Guidance, Scale
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


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The facts of one pipeline class.

    protocol     how a step calls the denoiser. `stacked`: once, on `[uncond | cond]`, combined afterwards;
                 `sequential`: on cond, then on uncond; `embedded`: on cond, the scale being an input, and on uncond
                 after it only where the call asks for true CFG
    blocks       where the blocks are, in the order in which they run
    units        in place of `blocks`, where they are not lists of blocks: what runs, in order, of a denoiser
    state        the arguments that a block passes on, in the order in which it returns them
    rows         the arguments, of denoiser, block or attention, that have a row for every sample
    attention    the self-attention of a block
    defaults     the paper's settings
    full         the model handles rows between its blocks: it adds to them, reshapes them or keeps them for later
    float32      the pipeline combines in float32, whatever the denoiser's type
    requested    the CFG scale that a call asks for
    live         the CFG scale that the pipeline will combine this step with, as seen by one of its denoisers
    steps        how many steps the pipeline is about to make, once it runs
    unsupported  what a pipeline instance has that is not supported, if anything
    identity     the call of an attention module with output = V
    attend       `attend(module, masked, source, *args, **kwargs)`: the whole call of an attention module, where the
                 model's own is slow; output row b is of input row `source[b]`, and the identity where `masked[b]`
    attend_on    the kinds of device where it is faster
    processor    the class of attention processor that it does the work of; with another one it is not used
    changes      for a kind of perturbation that the model itself knows, the arguments that ask a block for it
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
    attention: str = "attn1"
    full: bool = False
    float32: bool = False
    requested: Callable[[CallArguments], float | None] = requested_scale
    live: Callable[[Any, CallArguments, str], Scale] = live_scale
    steps: Callable[[Any], int] = steps_of_pipe
    unsupported: Callable[[Any], str | None] = nothing_missing
    identity: Callable[..., Any] = identity_attention
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ("cuda",)
    processor: str = ""
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    denoisers: tuple[str, ...] = ("transformer",)
    sample: str = "hidden_states"

    def calls(self, cfg: bool) -> tuple[tuple[str, ...], ...]:
        """The calls of the denoiser that make a step, each with the rows it is called on."""
        if not cfg:
            return ((COND,),)
        return ((UNCOND, COND),) if self.protocol == "stacked" else ((COND,), (UNCOND,))

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
        )

    def _blocks(self, denoiser: nn.Module) -> list[Unit]:
        blocks = [block for path in self.blocks for block in denoiser.get_submodule(path).children()]
        return [Unit(block, i, (("", block.get_submodule(self.attention)),)) for i, block in enumerate(blocks)]
