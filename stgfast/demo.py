"""The demo: the same clips of the toy model by CFG, by exact guidance and by a recipe, timed and judged."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stgfast import toy
from stgfast.evaluate.judged import measure
from stgfast.evaluate.study import EARLY
from stgfast.explain import explain
from stgfast.guidance import Guidance
from stgfast.install import accelerate
from stgfast.integrations import adapter_for
from stgfast.recipes import Recipe, model_of
from stgfast.render.files import Form, Frames, pixels, write
from stgfast.spacing import spaced
from stgfast.toy import videos

EXACT, RECIPE = "CFG + STG", "recipe"
STEPS = 48  # of a clip without a recipe
CALL = {name: value for name, value in toy.CALL.items() if name != "num_inference_steps"}
BATCH = 4  # clips that one call makes
LARGER = 4  # factor by which clips are enlarged; in the picture half of it
SHOWN = 8  # frames of a clip in the picture
IN_PICTURE = 4  # prompts in the picture
FPS = 8.0


@dataclass
class Side:
    """All clips that are made in one way."""

    name: str
    clips: list[Frames] = field(default_factory=list)
    block_rows: int = 0
    seconds: float = 0.0
    right: int = 0  # clips that show what their prompt says, by the judge


@dataclass(frozen=True)
class Demo:
    plan: str
    recipe: str
    sides: tuple[Side, ...]
    files: tuple[Path, ...]


def prompts_of(seed: int, count: int) -> list[str]:
    """Prompts drawn at random, as those of the model's training were."""
    return [str(videos.plan(seed, number).scene) for number in range(count)]


def pipelines() -> dict[str, Any]:
    """One pipeline for each way."""
    plain = toy.pipeline()
    model = model_of(plain, adapter_for(plain, type(plain)))
    blocks = spaced(30, 5, 3)  # the steps in which blocks run: all at first, then every third
    recipe = Recipe(model=model, steps=30, solver="unipc", reuse_blocks=blocks, reuse_order=1)
    return {
        "CFG": accelerate(plain, Guidance()),
        EXACT: accelerate(toy.pipeline(), EARLY),
        RECIPE: accelerate(toy.pipeline(), EARLY, recipe=recipe),
    }


def run(out: Path, prompts: Sequence[str], seed: int = 0, *, steps: int = STEPS) -> Demo:
    """Make the clips, and put videos and a picture into a folder.

    All ways make one batch after another in turns, so that other work on the machine disturbs them alike.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipes = pipelines()
    made = tuple(Side(name) for name in pipes)
    for name, pipe in pipes.items():
        make(Side("warm-up"), pipe, prompts[:1], seed, call_of(name, 1))
    for first in range(0, len(prompts), BATCH):
        for side in made:
            make(side, pipes[side.name], prompts[first : first + BATCH], seed + first, call_of(side.name, steps))
    judge = measure()
    for side in made:
        each = [judge.of(clip, prompt).values for clip, prompt in zip(side.clips, prompts, strict=True)]
        side.right = sum(values["right"] == 1 for values in each)
    files = []
    for number, prompt in enumerate(prompts):
        together = np.concatenate([_enlarged(side.clips[number], LARGER) for side in made], axis=2)
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:42].strip("-")
        path = out / f"{number + 1}-{words}.mp4"
        write(
            path,
            together,
            Form(fps=FPS),
            {"prompt": prompt, "seed": seed + number, "sides": [side.name for side in made]},
        )
        files.append(path)
    picture = out / "demo.png"
    sheet(prompts, made).save(picture)
    exact, recipe = (str(explain(pipes[name], **call_of(name, steps))) for name in (EXACT, RECIPE))
    return Demo(exact, recipe, made, (*files, picture))


def call_of(name: str, steps: int) -> dict[str, Any]:
    """The arguments of a call. A recipe has its own number of steps."""
    return CALL if name == RECIPE else {**CALL, "num_inference_steps": steps}


def make(side: Side, pipe: Any, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> None:
    """Make one batch, and add it to its side."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    with counted(list(pipe.transformer.transformer_blocks)) as rows:
        start = time.perf_counter()
        clips = pipe(list(prompts), **call, generator=generators, output_type="np").frames
        side.seconds += time.perf_counter() - start
    side.block_rows += sum(rows)
    side.clips += [pixels(clip) for clip in clips]


@contextmanager
def counted(blocks: list[torch.nn.Module]) -> Iterator[list[int]]:
    """Count the rows that blocks run on, by hooks inside the blocks."""
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
    """One picture: a bar of seconds for each side, and below each prompt a line of frames from each side."""
    from PIL import Image, ImageDraw

    small, margin, line, label = LARGER // 2, 8, 18, 80
    shown = prompts[:IN_PICTURE]
    lines = [[_strip(side.clips[number], small) for side in sides] for number in range(len(shown))]
    height, width, _ = lines[0][0].shape
    top, block = margin + len(sides) * line + margin, line + len(sides) * (height + 2) + margin
    picture = Image.new("RGB", (label + width + margin, top + block * len(shown) + margin), "white")
    draw = ImageDraw.Draw(picture)
    longest = max(side.seconds for side in sides)
    for place, side in enumerate(sides):
        y = margin + place * line
        draw.text((margin, y), side.name, fill="black")
        end = label + width * 0.7 * side.seconds / longest
        draw.rectangle((label, y, end, y + line - 6), fill="#2456c9" if side.name == RECIPE else "#8a897f")
        draw.text((end + margin, y), f"{side.seconds:.1f} s, right: {side.right} of {len(prompts)}", fill="black")
    for number, prompt in enumerate(shown):
        draw.text((margin, top + number * block), prompt, fill="black")
        for place, side in enumerate(sides):
            y = top + number * block + line + place * (height + 2)
            draw.text((margin, y + height // 2 - 6), side.name, fill="black")
            picture.paste(Image.fromarray(lines[number][place]), (label, y))
    return picture


def _strip(clip: Frames, times: int) -> Frames:
    """Frames from left to right."""
    chosen = clip[np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
    return np.concatenate(list(_enlarged(chosen, times)), axis=1)


def _enlarged(clip: Frames, times: int) -> Frames:
    return clip.repeat(times, axis=1).repeat(times, axis=2)
