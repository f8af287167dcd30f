"""The ways to make one clip.

stock      the pipeline with CFG alone, or with its own guidance
paper      STG as in the authors' code: a stack of all branches, each row through each block; separate calls if the
           pipeline makes separate calls; its own passes if it asks for perturbed branches itself
passes     each branch in a pass of its own, combined by one formula
guiders    the modular pipeline under diffusers' `SkipLayerGuidance`, which also makes separate passes
reference  the authors' code (path to a checkout)
stgfast    `stgfast.accelerate`
split      the same, with no more rows in a block at once than in the pipeline's own call
auto       the same, with the fastest attention for each shape in all layers
compiled   the same, with the model's blocks compiled
graphs     the same, with the launches of a block recorded as a CUDA graph
fastest    the same, with the fastest of diffusers' attention backends, as measured
reuse      stgfast with the perturbed branch computed in each second step: another result
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from stgfast.batching.execution import AUTO
from stgfast.batching.plan import Plan
from stgfast.batching.room import ALL, Rows
from stgfast.bench.measure import Arithmetic, Stopwatch, arithmetic, by_module, in_turns, medians
from stgfast.bench.models import Clip, Model
from stgfast.bench.schemes import Schemes
from stgfast.errors import wrong
from stgfast.explain import explain
from stgfast.explained import Explanation
from stgfast.guidance import Guidance
from stgfast.install import accelerate, restore
from stgfast.integrations import ADAPTERS

VARIANTS = (
    *("stock", "paper", "passes", "guiders", "reference"),
    *("stgfast", "split", "auto", "compiled", "graphs", "fastest", "reuse"),
)
FEWEST = 2  # steps, of which the first is not timed
STACKED = ("stacked", "announced")  # protocols with cond and uncond in one call
OTHER_RESULT = ("stock", "reuse")
NATIVE = "native"  # diffusers' default attention backend
# Backends that download nothing. Trying them shows which are installed.
ATTENTION = {
    "cpu": (NATIVE, "_native_math"),
    "cuda": (NATIVE, "_native_cudnn", "_native_flash", "flash", "_flash_3", "xformers"),
}
SAME_ATTENTION = 5e-2  # relatively, of results in bfloat16
OFF = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}


class Seconds(NamedTuple):
    """The seconds of a clip, and of one of its steps."""

    clip: float
    step: float


class Bench:
    """One model, and the ways to make its clip."""

    def __init__(
        self,
        model: Model,
        size: str,
        device: str = "cpu",
        steps: int | None = 3,
        *,
        prompts: int = 1,
        clip: Clip | None = None,
        guidance: Guidance | None = None,
        backend: str = "inductor",
        reference: Path | None = None,
    ):
        if steps is not None and steps < FEWEST:
            raise wrong("steps", steps, f"{FEWEST} or more, of which the first is not timed")
        self.model, self.size, self.device, self.steps = model, size, device, steps
        self.prompts, self.frames, self.backend = prompts, clip or model.clip(size), backend
        self.checkout = reference
        self.branches: Any = None  # the group over which branches are divided
        self.pipe = model.build(size, device)
        self.denoiser: Any = getattr(self.pipe, model.part)
        self.adapter = ADAPTERS[model.pipeline]
        self.layout = self.adapter.layouts(self.pipe)[model.part]
        self.guidance = guidance or model.guidance(model.layer(size))
        self.drawn: dict[Any, dict[str, Any]] = {}  # inputs of the pipeline, by measured point

    def variants(self) -> tuple[str, ...]:
        """The variants of this model."""
        there = {"guiders": bool(self.model.modular), "graphs": self.device == "cuda"}
        there["reference"] = bool(self.checkout and any(self.model.reference))
        if self.adapter.protocol == "announced":
            there |= dict.fromkeys(("passes", "reuse"), False)
        return tuple(name for name in VARIANTS if there.get(name, True))

    def make(self, variant: str) -> Tensor:
        made: Tensor = getattr(self, variant)()
        return made

    def timed(self, variant: str) -> Seconds:
        """Time a clip. What is done only once happens in the first step, which is not timed."""
        moments, ends = self._watched(variant)
        return Seconds(moments[-1], (moments[ends[-1]] - moments[ends[0]]) / (len(ends) - 1))

    def parts(self, variant: str) -> list[list[float]]:
        """The seconds of each part of each step but the first: modules without parts, and what is between them."""
        moments, ends = self._watched(variant, parts=True)
        taken = [after - before for before, after in pairwise(moments)]
        return [taken[first:last] for first, last in pairwise(ends)]

    def _watched(self, variant: str, parts: bool = False) -> tuple[list[float], list[int]]:
        """The times within a clip, and which of them end a step, from the scheduler."""
        scheduler, watch, ends = self.pipe.scheduler, Stopwatch(self.device), list[int]()
        step = type(scheduler).step

        @functools.wraps(step)
        def marked(which: Any, *args: Any, **kwargs: Any) -> Any:
            made = step(which, *args, **kwargs)
            if which is scheduler:  # not a copy, which denoises something beside the video
                ends.append(len(watch.moments))
                watch.mark()
            return made

        with ExitStack() as stack:
            for module in self.denoiser.modules() if parts else ():
                if not list(module.children()):
                    stack.enter_context(module.register_forward_pre_hook(lambda *_: watch.mark()))
                    stack.enter_context(module.register_forward_hook(lambda *_: watch.mark()))
            stack.enter_context(mock.patch.object(type(scheduler), "step", marked))
            watch.mark()
            self.make(variant)
            watch.mark()
        return watch.seconds(), ends

    def stock(self) -> Tensor:
        return self._clip(**(OFF if self.adapter.protocol == "announced" else {}))

    def paper(self) -> Tensor:
        if self.adapter.protocol == "announced":
            return self._clip()
        if self.adapter.protocol != "stacked":
            return self.passes()
        return self._by(self._schemes.stacked)

    def passes(self) -> Tensor:
        how = {
            "stacked": self._schemes.apart,
            "sequential": self._schemes.after_both,
            "embedded": self._schemes.after_one,
        }
        return self._by(how[self.adapter.protocol])

    def stgfast(
        self, compile: Mapping[str, Any] | bool = False, max_rows: Rows = ALL, attention: str | None = None
    ) -> Tensor:
        return self._accelerated(self.guidance, compile, max_rows, attention)

    def split(self) -> Tensor:
        return self._accelerated(self.guidance, max_rows=2 if self.adapter.protocol in STACKED else 1)

    def reference(self) -> Tensor:
        (part,), (path,) = self._guidance.perturbations, self.adapter.blocks.lists
        blocks = [self.denoiser.get_submodule(f"{path}.{layer}") for layer in part.layers]
        settings = {"stg_applied_layers_idx": list(part.layers), "stg_scale": part.scale, "do_rescaling": False}
        with ExitStack() as stack:
            for block in blocks:  # it leaves its own forward there
                stack.enter_context(mock.patch.object(block, "forward", block.forward))
            return self._clip(self._papers, **settings)

    @functools.cached_property
    def _papers(self) -> Any:
        assert self.checkout is not None
        file, name = self.model.reference
        path = self.checkout / file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise wrong("--reference", str(self.checkout), f"a checkout of the paper's repository, which has {file}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kind = getattr(module, name)
        takes = inspect.signature(kind.__init__).parameters
        pipe = kind(**{part: value for part, value in self.pipe.components.items() if part in takes})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reuse(self) -> Tensor:
        return self._accelerated(self._reusing())

    def auto(self) -> Tensor:
        """Each layer uses the fastest attention for its shape."""
        return self.stgfast(attention=AUTO)

    def compiled(self) -> Tensor:
        """Compiled blocks; the first call compiles, as warm-up."""
        return self.stgfast(compile={"backend": self.backend})

    def graphs(self) -> Tensor:
        return self.stgfast(compile={"mode": "reduce-overhead"})

    def fastest(self) -> Tensor:
        from diffusers import attention_backend

        with attention_backend(self.attention):
            return self.compiled()

    @functools.cached_property
    def attention(self) -> str:
        """The fastest attention that runs here and gives the same result, in the first block of the stock pipeline."""
        from diffusers import attention_backend

        with self._first_block() as given:
            self.at(steps=FEWEST).stock()
        block = given[0]

        def attended(name: str) -> Tensor:
            with attention_backend(name), torch.no_grad():
                made = self.layout.units[0].module(*block.args, **block.kwargs)
            return made if isinstance(made, Tensor) else made[0]

        right, calls = attended(NATIVE).double(), dict[str, Callable[[], Any]]()
        for name in ATTENTION[self.device]:
            try:
                made = attended(name).double()
            except Exception:  # a missing backend may raise anything
                continue
            if float((made - right).norm() / right.norm()) <= SAME_ATTENTION:
                calls[name] = functools.partial(attended, name)
        times = medians(in_turns(calls, 5, self.device))
        return min(times, key=lambda name: times[name])

    def guiders(self) -> Tensor:
        """The modular pipeline, with the blocks that make latents from embeddings. Its guider also skips in the
        first step.
        """
        import diffusers
        from diffusers.hooks import LayerSkipConfig

        module, _, name = self.model.modular.rpartition(".")
        blocks = getattr(importlib.import_module(module), name)()
        for each in ("text_encoder", "decode"):
            blocks.sub_blocks.pop(each)
        _without_progress(blocks)
        pipe = blocks.init_pipeline()
        (path,), (part,) = self.adapter.blocks.lists, self._guidance.perturbations
        guider = diffusers.SkipLayerGuidance(
            guidance_scale=self.model.cfg,
            skip_layer_guidance_scale=part.scale,
            skip_layer_config=LayerSkipConfig(list(part.layers), fqn=path),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )
        vars(guider)["_is_slg_enabled"] = lambda: True
        pipe.update_components(transformer=self.denoiser, scheduler=self.pipe.scheduler, guider=guider)
        given = self.arguments()
        for of_pipeline in ("guidance_scale", "output_type"):
            given.pop(of_pipeline)
        with torch.no_grad():
            made: Tensor = pipe(**given, output="latents")
        packed: Tensor = self.pipe._pack_latents(made) if hasattr(self.pipe, "_pack_latents") else made
        return packed.flatten()

    def arguments(self) -> dict[str, Any]:
        point = (self.steps, self.prompts, self.frames)
        if point not in self.drawn:
            self.drawn[point] = self.model.arguments(
                self.pipe, self.size, self.steps, prompts=self.prompts, clip=self.frames
            )
        generators = [torch.Generator().manual_seed(1 + number) for number in range(self.prompts)]
        made: dict[str, Any] = {**self.drawn[point], "generator": generators}
        if self.adapter.protocol == "embedded":  # the scale is an input; there is no other row
            made = {name: value for name, value in made.items() if not name.startswith("negative_")}
        return made

    def explained(self, variant: str = "stgfast") -> Explanation:
        accelerate(self.pipe, self._reusing() if variant == "reuse" else self.guidance)
        try:
            return explain(self.pipe, **self.arguments())
        finally:
            restore(self.pipe)

    def block_rows(self, variant: str) -> list[float]:
        """The rows that a variant computes in each block of a timed step, from the planner or from its own scheme."""
        explained = self.explained(variant)
        depth = explained.depth
        if variant == "stock":
            return [1 if self.adapter.protocol == "embedded" else 2] * depth
        if variant in ("paper", "passes", "guiders", "reference"):
            return [explained.unshared / depth / sum(phase.steps for phase in explained.phases)] * depth
        _, *steps = _plans(explained)
        return [sum(plan.computed[block] for plans in steps for plan in plans) / len(steps) for block in range(depth)]

    def passes_of_a_step(self) -> int:
        """How often a step reads the weights."""
        return len(_plans(self.explained())[-1])

    def costs(self) -> tuple[list[int], int]:
        """The arithmetic of each block on the same rows, and the number of tokens of a sample in the first one."""
        names = {module: name for name, module in self.denoiser.named_modules()}
        with self._first_block() as given:
            counts = by_module(self.at(steps=FEWEST).stock)
        state = given[0].arguments[self.layout.blocks.state[0]]
        # Channels are dimension 1 of images, and the last one of tokens.
        channels = state.shape[1] if state.ndim == 4 else state.shape[-1]
        rows = self.prompts * (2 if self.adapter.protocol in STACKED else 1)
        costs = [counts[f"{type(self.denoiser).__name__}.{names[unit.module]}"] for unit in self.layout.units]
        return costs, state.numel() // (channels * rows)

    def arithmetic(self, variant: str) -> Arithmetic:
        """The arithmetic of one step."""
        counted = arithmetic(functools.partial(self.at(steps=FEWEST).make, variant))
        return Arithmetic(*(count // FEWEST for count in counted))

    def at(
        self,
        *,
        prompts: int | None = None,
        clip: Clip | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
    ) -> Bench:
        """The same model with other sizes or settings."""
        other = copy.copy(self)
        other.prompts, other.frames = prompts or self.prompts, clip or self.frames
        other.guidance, other.steps = guidance or self.guidance, steps or self.steps
        return other

    @contextmanager
    def _first_block(self) -> Iterator[list[inspect.BoundArguments]]:
        """Record the arguments of the first block within the block, call by call."""
        first, given = self.layout.units[0].module, list[inspect.BoundArguments]()
        signature = inspect.signature(first.forward)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(signature.bind(*args, **kwargs))

        with first.register_forward_pre_hook(see, with_kwargs=True):
            yield given

    @property
    def _guidance(self) -> Guidance:
        assert self.guidance is not None
        return self.guidance

    @property
    def _schemes(self) -> Schemes:
        return Schemes(self.pipe, self.adapter, self.layout, self._guidance, self.prompts)

    def _reusing(self) -> Guidance:
        return Guidance(self._guidance.perturbations, reuse=2, reuse_order=0)

    def _accelerated(
        self,
        guidance: Guidance | None,
        compile: Mapping[str, Any] | bool = False,
        max_rows: Rows = ALL,
        attention: str | None = None,
    ) -> Tensor:
        accelerate(self.pipe, guidance, compile=compile, max_rows=max_rows, attention=attention, branches=self.branches)
        try:
            return self._clip()
        finally:
            restore(self.pipe)

    def _clip(self, pipe: Any = None, **changes: Any) -> Tensor:
        """Everything that the pipeline returns, as one tensor."""
        torch.manual_seed(0)  # some schedulers draw noise without a generator
        with torch.no_grad():
            output = (pipe or self.pipe)(**{**self.arguments(), **changes})
        return torch.cat([part.flatten() for part in output.values()])

    def _by(self, scheme: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Tensor:
        """The clip, with another way to call the denoiser."""
        forward = self.denoiser.forward
        with mock.patch.object(self.denoiser, "forward", functools.wraps(forward)(scheme(forward))):
            return self._clip()


def _plans(explained: Explanation) -> list[tuple[Plan, ...]]:
    """The plans of each step, if all phases are equal."""
    return [plans for phase in explained.phases for count, plans in phase.kinds for _ in range(count)]


def _without_progress(blocks: Any) -> None:
    """Switch off progress bars: a modular pipeline only passes this on to its own blocks, not to theirs."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        if hasattr(block, "progress_bar"):
            block.set_progress_bar_config(disable=True)
        _without_progress(block)
