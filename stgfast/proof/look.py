"""Observe one step of an unknown pipeline: which of its models denoises, and what its blocks do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.rows import as_tuple
from stgfast.batching.seam import Call, Handler, handling, held
from stgfast.batching.values import identity_attention
from stgfast.errors import UnsupportedPipelineError
from stgfast.proof.links import found_in, named
from stgfast.proof.measure import Form
from stgfast.proof.plain import values_alone
from stgfast.proof.watch import Enough, Seen, Watch


@dataclass
class Block:
    """A block that ran.

    Attributes:
        path: that of its list.
        given: the shapes of its arguments by name; None for one that is not a tensor.
        state: by output, the name of the next block's argument that it becomes; None if it becomes none.
        outputs: the number of tensors that it returns.
    """

    path: str
    module: nn.Module
    given: dict[str, Any]
    state: tuple[str | None, ...] = ()


@dataclass
class Look:
    """The observations.

    Attributes:
        denoiser: the component that was called last before the scheduler.
        arguments: those of its first call in the step.
        form: its output.
        blocks: the blocks that ran in this call, in order.
        attention: for each list, the path of the self-attention in the first block.
        identity: whether `identity_attention` gives that attention's output for output = V.
        given: the first dimension of all tensor arguments of its attentions, by name.
    """

    denoiser: str = ""
    arguments: Arguments | None = None
    form: Form | None = None
    blocks: list[Block] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)
    identity: dict[str, bool] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


def look(pipe: Any, cls: type[Any], call: Mapping[str, Any]) -> Look:
    """Run the first step of a call. It costs that step's forwards and no more."""
    watch = Watch(pipe, cls, call, {})
    parts = {name: unwrapped(part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    calls: dict[str, Look] = {}
    order: list[str] = []

    def called(name: str, plain: Call, arguments: Arguments) -> Any:
        if watch.steps[0].sent:
            raise Enough
        order.append(name)
        seen = Look(name, arguments)
        looking = _Looking(seen)
        handlers = looking.handlers(arguments.module) if name not in calls else {}
        with held(handlers), handling({**outer, **handlers}):
            output = arguments.given_to(plain)
        if name not in calls:
            seen.form = Form(output, torch.Size())
            calls[name] = seen
        return output

    outer: dict[nn.Module, Handler] = {part: functools.partial(called, name) for name, part in parts.items()}

    def act(copied: Any, copied_call: Mapping[str, Any]) -> None:
        watch.steps.append(Seen())
        with held(outer), handling(outer):
            watch.given(copied_call)()

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        watch.act(act)
    if not order or not calls[order[-1]].blocks:
        tried = f"calls {', '.join(dict.fromkeys(order))} for a step" if order else "calls none of its models"
        raise UnsupportedPipelineError(
            f"pipeline: got {cls.__name__}, whose facts are not known and were not found: it {tried}, expected a model "
            f"with lists of blocks"
        )
    return calls[order[-1]]


def lists_of(denoiser: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of blocks in a model."""
    return {
        name: list(part) for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList) and len(part)
    }


class _Looking:
    """Handlers that record what the blocks of a model do."""

    def __init__(self, seen: Look):
        self.seen = seen
        self._last: tuple[Block, tuple[Any, ...], Mapping[str, Any]] | None = None

    def handlers(self, denoiser: nn.Module) -> dict[nn.Module, Handler]:
        handlers: dict[nn.Module, Handler] = {}
        for path, blocks in lists_of(denoiser).items():
            handlers |= {block: functools.partial(self._block, path) for block in blocks}
            for name, part in blocks[0].named_modules():
                if name and any(part.children()):
                    handlers[part] = functools.partial(self._part, path, name)
        return handlers

    def _block(self, path: str, plain: Call, arguments: Arguments) -> Any:
        given = named(arguments)
        if self._last is not None:
            block, outputs, own = self._last
            linked = [found_in(output, given) for output in outputs]
            block.state = tuple(name if name in own else None for name in linked)
        block = Block(path, arguments.module, {name: size_of(value) for name, value in given.items()})
        self.seen.blocks.append(block)
        output = arguments.given_to(plain)
        self._last = block, as_tuple(output), given
        return output

    def _part(self, path: str, name: str, plain: Call, arguments: Arguments) -> Any:
        """Record a part of a block: a self-attention, if queries and keys are as many and no smaller part is one."""
        scores = _Scores()
        with scores:
            output = arguments.given_to(plain)
        if path not in self.seen.attention and any(scores.own):
            self.seen.attention[path] = name
            self.seen.given |= {key: size_of(value) for key, value in named(arguments).items()}
            self.seen.identity[path] = _is_standard(plain, arguments)
        return output


class _Scores(TorchFunctionMode):
    """Records, for each attention, whether it has as many keys as queries."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args[:2], *(kwargs[name] for name in ("query", "key")[len(args) :])]
            self.own.append(given[0].shape[-2] == given[1].shape[-2])
        return func(*args, **kwargs)


def _is_standard(plain: Call, arguments: Arguments) -> bool:
    """Whether the package can make this self-attention the identity."""
    try:
        mine = as_tuple(arguments.given_to(functools.partial(identity_attention, arguments.module)))
    except (AttributeError, TypeError, RuntimeError):  # it has other projections or arguments
        return False
    theirs = as_tuple(values_alone(plain, arguments))
    return len(mine) == len(theirs) and all(
        (a is None and b is None) or (a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3))
        for a, b in zip(mine, theirs, strict=True)
    )


def size_of(value: Any) -> Any:
    """The first dimension of a tensor, or of those in a collection."""
    if isinstance(value, dict | list | tuple):
        sizes = {size_of(part) for part in (value.values() if isinstance(value, dict) else value)} - {None}
        return sizes.pop() if len(sizes) == 1 else None
    return len(value) if isinstance(value, Tensor) and value.ndim else None
