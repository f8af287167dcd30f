"""The main job end to end: clips with CFG alone, and the same clips guided by STG beside them, on the toy model."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stgfast import toy
from stgfast.explain import explain
from stgfast.install import accelerate
from stgfast.render.files import Form, Frames, pixels, write

NAMES = ("CFG", "CFG + STG")
LARGER = 4  # by how much clips are enlarged, and pictures half of that
SHOWN = 8  # frames of a clip in the picture
FPS = 8.0
ROUNDS = 3  # in which both sides take turns: the fastest is the one that other work on the machine disturbed least


@dataclass(frozen=True)
class Side:
    """All clips of one kind."""

    name: str
    clips: Sequence[Frames]
    block_rows: int
    seconds: float


@dataclass(frozen=True)
class Demo:
    plan: str
    sides: tuple[Side, ...]
    files: tuple[Path, ...]


def run(out: Path, prompts: Sequence[str] = toy.PROMPTS, seed: int = 0) -> Demo:
    out.mkdir(parents=True, exist_ok=True)
    plain, pipe = toy.pipeline(), accelerate(toy.pipeline(), toy.GUIDANCE)
    for each in (plain, pipe):
        render(each, "warm-up", prompts[:1], seed, num_inference_steps=1)
    rounds = [[render(*side, prompts, seed) for side in zip((plain, pipe), NAMES, strict=True)] for _ in range(ROUNDS)]
    stock, guided = (min(sides, key=lambda side: side.seconds) for sides in zip(*rounds, strict=True))
    files = []
    for number, (prompt, *pair) in enumerate(zip(prompts, stock.clips, guided.clips, strict=True), 1):
        both = np.concatenate([_enlarged(clip, LARGER) for clip in pair], axis=2)
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:42].strip("-")
        path = out / f"{number}-{words}.mp4"
        write(path, both, Form(fps=FPS), {"prompt": prompt, "seed": seed, "sides": list(NAMES)})
        files.append(path)
    picture = out / "demo.png"
    sheet(prompts, (stock, guided)).save(picture)
    return Demo(str(explain(pipe, **toy.CALL)), (stock, guided), (*files, picture))


def render(pipe: Any, name: str, prompts: Sequence[str], seed: int, **changes: Any) -> Side:
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    with counted(list(pipe.transformer.transformer_blocks)) as rows:
        start = time.perf_counter()
        clips = pipe(list(prompts), **{**toy.CALL, **changes}, generator=generators, output_type="np").frames
        seconds = time.perf_counter() - start
    return Side(name, [pixels(clip) for clip in clips], sum(rows), seconds)


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


def sheet(prompts: Sequence[str], sides: Sequence[Side]) -> Any:
    """One picture: under every prompt a line of frames from each side, from the first to the last."""
    from PIL import Image, ImageDraw

    small, margin, line = LARGER // 2, 8, 18
    lines = [[_strip(side.clips[number], small) for side in sides] for number in range(len(prompts))]
    height, width, _ = lines[0][0].shape
    label = 80
    block = line + len(sides) * (height + 2) + margin
    picture = Image.new("RGB", (label + width + margin, block * len(prompts) + margin), "white")
    draw = ImageDraw.Draw(picture)
    for number, prompt in enumerate(prompts):
        top = margin + number * block
        draw.text((margin, top), prompt, fill="black")
        for place, side in enumerate(sides):
            y = top + line + place * (height + 2)
            draw.text((margin, y + height // 2 - 6), side.name, fill="black")
            picture.paste(Image.fromarray(lines[number][place]), (label, y))
    return picture


def _strip(clip: Frames, times: int) -> Frames:
    """Frames from left to right."""
    chosen = clip[np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
    return np.concatenate(list(_enlarged(chosen, times)), axis=1)


def _enlarged(clip: Frames, times: int) -> Frames:
    return clip.repeat(times, axis=1).repeat(times, axis=2)
