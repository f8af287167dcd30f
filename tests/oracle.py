"""The plain method: every branch on its own, through every block, combined as the formula is written.

It shares no code with the package. It drives a stock pipeline: what the pipeline calls its denoiser with is recorded,
and what it hands its scheduler is replaced by guidance computed branch by branch from the recorded calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")


@dataclass
class Weak:
    """One perturbed branch, with a number for every step."""

    layers: Sequence[int]
    kind: str
    scales: Sequence[float]
    of: str = "cond"
    base: str = "cond"
    axis: str = ""
    sigma: float | None = None


@dataclass
class Plainly:
    """Guidance for the plain method. `cfg` is None without CFG; a function is asked with pipeline and denoiser.

    `formula(cond, uncond, weak predictions, step)` may take the place of the one that is written here.
    """

    weak: Sequence[Weak]
    cfg: Any
    rescale: Sequence[float]
    acts: Sequence[bool]
    formula: Callable[..., torch.Tensor] | None = None


@dataclass(frozen=True)
class Part:
    """What a model runs, one after the other: a block, its layer's number if it has one, its self-attentions."""

    module: Any
    layer: int | None
    attentions: dict[str, Any] = field(default_factory=dict)


def blocks_of(model: Any) -> list[torch.nn.Module]:
    return [block for name in STACKS for block in getattr(model, name, [])]


def parts_of(model: Any) -> list[Part]:
    """Of a model that is a list of blocks, or several."""
    blocks = enumerate(blocks_of(model))
    return [Part(block, i, {"": block.attn1 if hasattr(block, "attn1") else block.attn}) for i, block in blocks]


def lying(grid: tuple[int, int, int], after: int = 0) -> Callable[[int], tuple[int, tuple[int, int, int]]]:
    """However many tokens there are: so many others, then those of a video."""
    return lambda tokens: (after, grid)


def first(given: list[Any]) -> Any:
    return given[0]


def first_two(given: list[Any]) -> Any:
    return given[0], given[1]


@dataclass(frozen=True)
class Facts:
    """What the plain method has to know of a pipeline.

    stacked    the denoiser is called on `[uncond | cond]` at once; else on cond, then on uncond
    parts      what a model runs, in order
    unchanged  what a block returns that does nothing, of its positional arguments and those called `passed`
    half       only half of a prediction's channels is noise
    sent       what the pipeline hands its scheduler for a prediction
    oblong     further arguments of a call whose frames are no squares, where there can be one
    lies       in that call, by how many tokens queries are made of: which of them is the video's first, and its
               (frames, height, width)
    query      the part of a self-attention that makes the queries
    """

    stacked: bool
    parts: Callable[[Any], list[Part]] = parts_of
    unchanged: Callable[[list[Any]], Any] = first
    passed: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    sent: Callable[[Any, torch.Tensor], torch.Tensor] = lambda pipe, prediction: prediction
    half: bool = False
    denoisers: tuple[str, ...] = ("transformer",)
    oblong: Mapping[str, Any] = field(default_factory=dict)
    lies: Callable[[int], tuple[int, tuple[int, int, int]]] | None = None
    query: str = "to_q"


@contextmanager
def weakened(
    facts: Facts, model: Any, layers: Sequence[int], kind: str, axis: str = "", sigma: float | None = None
) -> Iterator[None]:
    """The model with some layers perturbed, for all rows."""
    with ExitStack() as stack:
        for part in facts.parts(model):
            if part.layer not in layers:
                continue
            attentions = [module for name, module in part.attentions.items() if axis in ("", name)]
            if kind == "attention":
                for attention in attentions:
                    stack.enter_context(mock.patch.object(attention, "forward", _identity(attention.forward)))
            elif kind == "blur":
                for name, attention in part.attentions.items():
                    if name != "temporal":
                        query = getattr(attention, facts.query)
                        stack.enter_context(mock.patch.object(query, "forward", _blurred(facts, query.forward, sigma)))
            elif attentions:
                stack.enter_context(mock.patch.object(part.module, "forward", _skipped(facts)))
        yield


def _skipped(facts: Facts) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return facts.unchanged([*args, *(kwargs[name] for name in facts.passed if name in kwargs)])

    return forward


def _identity(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Attention scores that pick every token itself, whatever else the module does."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", _value):
            return forward(*args, **kwargs)

    return attention


