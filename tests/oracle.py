"""The plain method: each branch through all blocks, combined by the formula.

Branches and formula come from `stgfast/proof/plain.py`, which shares no code with the engine. Facts are written here,
independently of the adapters. A stock pipeline runs all its steps: the calls of its denoiser and their outputs, which
are the branches cond and uncond, are recorded. Each perturbed branch is one more call, on the rows of its source alone.
The prediction that the pipeline passes to its scheduler is replaced by guidance computed from all branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from stgfast import Perturbation
from stgfast.batching.arguments import Arguments
from stgfast.proof import plain
from stgfast.proof.plain import Part
from tests.precision import distance

VISIBLE = 1e-6  # the least distance of a perturbed prediction from its source
STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")


@dataclass
class Perturbed:
    """One perturbed branch, with a number for each step."""

    layers: Sequence[int]
    kind: str
    scales: Sequence[float]
    of: str = "cond"
    base: str = "cond"
    axis: str = ""
    sigma: float | None = None


@dataclass
class Plainly:
    """Guidance for the plain method. `cfg` is None without CFG; a function is called with pipeline and denoiser.
    `formula(cond, uncond, perturbed predictions, step)` replaces the formula of this file.
    """

    perturbed: Sequence[Perturbed]
    cfg: Any
    rescale: Sequence[float]
    acts: Sequence[bool]
    formula: Callable[..., torch.Tensor] | None = None


def blocks_of(model: Any) -> list[torch.nn.Module]:
    return [block for name in STACKS for block in getattr(model, name, [])]


def parts_of(model: Any) -> list[Part]:
    """The parts of a model that has one list of blocks, or several."""
    blocks = enumerate(blocks_of(model))
    return [Part(block, i, {"": block.attn1 if hasattr(block, "attn1") else block.attn}) for i, block in blocks]


def lying(grid: tuple[int, int, int], after: int = 0) -> Callable[[int], tuple[int, tuple[int, int, int]]]:
    """For any number of tokens: `others` first, then those of a video."""
    return lambda tokens: (after, grid)


def first(given: list[Any]) -> Any:
    return given[0]


def first_two(given: list[Any]) -> Any:
    return given[0], given[1]


@dataclass(frozen=True)
class Facts:
    """Facts about a pipeline that the plain method needs.

    Attributes:
        stacked: the denoiser is called once on `[uncond | cond]`; otherwise on cond, then on uncond.
        parts: the parts that a model runs, in order.
        unchanged: the return value of a skipped block, from its positional arguments and those named `passed`.
        half: only half of a prediction's channels is noise.
        sent: what the pipeline passes to its scheduler for a prediction.
        oblong: further arguments of a call with frames that are not square, if possible.
        lies: for that call, by the number of tokens of the queries: the position of the video's first token, and its
            (frames, height, width).
        query: the part of a self-attention that makes the queries.
        repeated: arguments of the denoiser with several rows for each sample.
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
    repeated: tuple[str, ...] = ()


def perturbing(
    facts: Facts, model: Any, layers: Sequence[int], kind: str, axis: str = "", sigma: float | None = None
) -> AbstractContextManager[None]:
    """Perturb some layers of the model for all rows, within the block."""

    def unchanged(part: Part, arguments: Arguments) -> Any:
        named = [arguments.kwargs[name] for name in facts.passed if name in arguments.kwargs]
        return facts.unchanged([*arguments.args, *named])

    how = Perturbation(layers, kind=kind, axis=axis, sigma=sigma)
    return plain.perturbing(facts.parts(model), how, unchanged=unchanged, lies=facts.lies, query=facts.query)


def _kept(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy, because a pipeline may change a dictionary for its next call."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}


def _half(
    args: tuple[Any, ...], kwargs: dict[str, Any], source: str, repeated: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The rows of one source, from a call that has the rows of both."""
    rows = len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample")))  # type: ignore[arg-type]
    half = slice(None, rows // 2) if source == "uncond" else slice(rows // 2, None)

    def mine(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {name: mine(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)) and name in repeated:
            return type(value)(mine(part, name) for part in value)
        if name in repeated:
            return value.chunk(2)[source == "cond"]
        return value[half] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value

    return tuple(map(mine, args)), {name: mine(value, name) for name, value in kwargs.items()}


def _noise(facts: Facts, prediction: torch.Tensor) -> torch.Tensor:
    return prediction.chunk(2, dim=1)[0] if facts.half else prediction


@contextmanager
def plain_method(pipe: Any, plainly: Plainly, facts: Facts) -> Iterator[SimpleNamespace]:
    """Guide the calls of this stock pipeline by the plain method, within the block."""
    scheduler = pipe.scheduler
    step = scheduler.step
    noise = functools.partial(_noise, facts)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
    state = SimpleNamespace(step=0)
    there = [name for name in facts.denoisers if getattr(pipe, name, None) is not None]
    forwards = {name: getattr(pipe, name).forward for name in there}
    stacked = plainly.cfg is not None and facts.stacked

    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            kept = _kept(kwargs)
            made = forwards[name](*args, **kwargs)
            # A copy, because a pipeline may change it.
            calls.append((name, args, kept, made[0].to(torch.float64, copy=True)))
            return made

        return functools.wraps(forwards[name])(record)

    def predicted(source: str) -> torch.Tensor:
        """A branch that the pipeline computed itself."""
        if stacked:
            return calls[0][3].chunk(2)[source == "cond"]
        return calls[source == "uncond"][3]

    def predict(perturbed: Perturbed) -> torch.Tensor:
        name, args, kwargs, _ = calls[perturbed.of == "uncond" and not stacked]
        if stacked:
            args, kwargs = _half(args, kwargs, perturbed.of, facts.repeated)
        how = (perturbed.layers, perturbed.kind, perturbed.axis, perturbed.sigma)
        with perturbing(facts, getattr(pipe, name), *how):
            made = forwards[name](*args, **kwargs)[0].double()
        assert distance(made, predicted(perturbed.of)) > VISIBLE, "a perturbation that changes nothing shows nothing"
        return made

    def guided() -> torch.Tensor:
        cond = predicted("cond")
        uncond = None if plainly.cfg is None else predicted("uncond")
        if plainly.formula is not None:
            perturbed = [noise(predict(part)) for part in plainly.perturbed]
            result = plainly.formula(noise(cond), None if uncond is None else noise(uncond), perturbed, state.step)
            return torch.cat([result, cond[:, result.shape[1] :]], dim=1)  # channels that are not noise are cond's
        scale = plainly.cfg(pipe, calls[0][0]) if callable(plainly.cfg) else plainly.cfg
        weighed = [(part, part.scales[state.step]) for part in plainly.perturbed if part.scales[state.step]]
        perturbed = [(number, part.base, predict(part)) for part, number in weighed]
        return plain.guided(cond, uncond, scale, perturbed, plainly.rescale[state.step], half=facts.half)

    @functools.wraps(step)  # pipelines inspect its signature
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
