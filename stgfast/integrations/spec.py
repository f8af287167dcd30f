"""What an adapter says: the facts of one diffusers pipeline that the engine has to know. It is data first."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.layout import Grid, Layout, Unit, processor_of
from stgfast.batching.seam import caching_hooks, compiled, compiled_in_place
from stgfast.errors import SettingsError, wrong
from stgfast.guidance import COND, UNCOND, Guidance, Perturbation, Scale
from stgfast.integrations.attention import identity_attention
from stgfast.kernels import blur
from stgfast.schedules import Moment

EACH, ONE = "each", "one"  # of Adapter.images
PROTOCOLS = ("stacked", "sequential", "embedded", "announced")
CallArguments = Mapping[str, Any]  # the arguments of one pipeline call by name, defaults filled in


def requested_scale(call: CallArguments) -> float | None:
    """The CFG scale that a call asks for, None where it asks for none."""
    return float(call["guidance_scale"]) if call["guidance_scale"] > 1 else None


def live_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    """The CFG scale that the pipeline will combine this step with; a callback may have changed it."""
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None


def true_cfg_scale(call: CallArguments) -> float | None:
    """`guidance_scale` is an input of a distilled model; CFG proper is `true_cfg_scale`, with a negative prompt."""
    negative = call["negative_prompt"] is not None or (
        call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    )
    return float(call["true_cfg_scale"]) if call["true_cfg_scale"] > 1 and negative else None


def live_true_cfg_scale(pipe: Any, call: CallArguments, denoiser: str) -> Scale:
    return true_cfg_scale(call)


# What an adapter does not say. Functions with names: an accelerated pipeline is pickled with its adapter.


def nothing_missing(pipe: Any) -> str | None:
    return None


def never(pipe: Any) -> bool:
    return False


def always(pipe: Any) -> bool:
    return True


def nothing_within(pipe: Any) -> AbstractContextManager[None]:
    return nullcontext()


def all_fits(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    return None


def steps_of_pipe(pipe: Any) -> int:
    return int(pipe.num_timesteps)


def steps_of_call(call: CallArguments, strength: str = "") -> int:
    """The steps that a call asks for; where the argument named by `strength` says how much of them, only so many."""
    own = next((call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None), None)
    steps = len(own) if own is not None else int(call["num_inference_steps"])
    return min(int(steps * call[strength]), steps) if strength else steps


def schedule_of_call(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    """The call's own times or sigmas, or how many steps it asks for."""
    names = ("timesteps", "sigmas", "num_inference_steps")
    return next({name: call[name]} for name in names if call.get(name) is not None)


def scheduled(pipe: Any, schedule: Mapping[str, Any]) -> Any:
    """A copy of the pipeline's scheduler with the timesteps that it is going to have."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(**schedule)
    return scheduler


def even_sigmas(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    """From 1 down in equal steps, where the call has no sigmas of its own."""
    own, steps = call.get("sigmas"), call["num_inference_steps"]
    return {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1] if own is None else own}


def shifted(pipe: Any, tokens: int, base: int, most: int, low: float, high: float) -> Mapping[str, Any]:
    """mu, a line through (base, low) and (most, high); the scheduler's configuration may have other points."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    base, most = config.get("base_image_seq_len", base), config.get("max_image_seq_len", most)
    low, high = config.get("base_shift", low), config.get("max_shift", high)
    return {"mu": low + (tokens - base) * (high - low) / (most - base)}


