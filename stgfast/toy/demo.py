"""The main job end to end on the toy pipeline: a clip with CFG alone, and the same clip guided by STG beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stgfast import toy
from stgfast.explain import explain
from stgfast.install import accelerate


@dataclass(frozen=True)
class Clip:
    name: str
    shape: tuple[int, ...]
    block_rows: int
    seconds: float


@dataclass(frozen=True)
class Demo:
    clips: tuple[Clip, ...]
    plan: str
    change: float  # how far apart the two clips are: root mean square over pixels from 0 to 1


def run(seed: int = 0) -> Demo:
    pipe = toy.pipeline(seed)
    render(pipe, "warm-up", seed, num_inference_steps=2)
    stock, frames = render(pipe, "CFG", seed)
    accelerate(pipe)
    guided, others = render(pipe, "CFG + STG", seed)
    change = float((frames - others).square().mean().sqrt())
    return Demo((stock, guided), str(explain(pipe, **toy.CALL)), change)


def render(pipe: Any, name: str, seed: int, **changes: Any) -> tuple[Clip, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with counted(list(pipe.transformer.transformer_blocks)) as rows:
        start = time.perf_counter()
        frames = pipe(**toy.prompt(seed), **{**toy.CALL, **changes}, generator=generator, output_type="pt").frames
        seconds = time.perf_counter() - start
    return Clip(name, tuple(frames.shape), sum(rows), seconds), frames


@contextmanager
def counted(blocks: list[torch.nn.Module]) -> Iterator[list[int]]:
    """The rows that blocks were run on within the block, call by call, seen from inside of the blocks."""
    rows: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(kwargs["hidden_states"].shape[0])

    hooks = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