def _blurred(facts: Facts, forward: Callable[..., Any], sigma: float | None) -> Callable[..., Any]:
    """Queries with every frame blurred."""

    def queries(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs).clone()
        start, (frames, height, width) = facts.lies(made.shape[1])
        for number in range(frames):
            frame = slice(start + number * height * width, start + (number + 1) * height * width)
            made[:, frame] = blurred(made[:, frame].unflatten(1, (height, width)), sigma).flatten(1, 2)
        return made

    return queries


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """(rows, height, width, channels), by a Gaussian of three sigma to each side, where there are so many tokens."""
    if sigma == math.inf:
        return images.mean(dim=(1, 2), keepdim=True).expand_as(images)
    down, across = (min(math.ceil(6 * sigma) // 2, size // 2, size - 1) for size in images.shape[1:3])
    padded = F.pad(images.movedim(3, 1), (across, across, down, down), mode="reflect").movedim(1, 3)
    result, total = torch.zeros_like(images), 0.0
    for i in range(-down, down + 1):
        for j in range(-across, across + 1):
            weight = math.exp(-(i**2 + j**2) / (2 * sigma**2))
            rows, columns = slice(down + i, down + i + images.shape[1]), slice(across + j, across + j + images.shape[2])
            result, total = result + weight * padded[:, rows, columns], total + weight
    return result / total


def _value(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _kept(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A pipeline may change a dictionary for its next call."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}


def _noise(facts: Facts, prediction: torch.Tensor) -> torch.Tensor:
    return prediction.chunk(2, dim=1)[0] if facts.half else prediction


def rescale(cond: torch.Tensor, guided: torch.Tensor, phi: float) -> None:
    """In place."""
    for c, g in zip(cond, guided, strict=True) if phi else ():
        g.mul_(phi * c.std() / g.std() + 1 - phi)


@contextmanager
def plain_method(pipe: Any, plainly: Plainly, facts: Facts) -> Iterator[SimpleNamespace]:
    """Within the block, calls of this stock pipeline are guided the plain way."""
    scheduler = pipe.scheduler
    step = scheduler.step
    noise = functools.partial(_noise, facts)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    state = SimpleNamespace(step=0)
    there = [name for name in facts.denoisers if getattr(pipe, name, None) is not None]
    forwards = {name: getattr(pipe, name).forward for name in there}

    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, _kept(kwargs)))
            return forwards[name](*args, **kwargs)

        return functools.wraps(forwards[name])(record)

    def predict(source: str, weak: Weak | None = None) -> torch.Tensor:
        name, args, kwargs = calls[0]
        if plainly.cfg is not None and facts.stacked:
            rows = len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample")))
            half = slice(None, rows // 2) if source == "uncond" else slice(rows // 2, None)

            def mine(value: Any) -> Any:
                if isinstance(value, dict):
                    return {name: mine(part) for name, part in value.items()}
                return value[half] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value

            args, kwargs = tuple(map(mine, args)), {name: mine(value) for name, value in kwargs.items()}
        elif source == "uncond":
            name, args, kwargs = calls[1]
        with ExitStack() as stack:
            if weak is not None:
                model = getattr(pipe, name)
                stack.enter_context(weakened(facts, model, weak.layers, weak.kind, weak.axis, weak.sigma))
            return forwards[name](*args, **kwargs)[0].double()

    def guided() -> torch.Tensor:
        cond = predict("cond")
        if plainly.formula is not None:
            uncond = None if plainly.cfg is None else predict("uncond")
            weak = [noise(predict(weak.of, weak)) for weak in plainly.weak]
            result = plainly.formula(noise(cond), None if uncond is None else noise(uncond), weak, state.step)
            return torch.cat([result, cond[:, result.shape[1] :]], dim=1)  # whatever is no noise is cond's
        plain = {"cond": cond, "guided": cond}
        if plainly.cfg is not None:
            uncond = predict("uncond")
            scale = plainly.cfg(pipe, calls[0][0]) if callable(plainly.cfg) else plainly.cfg
            plain |= {"uncond": uncond, "guided": uncond + scale * (cond - uncond)}
        result = plain["guided"]
        for weak in plainly.weak:
            if weak.scales[state.step]:
                result = result + weak.scales[state.step] * (plain[weak.base] - predict(weak.of, weak))
        rescale(noise(cond), noise(result), plainly.rescale[state.step])
        return result

    @functools.wraps(step)  # pipelines look at its signature
    def guided_step(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if plainly.acts[state.step]:
            given, output = output, facts.sent(pipe, guided()).to(output.dtype)
            assert output.shape == given.shape
        calls.clear()
        state.step += 1
        return step(output, *args, **kwargs)

    with ExitStack() as stack:
        for name in there:
            stack.enter_context(mock.patch.object(getattr(pipe, name), "forward", recorder(name)))
        stack.enter_context(mock.patch.object(scheduler, "step", guided_step))
        yield state
