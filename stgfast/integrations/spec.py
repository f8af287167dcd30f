"""What an adapter says: the facts of one diffusers pipeline that the engine has to know. It is data first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stgfast.batching.seam import compiled_in_place, unwrapped
from stgfast.batching.stack import Layout
from stgfast.errors import SettingsError
from stgfast.guidance import COND, UNCOND, Guidance
from stgfast.integrations.attention import identity_attention

CallArguments = Mapping[str, Any]  # the arguments of one pipeline call by name, defaults filled in


def requested_scale(call: CallArguments) -> float | None:
    """The CFG scale that a call asks for, None where it asks for none."""
    return float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_scale(pipe: Any, call: CallArguments) -> float | None:
    """The CFG scale that the pipeline will combine this step with; a callback may have changed it."""
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def nothing_missing(pipe: Any) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The facts of one pipeline class.

    protocol     how a step calls the denoiser. `stacked`: once, on `[uncond | cond]`, combined in float32 afterwards;
                 `sequential`: on cond, then on uncond; `embedded`: on cond, the scale being an input, and on uncond
                 after it only where the call asks for true CFG
    blocks       where the blocks are, in the order in which they run
    state        the arguments that a block passes on, in the order in which it returns them
    rows         the arguments, of denoiser, block or attention, that have a row for every sample
    attention    the self-attention of a block
    defaults     the paper's settings
    requested    the CFG scale that a call asks for
    live         the CFG scale that the pipeline will combine this step with
    unsupported  what a pipeline instance has that is not supported, if anything
    identity     the call of an attention module with output = V
    attend       `attend(module, masked, source, *args, **kwargs)`: the whole call of an attention module, where the
                 model's own is slow; output row b is of input row `source[b]`, and the identity where `masked[b]`
    attend_on    the kinds of device where it is faster
    processor    the class of attention processor that it does the work of; with another one it is not used
    denoiser     the pipeline's component that is called every step
    """

    pipeline: str
    protocol: str
    blocks: tuple[str, ...]
    state: tuple[str, ...]
    rows: frozenset[str]
    attention: str
    defaults: Guidance
    requested: Callable[[CallArguments], float | None] = requested_scale
    live: Callable[[Any, CallArguments], float | None] = live_scale
    unsupported: Callable[[Any], str | None] = nothing_missing
    identity: Callable[..., Any] = identity_attention
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ("cuda",)
    processor: str = ""
    denoiser: str = "transformer"

    def calls(self, cfg: bool) -> tuple[tuple[str, ...], ...]:
        """The calls of the denoiser that make a step, each with the rows it is called on."""
        if not cfg:
            return ((COND,),)
        return ((UNCOND, COND),) if self.protocol == "stacked" else ((COND,), (UNCOND,))

    def layout(self, pipe: Any) -> Layout:
        """The blocks of a pipeline's denoiser, with what is known about them."""
        if getattr(pipe, self.denoiser) is None:
            raise SettingsError(f"pipe.{self.denoiser}: got None, expected the model whose steps are to be guided")
        denoiser = unwrapped(getattr(pipe, self.denoiser))
        if compiled_in_place(denoiser):
            raise SettingsError(
                f"pipe.{self.denoiser} was compiled in place, as a whole, so its blocks cannot be reached; use "
                f"pipe.{self.denoiser} = torch.compile(pipe.{self.denoiser}), or compile its blocks one by one"
            )
        blocks = [block for path in self.blocks for block in denoiser.get_submodule(path).children()]
        attentions = [block.get_submodule(self.attention) for block in blocks]
        stock = all(type(getattr(module, "processor", None)).__name__ == self.processor for module in attentions)
        attend = self.attend if stock and not any(map(compiled_in_place, blocks)) else None
        return Layout(denoiser, blocks, attentions, self.state, self.rows, self.identity, attend, self.attend_on)

    @property
    def combines_in_float32(self) -> bool:
        return self.protocol == "stacked"
