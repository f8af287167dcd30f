"""What does guidance cost? A few denoising steps of every model, beside what a user would otherwise run.

    stock      the pipeline with CFG alone
    paper      STG as the paper's code does it: a stack of three, every row through every block; one call after another
               where the pipeline itself does so
    passes     as guiders do it: every branch by itself, one after another
    stgfast    `stgfast.accelerate`
    compiled   the same, with the model's blocks compiled
    reuse      the same as stgfast, with the weak branch computed in every second step: another result, so its distance
               from the others' stands beside its time

All of them denoise the same clip in one process, in turns, after their results were found to agree: where they do not,
nothing is timed. On a CPU, seconds are those of the processor, so that what else runs on it hardly counts. Models have
random weights: narrow ones in their real depth, or (`--size full`, for a GPU) as they were released.

    python bench/steps.py                                     every model, narrow, on this machine's CPU
    python bench/steps.py --device cuda --size full --models mochi wan-14b
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

import stgfast
from stgfast.integrations import ADAPTERS

SCALE = 1.0
BACKEND = "inductor"
DTYPES = {"small": torch.float32, "full": torch.bfloat16}
ALLOWED = {"small": 1e-5, "full": 5e-2}  # by how much variants may differ; those of bfloat16 are told apart by rounding
VARIANTS = ("stock", "paper", "passes", "stgfast", "compiled", "reuse")
APPROXIMATE = ("reuse",)


@dataclass(frozen=True)
class Model:
    """A released model, and the same narrow.

    layer   which the weak branch skips: about 70% of the way through, as with Mochi's published setting
    config  of the released model, where that is not the class's own
    narrow  what is less in the narrow one; it is as deep
    text    of a prompt, by the model's configuration: shapes by name
    sizes   (height, width, frames) of the clip, narrow and as released
    """

    pipeline: str
    transformer: str
    layer: int
    narrow: Mapping[str, Any]
    text: Callable[[Any], Mapping[str, Sequence[int]]]
    sizes: Mapping[str, tuple[int, int, int]]
    config: Mapping[str, Any] = field(default_factory=dict)
    cfg: float = 4.5
    scheduler: str = "FlowMatchEulerDiscreteScheduler"


def usual_text(config: Any, width: str, tokens: int) -> Mapping[str, Sequence[int]]:
    return {"prompt_embeds": (1, tokens, config[width])}


def hunyuan_text(config: Any) -> Mapping[str, Sequence[int]]:
    return {
        "prompt_embeds": (1, 64, config["text_embed_dim"]),
        "pooled_prompt_embeds": (1, config["pooled_projection_dim"]),
    }


HEADS = {"num_attention_heads": 4, "attention_head_dim": 64}
LTX = {
    "pipeline": "LTXPipeline",
    "transformer": "LTXVideoTransformer3DModel",
    "text": functools.partial(usual_text, width="caption_channels", tokens=128),
    "sizes": {"small": (256, 256, 25), "full": (512, 704, 161)},
    "narrow": {**HEADS, "cross_attention_dim": 256, "caption_channels": 256},
    "cfg": 3.0,
}
COGVIDEOX = {
    "pipeline": "CogVideoXPipeline",
    "transformer": "CogVideoXTransformer3DModel",
    "text": functools.partial(usual_text, width="text_embed_dim", tokens=226),
    "sizes": {"small": (128, 128, 9), "full": (480, 720, 49)},
    "narrow": {**HEADS, "text_embed_dim": 256, "time_embed_dim": 128},
    "scheduler": "CogVideoXDDIMScheduler",
    "cfg": 6.0,
}
WAN = {
    "pipeline": "WanPipeline",
    "transformer": "WanTransformer3DModel",
    "text": functools.partial(usual_text, width="text_dim", tokens=128),
    "sizes": {"small": (128, 128, 9), "full": (480, 832, 81)},
    "cfg": 5.0,
}
MODELS = {
    "mochi": Model(
        pipeline="MochiPipeline",
        transformer="MochiTransformer3DModel",
        layer=34,
        narrow={**HEADS, "pooled_projection_dim": 128, "text_embed_dim": 344},
        text=functools.partial(usual_text, width="text_embed_dim", tokens=256),
        sizes={"small": (192, 192, 13), "full": (480, 848, 31)},
    ),
    "ltx-2b": Model(layer=19, **LTX),
    "ltx-13b": Model(
        layer=34, config={"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}, **LTX
    ),
    "cogvideox-2b": Model(layer=21, **COGVIDEOX),
    "cogvideox-5b": Model(
        layer=30,
        config={"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        **COGVIDEOX,
    ),
    "hunyuan-video": Model(
        pipeline="HunyuanVideoPipeline",
        transformer="HunyuanVideoTransformer3DModel",
        layer=42,
        narrow={**HEADS, "rope_axes_dim": (16, 24, 24), "text_embed_dim": 256, "pooled_projection_dim": 64},
        text=hunyuan_text,
        sizes={"small": (128, 128, 9), "full": (720, 1280, 61)},
        config={"guidance_embeds": True},
    ),
    "wan-1.3b": Model(
        layer=21,
        config={"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        narrow={**HEADS, "num_layers": 30, "text_dim": 256, "ffn_dim": 1024},
        **WAN,
    ),
    "wan-14b": Model(layer=28, narrow={**HEADS, "text_dim": 256, "ffn_dim": 1024}, **WAN),
}


class Bench:
    """One model, and the ways in which its clip can be made."""

    def __init__(self, name: str, size: str, device: str, steps: int):
        self.model, self.size, self.device, self.steps = MODELS[name], size, device, steps
        config = {**self.model.config, **(self.model.narrow if size == "small" else {})}
        self.pipe = self._pipeline(config)
        self.adapter = ADAPTERS[self.model.pipeline]
        self.guidance = stgfast.Guidance(stgfast.Perturbation([self.model.layer], scale=SCALE))
        self.transformer: nn.Module = self.pipe.transformer
        blocks = [block for path in self.adapter.blocks for block in self.transformer.get_submodule(path)]
        self.skipped = blocks[self.model.layer]

    def _pipeline(self, config: Mapping[str, Any]) -> Any:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.size])
        try:
            with torch.device(self.device):
                transformer = getattr(diffusers, self.model.transformer)(**config).eval()
        finally:
            torch.set_default_dtype(before)
        cls = getattr(diffusers, self.model.pipeline)
        scheduler = getattr(diffusers, self.model.scheduler)()
        parameters = inspect.signature(cls.__init__).parameters.values()
        nothing = {each.name: None for each in parameters if each.default is each.empty and each.name != "self"}
        pipe = cls(**{**nothing, "transformer": transformer, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        height, width, frames = self.model.sizes[self.size]
        made: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "output_type": "latent"}
        takes = inspect.signature(type(self.pipe).__call__).parameters
        for name, shape in self.model.text(self.transformer.config).items():
            for side in ("", "negative_"):
                made[side + name] = torch.randn(*shape, generator=generator).to(self.device, DTYPES[self.size])
        tokens = made["prompt_embeds"].shape[1]
        mask = (torch.arange(tokens)[None] < tokens // 4).to(self.device)
        for side in ("", "negative_"):
            if f"{side}prompt_attention_mask" in takes:
                made[f"{side}prompt_attention_mask"] = mask
        if self.adapter.protocol == "embedded":  # the scale is an input; there is no other row
            made = {name: value for name, value in made.items() if not name.startswith("negative_")}
        made |= {"num_inference_steps": self.steps, "guidance_scale": self.model.cfg}
        return {**made, "generator": generator.manual_seed(1)}

    def clip(self) -> Tensor:
        with torch.no_grad():
            latents: Tensor = self.pipe(**self.arguments()).frames
        return latents

    def stock(self) -> Tensor:
        return self.clip()

    def paper(self) -> Tensor:
        if self.adapter.protocol != "stacked":
            return self.passes()
        three = self._stack_of_three(self.transformer.forward)
        with mock.patch.object(self.transformer, "forward", three), self._skipping(slice(2, None)):
            return self.clip()

    def passes(self) -> Tensor:
        how = {"stacked": self._apart, "sequential": self._after_both, "embedded": self._after_one}
        with mock.patch.object(self.transformer, "forward", how[self.adapter.protocol](self.transformer.forward)):
            return self.clip()

    def stgfast(self, compile: Mapping[str, Any] | bool = False, **settings: Any) -> Tensor:
        stgfast.accelerate(self.pipe, stgfast.Guidance(self.guidance.perturbations, **settings), compile=compile)
        try:
            return self.clip()
        finally:
            stgfast.restore(self.pipe)

    def reuse(self) -> Tensor:
        return self.stgfast(reuse=2)

    def compiled(self) -> Tensor:
        """Of which the first call compiles: it is the warm-up."""
        return self.stgfast(compile={"backend": BACKEND})

    @contextmanager
    def _skipping(self, rows: slice) -> Iterator[None]:
        """Within the block, one layer returns these rows as it got them, after computing all of them."""
        forward = self.skipped.forward
        signature = inspect.signature(forward)

        def skipping(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            outputs = forward(*args, **kwargs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            made = tuple(
                torch.cat([new[: rows.start], given[name][rows]])
                for name, new in zip(self.adapter.state, outputs, strict=True)
            )
            return made if len(made) > 1 else made[0]

        with mock.patch.object(self.skipped, "forward", skipping):
            yield

    def _stack_of_three(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stacked(**kwargs: Any) -> Any:
            three = {name: self._rows(name, value, [0, 1, 1]) for name, value in kwargs.items()}
            uncond, cond, weak = forward(**three)[0].float().chunk(3)
            guided = self._guided(uncond, cond, weak)
            return (torch.cat([guided, guided]),)

        return functools.wraps(forward)(stacked)

    def _apart(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def apart(**kwargs: Any) -> Any:
            uncond, cond = ({name: self._rows(name, value, [row]) for name, value in kwargs.items()} for row in (0, 1))
            guided = self._guided(forward(**uncond)[0], forward(**cond)[0], self._weak(forward, cond))
            return (torch.cat([guided, guided]),)

        return functools.wraps(forward)(apart)

    def _after_both(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        held: list[Any] = []

        def after_both(**kwargs: Any) -> Any:
            made = forward(**kwargs)[0]
            if not held:
                held.extend([kwargs, made])
                return (made,)
            cond, first = held
            held.clear()
            guided = self._guided(made, first.clone(), self._weak(forward, cond)).to(made.dtype)
            first.copy_(guided)
            return (guided,)

        return functools.wraps(forward)(after_both)

    def _after_one(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def after_one(**kwargs: Any) -> Any:
            cond, weak = forward(**kwargs)[0], self._weak(forward, kwargs)
            return (cond + SCALE * (cond - weak),)

        return functools.wraps(forward)(after_one)

    def _weak(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Tensor:
        with self._skipping(slice(0, None)):
            made: Tensor = forward(**kwargs)[0]
        return made

    def _rows(self, name: str, value: Any, rows: Sequence[int]) -> Any:
        """Of a stack of two."""
        per_row = name in self.adapter.rows and isinstance(value, Tensor) and value.ndim
        return torch.cat([value[row : row + 1] for row in rows]) if per_row else value

    def _guided(self, uncond: Tensor, cond: Tensor, weak: Tensor) -> Tensor:
        uncond, cond, weak = uncond.float(), cond.float(), weak.float()
        return uncond + self.model.cfg * (cond - uncond) + SCALE * (cond - weak)

    def block_rows(self, variant: str) -> int:
        """What a variant computes, by the planner, or by its own scheme."""
        settings = {"reuse": 2} if variant == "reuse" else {}
        stgfast.accelerate(self.pipe, stgfast.Guidance(self.guidance.perturbations, **settings))
        try:
            explained = stgfast.explain(self.pipe, **self.arguments())
        finally:
            stgfast.restore(self.pipe)
        counts = {"stock": explained.cfg_alone, "paper": explained.unshared, "passes": explained.unshared}
        return counts.get(variant, explained.block_rows)

    def seconds(self, variant: str) -> float:
        if self.device == "cpu":
            start = time.process_time()
            getattr(self, variant)()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        getattr(self, variant)()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def measured(name: str, size: str, device: str, steps: int, rounds: int, variants: Sequence[str]) -> dict[str, Any]:
    """One row of results; raises where variants disagree."""
    bench = Bench(name, size, device, steps)
    clips = {variant: getattr(bench, variant)().double() for variant in variants}  # and the warm-up
    exact = clips["stgfast"]
    far = {variant: float((clip - exact).norm() / exact.norm()) for variant, clip in clips.items()}
    wrong = {
        each: far[each] for each in variants if each not in (*APPROXIMATE, "stock") and not far[each] <= ALLOWED[size]
    }
    if wrong:
        raise Disagreement(f"{name}: relative distances {wrong}, allowed {ALLOWED[size]:g}; nothing was timed")
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            seconds[variant].append(bench.seconds(variant))
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    rows = {variant: bench.block_rows(variant) for variant in variants}
    return {
        "bench": "steps",
        "model": name,
        "size": size,
        "clip": MODELS[name].sizes[size],
        "steps": steps,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}, processor time",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "stgfast": stgfast.__version__,
        "distance": far,
        "seconds": {variant: round(value, 4) for variant, value in medians.items()},
        "spread": {variant: [round(min(values), 4), round(max(values), 4)] for variant, values in seconds.items()},
        "over stgfast": {variant: round(medians[variant] / medians["stgfast"], 3) for variant in variants},
        "block-rows over stgfast": {variant: round(rows[variant] / rows["stgfast"], 3) for variant in variants},
        **({"peak memory": torch.cuda.max_memory_allocated()} if device == "cuda" else {}),
    }


class Disagreement(RuntimeError):
    """Two ways of computing the same clip gave different ones."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=["stock", "paper", "stgfast", "reuse"], choices=VARIANTS)
    parser.add_argument("--size", default="small", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="a file to add the results to, as lines of JSON")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    variants = [variant for variant in VARIANTS if variant in {*options.variants, "stgfast"}]
    for name in options.models:
        try:
            row = measured(name, options.size, options.device, options.steps, options.rounds, variants)
        except Disagreement as error:
            print(error)
            return 1
        print(json.dumps(row))
        if options.save:
            options.save.parent.mkdir(parents=True, exist_ok=True)
            with options.save.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
