"""The plain method: every branch on its own, through every block, combined as the formula is written.

It shares no code with the package. It drives a stock pipeline: what the pipeline calls its denoiser with is recorded,
and what it hands its scheduler is replaced by guidance computed branch by branch from the recorded calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")


@dataclass
class Weak:
    """One perturbed branch, with a number for every step."""

    layers: Sequence[int]
    kind: str
    scales: Sequence[float]
    of: str = "cond"
    base: str = "cond"


@dataclass
class Plainly:
    """Guidance for the plain method; `cfg` is None without CFG."""

    weak: Sequence[Weak]
    cfg: float | None
    rescale: Sequence[float]
    acts: Sequence[bool]


def blocks_of(model: Any) -> list[torch.nn.Module]:
    return [block for name in STACKS for block in getattr(model, name, [])]


def attention_of(block: Any) -> torch.nn.Module:
    return block.attn1 if hasattr(block, "attn1") else block.attn


@contextmanager
def weakened(model: Any, layers: Sequence[int], kind: str) -> Iterator[None]:
    """The model with some layers perturbed, for all rows."""
    with ExitStack() as stack:
        for layer in layers:
            block = blocks_of(model)[layer]
            if kind == "residual":
                stack.enter_context(mock.patch.object(block, "forward", _unchanged))
            else:
                attention = attention_of(block)
                stack.enter_context(mock.patch.object(attention, "forward", _identity(attention.forward)))
        yield


def _unchanged(*args: Any, **kwargs: Any) -> Any:
    given = list(args) + [kwargs[name] for name in ("hidden_states", "encoder_hidden_states") if name in kwargs]
    return UNCHANGED["returns"](given)


UNCHANGED: dict[str, Callable[[list[Any]], Any]] = {}


def _identity(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Attention scores that pick every token itself, whatever else the module does."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", _value):
            return forward(*args, **kwargs)

    return attention


def _value(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


@contextmanager
def plain_method(pipe: Any, plainly: Plainly, stacked: bool, joint: bool) -> Iterator[SimpleNamespace]:
    """Within the block, calls of this stock pipeline are guided the plain way.

    `stacked`: the denoiser is called on `[uncond | cond]` at once; `joint`: blocks pass on the text as well.
    """
    model, scheduler = pipe.transformer, pipe.scheduler
    forward, step = model.forward, scheduler.step
    calls: list[dict[str, Any]] = []
    state = SimpleNamespace(step=0)

    def record(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(**kwargs)

    def predict(source: str, layers: Sequence[int] = (), kind: str = "") -> torch.Tensor:
        kwargs = calls[0]
        if plainly.cfg is not None and stacked:
            half = (
                slice(None, len(kwargs["hidden_states"]) // 2)
                if source == "uncond"
                else slice(len(kwargs["hidden_states"]) // 2, None)
            )
            kwargs = {n: v[half] if isinstance(v, torch.Tensor) and v.ndim else v for n, v in kwargs.items()}
        elif source == "uncond":
            kwargs = calls[1]
        with weakened(model, layers, kind):
            return forward(**kwargs)[0].double()

    def guided(output: torch.Tensor) -> torch.Tensor:
        cond = predict("cond")
        plain = {"cond": cond, "guided": cond}
        if plainly.cfg is not None:
            uncond = predict("uncond")
            plain |= {"uncond": uncond, "guided": uncond + plainly.cfg * (cond - uncond)}
        result = plain["guided"]
        for weak in plainly.weak:
            if weak.scales[state.step]:
                perturbed = predict(weak.of, weak.layers, weak.kind)
                result = result + weak.scales[state.step] * (plain[weak.base] - perturbed)
        phi = plainly.rescale[state.step]
        if phi:
            each = [phi * c.std() / g.std() + 1 - phi for c, g in zip(cond, result, strict=True)]
            result = torch.stack([g * factor for g, factor in zip(result, each, strict=True)])
        return result.to(output.dtype)

    @functools.wraps(step)  # pipelines look at its signature
    def guided_step(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if plainly.acts[state.step]:
            output = guided(output)
        calls.clear()
        state.step += 1
        return step(output, *args, **kwargs)

    UNCHANGED["returns"] = (lambda given: (given[0], given[1])) if joint else (lambda given: given[0])
    with mock.patch.object(model, "forward", record), mock.patch.object(scheduler, "step", guided_step):
        yield state
