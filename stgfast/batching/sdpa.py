"""Replace scaled dot product attention during one module's call, in this thread only.

There are two ways to call it, and neither needs a change of the calling code:

    torch's function     F.scaled_dot_product_attention, seen by a torch function mode, which belongs to a thread
    diffusers' backends  the registry's entry for a backend that was chosen in place of torch's function, or that
                         shards over devices

Our entry in the registry looks up the handler of the current context, or else makes the plain call, as in `seam`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from stgfast.kernels.checks import MAX_SIZE

REGISTRY = "diffusers.models.attention_dispatch"
CALLS = ("scaled_dot_product_attention", "dispatch_attention_fn")  # the names by which code makes such a call
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]  # q, k, v, mask, scale


class UnfitError(Exception):
    """A call that cannot be replaced, with the reason."""


@dataclass(frozen=True)
class Scores:
    """One call of scaled dot product attention, `(rows, heads, tokens, size)`.

    Attributes:
        attend: the backend that must compute it, if one was chosen; None for any.
        plain: the original call.
        beyond: what `masked_attention` cannot do of it, or "".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    attend: Attend | None
    plain: Callable[[], Tensor]
    beyond: str = ""


Answer = Callable[[Scores], Tensor]
Change = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]
_answer: ContextVar[Answer | None] = ContextVar("stgfast_answer", default=None)
_lock = threading.Lock()
_held: dict[Any, int] = {}


def unchanged(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args


@contextmanager
def answering(attention: nn.Module, answer: Answer, change: Change = unchanged) -> Iterator[None]:
    """Within the block, pass calls of scaled dot product attention by this module to `answer`. For all other torch
    functions that it calls, `change(function, arguments)` changes the arguments.
    """
    chosen = _chosen(attention)
    token = _answer.set(answer)
    try:
        with _Functions(answer, change), nullcontext() if chosen is None else _entered(chosen):
            yield
    finally:
        _answer.reset(token)


class _Functions(TorchFunctionMode):
    def __init__(self, answer: Answer, change: Change):
        super().__init__()
        self.answer, self.change = answer, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A chosen backend may itself call torch's function, which is not a call by the module.
        if func is scaled_dot_product_attention and _answer.get() is not None:
            plain = functools.partial(func, *args, **kwargs)
            return self.answer(_scores(None, plain, *args, **kwargs))
        return func(*self.change(func, args), **kwargs)


def _scores(
    attend: Attend | None,
    plain: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Scores:
    """A call's arguments, by torch's names for them."""
    beyond = "is causal" if is_causal else "has a dropout" if dropout_p else ""
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        beyond, attn_mask = f"has a {type(attn_mask).__name__} for a mask", None
    shared = query.shape[-3] // key.shape[-3]
    if enable_gqa and shared > 1:
        key, value = (x.repeat_interleave(shared, -3) for x in (key, value))
    if query.ndim != 4 or value.shape != key.shape or query.shape[3] > MAX_SIZE:
        beyond = f"attends with tensors of shape {tuple(query.shape)} and {tuple(value.shape)}"
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return Scores(query, key, value, attn_mask, scale, attend, plain, beyond)


def _registry() -> Any:
    """diffusers' attention backends, if any were loaded."""
    return getattr(sys.modules.get(REGISTRY), "_AttentionBackendRegistry", None)


def _chosen(attention: nn.Module) -> Any:
    """The backend of an attention module, if it is not torch's function on one device."""
    registry, processor = _registry(), getattr(attention, "processor", None)
    if registry is None:
        return None
    active = registry.get_active_backend()[0]
    named = type(active)(getattr(processor, "_attention_backend", None) or active)
    spread = getattr(processor, "_parallel_config", None) is not None
    return named if spread or named is not type(active).NATIVE else None


@contextmanager
def _entered(name: Any) -> Iterator[None]:
    """Put an entry for this backend into the registry within the block, which asks the context's handler."""
    backends = _registry()._backends
    with _lock:
        if not _held.get(name):
            backends[name] = functools.partial(_from_registry, backends[name])
        _held[name] = _held.get(name, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _held[name] -= 1
            if not _held[name]:
                backends[name] = backends[name].args[0]


def _from_registry(plain: Callable[..., Any], **given: Any) -> Any:
    """The replacement of a backend, whose tensors are (rows, tokens, heads, size)."""
    answer = _answer.get()
    if answer is None:
        return plain(**given)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    flat = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1])

    def as_given(**changed: Any) -> Tensor:
        token = _answer.set(None)
        try:
            out: Tensor = plain(**{**given, **{name: value for name, value in changed.items() if name in given}})
        finally:
            _answer.reset(token)
        return out.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        mask = mask[:, 0, 0] if flat and mask is not None else mask
        return as_given(query=q.transpose(1, 2), key=k.transpose(1, 2), value=v.transpose(1, 2), attn_mask=mask)

    if mask is not None and flat:
        mask = mask[:, None, None]
    heads = {name: given[name].transpose(1, 2) for name in ("query", "key", "value")}
    others = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa") if name in given}
    return answer(_scores(attend, as_given, **heads, attn_mask=mask, **others)).transpose(1, 2)
