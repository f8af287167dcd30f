"""One call of an attention module for all rows, those that attend and those whose output is V.

The module's own processor runs once on each different input, with projections, norms, rotary embeddings and added
tokens as the model has them. Its scaled dot product attention becomes one call of `masked_attention`, which returns the
rows that are needed, possibly several for one input. What the processor does after that, it does to these rows.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.rows import as_tuple, spans, take
from stgfast.batching.sdpa import CALLS, Scores, UnfitError, answering
from stgfast.batching.seam import Call
from stgfast.errors import EngineError
from stgfast.kernels import masked_attention

PROJECTIONS = 3  # for queries, keys and values
LIBRARY = "diffusers"  # its processors store nothing about their rows except what `_Rows` corrects
UNSEEN = "does not call torch's attention"
SIZES = ("reshape", "view")
PAIRS = ("add", "sub", "mul", "div", "lerp", "where")
_unfit: WeakKeyDictionary[nn.Module, tuple[type, str]] = WeakKeyDictionary()  # with the processor that was tried


class Keys(NamedTuple):
    """The content of a mask, if it says no more than this.

    Attributes:
        lengths: the number of keys of each row, counted from the first; None if there are no others.
        queries: it excludes queries with the same numbers too, which then attend to nothing.
    """

    lengths: tuple[int, ...]
    queries: bool = False


def no_keys(scores: Scores) -> Keys | None:
    """A mask stays a mask."""
    return None


def unfit(attention: nn.Module) -> str:
    """Why the attention of a module cannot be one call; "" if it may. Known from the code of diffusers' processors, and
    of others after one was tried.
    """
    module = unwrapped(attention)
    processor, (tried, reason) = _processor(module), _unfit.get(module, (None, ""))
    if processor is tried:
        return reason
    code = _code(processor)
    if code is None or not of_library(attention):
        return ""
    return "" if not _names(code).isdisjoint(CALLS) else f"{processor.__name__} {UNSEEN}"


def note(attention: nn.Module, why: str) -> None:
    """Record that the module's current processor was tried and cannot be one call."""
    module = unwrapped(attention)
    _unfit[module] = _processor(module), f"{_processor(module).__name__} {why}"


def of_library(attention: nn.Module) -> bool:
    """Whether the processor is one of diffusers', which accepts that one input gives several rows."""
    return _processor(unwrapped(attention)).__module__.split(".")[0] == LIBRARY


def inputs_of(attention: nn.Module, rows: Sequence[int], inputs: Sequence[int]) -> list[int]:
    """The different inputs of these rows; one for each row if the processor is unknown."""
    return [inputs[row] for row in rows] if of_library(attention) else list(rows)


def saves(inputs: int, plain: int, masked: int) -> bool:
    """Whether one call for all rows projects less than a call for those that attend and V for the others."""
    return bool(plain) and PROJECTIONS * inputs <= PROJECTIONS * plain + masked


def one_call(
    call: Call,
    arguments: Arguments,
    inputs: int,
    masked: Sequence[bool],
    source: Sequence[int],
    keys: Callable[[Scores], Keys | None] = no_keys,
) -> Any:
    """The output of an attention module that is given `inputs` rows. Row b is computed from input `source[b]`, and is V
    if `masked[b]`. `keys` may give the numbers of keys for a mask. Raises UnfitError if this is not possible.
    """
    rows = _Rows(inputs, masked, source, keys)
    try:
        with answering(arguments.module, rows.attend, rows.regrown):
            outputs = as_tuple(arguments.given_to(call))
        if not rows.calls:
            raise UnfitError(UNSEEN)
    except UnfitError as error:
        note(arguments.module, str(error))
        raise
    for output in outputs:
        if isinstance(output, Tensor) and output.shape[0] != rows.after:
            raise EngineError(
                f"rows of {type(arguments.module).__name__}: got {output.shape[0]}, expected {rows.after}"
            )
    return outputs if len(outputs) > 1 else outputs[0]


class _Rows:
    """The rows of one call, whose number changes at the attention."""

    def __init__(
        self,
        inputs: int,
        masked: Sequence[bool],
        source: Sequence[int],
        keys: Callable[[Scores], Keys | None],
    ):
        self.inputs, self.masked, self.source, self.keys = inputs, masked, source, keys
        self.calls = self.before = self.after = 0

    def attend(self, scores: Scores) -> Tensor:
        if scores.beyond:
            raise UnfitError(scores.beyond)
        rows = scores.q.shape[0]
        each, left = divmod(rows, self.inputs)  # a sample may have several neighboring rows
        if self.calls or left:
            raise UnfitError("calls torch's attention more than once" if self.calls else "attends row by row")
        if scores.q.shape[2] != scores.k.shape[2]:
            raise UnfitError("has other keys than queries")
        self.calls, self.before, self.after = 1, rows, each * len(self.source)
        self.where = spans(self.source, each)
        keys = self.keys(scores) if scores.attend is None else None
        keys = None if keys is None or keys.queries else keys
        return masked_attention(
            scores.q,
            scores.k,
            scores.v,
            [flag for flag in self.masked for _ in range(each)],
            source=[one * each + i for one in self.source for i in range(each)],
            kv_len=keys and (keys.lengths or None),
            bias=scores.mask if keys is None else None,
            scale=scores.scale,
            impl=scores.attend or "auto",
        )

    def regrown(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Correct what a processor stored about its rows before the attention: a size, or a tensor with these rows."""
        if self.before == self.after:
            return args
        name = getattr(func, "__name__", "")
        if name in SIZES and self._grown(args[0]) and len(args) > 1:
            sizes = args[1] if isinstance(args[1], tuple | list) else args[1:]
            if isinstance(sizes[0], int) and sizes[0] == self.before:
                return args[0], (self.after, *sizes[1:])
        if name in PAIRS and any(map(self._grown, args)):
            return tuple(self._taken(arg) for arg in args)
        if name.removesuffix("_") in PAIRS and self._grown(args[0]):  # in place
            return args[0], *(self._taken(arg) for arg in args[1:])
        return args

    def _grown(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.after

    def _taken(self, value: Any) -> Any:
        old = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.before
        return take(value, self.where, self.before, "kept by an attention") if old else value


def _processor(module: nn.Module) -> type:
    """The class with the code of an attention: its processor, or the module itself."""
    return type(getattr(module, "processor", None) or module)


def _code(processor: type) -> types.CodeType | None:
    call = processor.forward if issubclass(processor, nn.Module) else processor.__call__
    return getattr(call, "__code__", None)


@functools.lru_cache(maxsize=256)
def _names(code: types.CodeType) -> frozenset[str]:
    """All names that code uses, including code inside it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))