def latent_tokens(pipe: Any, call: CallArguments) -> int:
    """The tokens of LTX-Video and of LTX-2: one for every place of the latents. LTX-2 has a default for frames."""
    frames = ((call["num_frames"] or 121) - 1) // pipe.vae_temporal_compression_ratio + 1
    side = pipe.vae_spatial_compression_ratio
    return int(frames * (call["height"] // side) * (call["width"] // side))


def sigmas_of_scheduler(pipe: Any) -> list[float]:
    """Of a scheduler's list of sigmas, those of its steps; it has one more, at which it ends. They are shares of noise,
    also where the scheduler counts shares of data."""
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[: len(pipe.scheduler.timesteps)]]
    return [1.0 - sigma for sigma in sigmas] if pipe.scheduler.config.get("invert_sigmas") else sigmas


def last_sigmas(pipe: Any, steps: int) -> list[float]:
    """Where a call makes fewer steps than its scheduler has, it leaves out the first of them."""
    return sigmas_of_scheduler(pipe)[-steps:]


def rescale_of_call(call: CallArguments) -> float | None:
    return call.get("guidance_rescale") or None


def patches(
    call: CallArguments, denoiser: Arguments, block: Arguments, dims: tuple[int, ...] = (2, 3, 4)
) -> tuple[int, int, int]:
    """How many (frames, height, width) of tokens a sample has, where it comes unpatched to the denoiser.

    `dims` are the dimensions of these; where frames are left out, there is one, or they are rows of their own.
    """
    config: Any = denoiser.module.config
    patch = config["patch_size"]
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    shape = denoiser["hidden_states"].shape
    frames, height, width = [1, *(shape[dim] for dim in dims)][-3:]
    return frames // patch[0], height // patch[1], width // patch[2]


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
    defaults     the settings where none are given
    source       where these come from
    full         the model handles rows between its blocks: it adds to them, reshapes them or keeps them for later
    float32      the pipeline combines in float32, whatever the denoiser's type
    learned_sigma  the second half of a prediction's channels is no noise, and the pipeline takes it away after CFG
    early        the pipeline has worked on what it got for cond before it calls for uncond
    requested    the CFG scale that a call asks for
    cfg_on       how a call asks for CFG, in words
    live         the CFG scale that the pipeline will combine this step with, as seen by one of its denoisers
    steps        how many steps the pipeline is about to make, once it runs
    steps_asked  how many steps a call asks for, before it runs
    sigmas       the noise levels of the so many steps to come, once the scheduler has its timesteps
    schedule     what the pipeline gives its scheduler's `set_timesteps`, device aside: by it the steps are counted that
                 a scheduler from `stgfast.restart` adds
    unsupported  what a pipeline instance has that is not supported, if anything
    identity     the call of an attention module with output = V
    attend       `attend(module, masked, source, *args, **kwargs)`: the whole call of an attention module, where the
                 model's own is slow; output row b is of input row `source[b]`, and the identity where `masked[b]`
    attend_on    the kinds of device where it is faster
    processor    the class of attention processor that it does the work of; with another one it is not used
    changes      for a kind of perturbation that the model itself knows, the arguments that ask a block for it
    grid         where the tokens of a self-attention lie, for queries to be blurred; None where that is not known
    announces    whether a pipeline instance follows the announced protocol
    passes       what its next step asks for of a denoiser, by the guidance where that says something, else by the call
    own_rescale  the rescale that a call asks for by the pipeline's own means, if any
    preview      `preview(copy of the pipeline, call, moment)`: put it in the state that this step will find
    within       what has to hold around a whole call
    unfit        what of a guidance, or of a call with it, the pipeline cannot do, if anything
    denoisers    the pipeline's components that are called for steps; those that are None are not
    sample       the argument of a denoiser that has what is to be denoised
    images       how a call for several prompts takes the images that clips begin with: `each`, a list of as many;
                 `one`, the same for all; nothing, where clips are not what they are alone
    exact        the components that are loaded in float32 whatever the others are
    tiled        its VAE decodes in tiles or not at all
    negative     a call fails without a negative prompt
    fps          frames in a second that the model was trained on, or by the pipeline's configuration; those of a call
                 that says so come first
    """

    pipeline: str
    protocol: str
    rows: frozenset[str]
    defaults: Guidance
    source: str = "our choice"
    blocks: tuple[str, ...] = ()
    units: Callable[[nn.Module], Sequence[Unit]] | None = None
    state: tuple[str, ...] = ("hidden_states",)
    order: tuple[str, ...] = (UNCOND, COND)
    packed: Mapping[str, str] = field(default_factory=dict)
    attention: str = "attn1"
    full: bool = False
    float32: bool = False
    learned_sigma: bool = False
    early: bool = False
    requested: Callable[[CallArguments], float | None] = requested_scale
    cfg_on: str = "guidance_scale above 1"
    live: Callable[[Any, CallArguments, str], Scale] = live_scale
    steps: Callable[[Any], int] = steps_of_pipe
    steps_asked: Callable[[CallArguments], int] = steps_of_call
    schedule: Callable[[Any, CallArguments], Mapping[str, Any]] = schedule_of_call
    sigmas: Callable[[Any, int], list[float]] = last_sigmas
    unsupported: Callable[[Any], str | None] = nothing_missing
    identity: Callable[..., Any] = identity_attention
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ("cuda",)
    processor: str = ""
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Grid | None = None
    own_rescale: Callable[[CallArguments], float | None] = rescale_of_call
    announces: Callable[[Any], bool] = never
    passes: Callable[[Any, CallArguments, Guidance, Moment, str], Passes] | None = None
    preview: Callable[[Any, CallArguments, Moment], None] | None = None
    within: Callable[[Any], AbstractContextManager[None]] = nothing_within
    unfit: Callable[[Any, Guidance, CallArguments], str | None] = all_fits
    denoisers: tuple[str, ...] = ("transformer",)
    sample: str = "hidden_states"
    images: str = ""
    exact: tuple[str, ...] = ()
    tiled: bool = False
    negative: bool = False
    fps: float | Callable[[Mapping[str, Any]], float] = 24.0

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise wrong("protocol of an adapter", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        for name in ("blocks", "state", "order", "denoisers", "exact"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), Sequence):
                raise wrong(f"{name} of an adapter", getattr(self, name), "a tuple of names")
        for name in ("rows", "packed"):
            if isinstance(getattr(self, name), str):
                raise wrong(f"{name} of an adapter", getattr(self, name), "names, and not one")

    def calls(self, cfg: bool) -> tuple[tuple[str, ...], ...]:
        """The calls of the denoiser that make a step, each with the rows it is called on."""
        if not cfg:
            return ((COND,),)
        return (self.order,) if self.protocol == "stacked" else ((COND,), (UNCOND,))

    def steps_of_run(self, pipe: Any, call: CallArguments) -> int:
        """How many steps a call will make: those that it asks for, and those that its scheduler makes again."""
        steps = self.steps_asked(call)
        restarts = getattr(getattr(pipe, "scheduler", None), "restarts", None)
        return steps if restarts is None else steps + int(restarts(**self.schedule(pipe, call)))

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        """The blocks of each of a pipeline's denoisers, with what is known about them."""
        there = [name for name in self.denoisers if getattr(pipe, name, None) is not None]
        if not there:
            raise SettingsError(f"pipe.{self.denoisers[0]}: got None, expected the model whose steps are to be guided")
        return {name: self.layout(name, getattr(pipe, name)) for name in there}

    def caches(self, pipe: Any) -> dict[str, list[str]]:
        """The hooks of caches, by name, on each of a pipeline's denoisers that has any."""
        found = {name: caching_hooks(layout.denoiser) for name, layout in self.layouts(pipe).items()}
        return {name: hooks for name, hooks in found.items() if hooks}

    def layout(self, name: str, given: nn.Module) -> Layout:
        denoiser = unwrapped(given)
        if compiled_in_place(denoiser):
            raise SettingsError(
                f"pipe.{name} was compiled in place, as a whole, so its blocks cannot be reached; use "
                f"pipe.{name} = torch.compile(pipe.{name}), or compile its blocks one by one"
            )
        try:
            units = self._blocks(denoiser) if self.units is None else self.units(denoiser)
        except AttributeError as error:  # a wrapper such as DataParallel, or another model
            got, named = type(denoiser).__name__, ", ".join(self.blocks) or "the blocks"
            raise SettingsError(f"pipe.{name}: got {got}, expected a model with {named} ({error})") from error
        parameters = inspect.signature(type(denoiser).forward).parameters
        by_name = all(one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values())
        if by_name and self.sample not in parameters:
            raise wrong("sample of an adapter", self.sample, f"an argument of {type(denoiser).__name__}.forward")
        modules = [module for unit in units for _, module in unit.attentions]
        stock = all(processor_of(module) == self.processor for module in modules)
        attend = self.attend if stock and not any(compiled(unit.module) for unit in units) else None
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
            grid=self.grid,
            blur=blur,
        )

    def _blocks(self, denoiser: nn.Module) -> list[Unit]:
        blocks = [block for path in self.blocks for block in denoiser.get_submodule(path).children()]
        return [Unit(block, i, (("", block.get_submodule(self.attention)),)) for i, block in enumerate(blocks)]
