"""Backends that compute attention over a stack of rows.

There are two forms. Fused: one Triton launch for all rows (`triton`). Split: the rows that attend use the fastest
kernel of the device, and identity rows are a copy (all other names). `auto` measures once for each shape on a GPU, and
remembers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stgfast.kernels import reference
from stgfast.kernels.checks import check_attention, expected
from stgfast.kernels.layout import as_autocast, empty_like_query, on_device, spans

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]  # q, k, v, bias or mask, scale


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


# torch's kernels, called directly. `sdpa_kernel` would choose for all threads, including a VAE that decodes meanwhile.


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _first(torch.ops.aten._scaled_dot_product_attention_math(q, k, v, _added(q, k, bias), scale=scale))


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _first(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale))


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    added = _added(q, k, bias, aligned=16)
    return _first(torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, added, False, scale=scale))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    added = _added(q, k, bias)
    return _first(torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, added, False, scale=scale))


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale)
    return out.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    added = _added(q, k, bias, aligned=8)
    out: Tensor = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=added, scale=scale)
    return out.transpose(1, 2)


def _added(q: Tensor, k: Tensor, bias: Tensor | None, aligned: int = 1) -> Tensor | None:
    """A bias or mask in the form that is added to scores, with lines that begin at multiples of this number."""
    if bias is None:
        return None
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -torch.inf)
    keys = bias.shape[3]
    bias = F.pad(bias, (0, -keys % aligned))[..., :keys]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


@dataclass(frozen=True)
class Backend:
    """A backend for attention over plain rows: its function, its device types ("" for any), and whether it takes a
    bias.
    """

    attend: Attend
    devices: tuple[str, ...]
    takes_bias: bool
    package: str = ""

    def missing(self, device: str, bias: bool) -> str:
        """Why it cannot run; "" if it can."""
        if self.devices and device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return "takes no mask, bias or kv_len" if bias and not self.takes_bias else ""


ANY, CUDA = (), ("cuda",)
BACKENDS = {
    "sdpa": Backend(_sdpa, ANY, takes_bias=True),
    "math": Backend(_math, ANY, takes_bias=True),
    "flash": Backend(_flash, CUDA, takes_bias=False),
    "efficient": Backend(_efficient, CUDA, takes_bias=True),
    "cudnn": Backend(_cudnn, CUDA, takes_bias=True),
    "flash-attn": Backend(_flash_attn, CUDA, takes_bias=False, package="flash_attn"),
    "xformers": Backend(_xformers, CUDA, takes_bias=True, package="xformers"),
}
WHOLE = ("reference", "triton", "hopper")  # these compute all rows, identity and plain
NAMES = ("auto", *WHOLE, *BACKENDS)
INTERPRETED = (torch.float32, torch.float16)  # Triton's interpreter has no bfloat16
YARDSTICK = "sdpa"  # `auto` compares others with it: a wrong result is never chosen
ROUNDINGS = 16  # of the largest value, by which two right results may differ


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    identity: Sequence[bool] | None = None,
    *,
    kv_len: Tensor | Sequence[int] | None = None,
    bias: Tensor | None = None,
    source: Sequence[int] | None = None,
    tokens: tuple[int, int] | None = None,
    scale: float | None = None,
    impl: str | Attend = "auto",
) -> Tensor:
    """Attention for a whole stack: row b is softmax attention, or a copy of V if `identity[b]`.

    `reference.masked_attention` specifies the result. Under autocast it has the dtypes of torch's attention.

    Args:
        q, k, v: (rows, heads, tokens, size), in any memory order whose last stride is 1.
        identity: the output rows that are a copy of V.
        kv_len: int32 on the device: the number of keys of each row of k and v. Other keys are never read. Given as
            numbers on the host, kernels without masks can be used too.
        bias: boolean (true: attend), or added to the scores; broadcastable over rows, heads and queries.
        source: the row of q, k, v, kv_len and bias that each output row reads. Several may read one.
        tokens: the range of tokens that an identity row copies. Outside it, the row attends as usual.
        scale: the factor of scores. Default: 1 / sqrt(size).
        impl: one of `NAMES`; a named one never falls back to another. Or a function that computes attention on plain
            rows.
    """
    q, k, v = as_autocast(q, k, v)
    rows = list(range(q.shape[0])) if source is None else list(source)
    same = [False] * len(rows) if identity is None else [bool(flag) for flag in identity]
    span = (0, q.shape[2]) if tokens is None else (int(tokens[0]), int(tokens[1]))
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    lengths = None if kv_len is None or isinstance(kv_len, Tensor) else tuple(map(int, kv_len))
    known = lengths if lengths is not None else kv_len
    check_attention(q, k, v, same, kv_len=known, bias=bias, source=rows, tokens=span, scale=factor)
    if bias is not None and bias.ndim < 4:
        bias = bias[(None,) * (4 - bias.ndim)]
    counted = kv_len if isinstance(kv_len, Tensor) else None
    call = Call(q, k, v, tuple(same), tuple(rows), span, counted, bias, factor, lengths)
    if callable(impl):
        return call.split(impl)
    if impl not in NAMES:
        raise expected("impl", repr(impl), f"one of {', '.join(NAMES)}")
    return call.by(choose(call) if impl == "auto" else impl)


@dataclass(frozen=True, eq=False)
class Call:
    """One checked call, with every option given."""

    q: Tensor
    k: Tensor
    v: Tensor
    identity: tuple[bool, ...]
    source: tuple[int, ...]
    tokens: tuple[int, int]
    kv_len: Tensor | None
    bias: Tensor | None
    scale: float
    lengths: tuple[int, ...] | None = None  # replaces `kv_len` if the host knows the numbers

    def by(self, name: str) -> Tensor:
        reason = self.refused_by(name)
        if reason:
            raise expected("impl", repr(name), f"another implementation, since it {reason}")
        if name == "reference":
            return reference.masked_attention(
                self.q,
                self.k,
                self.v,
                self.identity,
                source=self.source,
                tokens=self.tokens,
                kv_len=self._on_device,
                bias=self.bias,
                scale=self.scale,
            )
        if name in ("triton", "hopper"):
            from stgfast.kernels import attention, attention_hopper

            fused = attention.masked_attention if name == "triton" else attention_hopper.masked_attention
            given = (self.identity, self.source, self.tokens, self._on_device, self.bias, self.scale)
            out: Tensor = fused(self.q, self.k, self.v, *given)
            return out
        return self.split(BACKENDS[name].attend)

    def refused_by(self, name: str) -> str:
        """Why an implementation cannot run this call; "" if it can."""
        reason = unavailable(name, self.q.device.type, self.biased)
        if reason or name != "hopper" or torch.compiler.is_compiling():
            return reason
        from stgfast.kernels import attention_hopper  # imports triton

        return attention_hopper.unsuitable(self.q, self.k, self.v, self.bias)

    @property
    def _on_device(self) -> Tensor | None:
        return self.kv_len if self.lengths is None else on_device(self.lengths, torch.int32, self.q.device)

    @property
    def biased(self) -> bool:
        return self.bias is not None or self.kv_len is not None

    @property
    def shape(self) -> tuple[Any, ...]:
        """The key under which a choice is remembered."""
        sizes = (*self.q.shape[1:], self.k.shape[2], len(self.source), sum(self.identity), *self.tokens)
        counted = (self.kv_len is not None, self.lengths is not None)
        kinds = (self.q.dtype, self.q.device, *counted, self.refused_by("hopper"))
        return (*sizes, *kinds, None if self.bias is None else (self.bias.dtype, self.bias.shape[2] > 1))

    def split(self, attend: Attend) -> Tensor:
        """Compute rows that attend in one call of `attend`, and copy identity rows."""
        first, last = self.tokens
        queries = self.q.shape[2]
        plain = [row for row, same in enumerate(self.identity) if not same]
        if len(plain) == len(self.identity):
            return self._attended(attend, plain, slice(None))
        out = empty_like_query(self.q, len(self.source))
        if plain:
            _put(out, plain, slice(None), self._attended(attend, plain, slice(None)))
        masked = [row for row, same in enumerate(self.identity) if same]
        values = _rows(self.v[:, :, first:last], [self.source[row] for row in masked])
        _put(out, masked, slice(first, last), values)
        for part in (slice(0, first), slice(last, queries)):
            if part.stop > part.start:
                _put(out, masked, part, self._attended(attend, masked, part))
        return out

    def _attended(self, attend: Attend, rows: list[int], queries: slice) -> Tensor:
        """Attention for some output rows and some of their queries."""
        where = [self.source[row] for row in rows]
        if self.lengths is not None:
            return self._of_lengths(attend, self.lengths, where, queries)
        return self._of_rows(attend, where, queries, slice(None))

    def _of_lengths(self, attend: Attend, lengths: Sequence[int], where: list[int], queries: slice) -> Tensor:
        """Compute rows with the same number of keys in one call."""
        each = [lengths[row] for row in where]
        if len(set(each)) == 1 and each[0]:
            return self._of_rows(attend, where, queries, slice(each[0]))
        out = empty_like_query(self.q[:, :, queries], len(where)).zero_()  # a query without keys gives 0
        for length in dict.fromkeys(length for length in each if length):
            mine = [n for n, its in enumerate(each) if its == length]
            _put(out, mine, slice(None), self._of_rows(attend, [where[n] for n in mine], queries, slice(length)))
        return out

    def _of_rows(self, attend: Attend, where: list[int], queries: slice, keys: slice) -> Tensor:
        q, k, v = (_rows(t, where) for t in (self.q[:, :, queries], self.k[:, :, keys], self.v[:, :, keys]))
        bias = self.bias
        if bias is not None:
            bias = bias[:, :, queries] if bias.shape[2] > 1 else bias
            bias = (_rows(bias, where) if bias.shape[0] > 1 else bias)[..., keys]
        if self.kv_len is None:
            return attend(q, k, v, bias, self.scale)
        reach = _rows(self.kv_len, where)[:, None, None, None]
        valid = torch.arange(k.shape[2], device=k.device) < reach
        if bias is None:
            bias = valid
        else:
            bias = bias & valid if bias.dtype == torch.bool else bias.masked_fill(~valid, -torch.inf)
        return attend(q, k, v, bias, self.scale)


def _rows(tensor: Tensor, where: list[int]) -> Tensor:
    """Rows of a tensor: a view if they are neighbors."""
    parts = [tensor[run] for run in spans(where, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(out: Tensor, rows: list[int], queries: slice, values: Tensor) -> None:
    runs = spans(rows, 1)
    for run, part in zip(runs, values.split([run.stop - run.start for run in runs]), strict=True):
        out[run, :, queries] = part


def triton_runs(device: str) -> bool:
    """Whether Triton kernels run here: on a GPU, or on a CPU in Triton's interpreter."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def unavailable(name: str, device: str, biased: bool) -> str:
    """Why an implementation cannot run; "" if it can."""
    if torch.compiler.is_compiling():  # nothing can be checked here: the call itself raises
        return ""
    if name == "hopper" and triton_runs(device):
        from stgfast.kernels import attention_hopper  # imports triton

        return attention_hopper.unsupported(torch.device(device))
    if name in ("triton", "hopper"):
        return "" if triton_runs(device) else f"needs a GPU or Triton's interpreter, not {device}"
    return "" if name == "reference" else BACKENDS[name].missing(device, biased)


@dataclass(frozen=True)
class Choice:
    """The choice for a shape, the measured milliseconds, and why other backends could not run."""

    name: str
    milliseconds: dict[str, float]
    failed: dict[str, str]


choices: dict[tuple[Any, ...], Choice] = {}


def choose(call: Call) -> str:
    """The fastest implementation for this shape. Nothing is measured on a CPU or inside a compiled graph."""
    device = call.q.device.type
    if device != "cuda":
        return "triton" if triton_runs(device) and call.q.dtype in INTERPRETED else "sdpa"
    if torch.compiler.is_compiling():
        return "triton"
    if call.shape not in choices:
        if torch.cuda.is_current_stream_capturing():
            return "triton"
        choices[call.shape] = _measured(call)
    return choices[call.shape].name


def _measured(call: Call) -> Choice:
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    wanted = call.by(YARDSTICK)
    bound = ROUNDINGS * torch.finfo(call.q.dtype).eps * float(call.v.abs().max())
    # `hopper` has not run on a GPU yet, and might wait forever: it only runs if it is named.
    for name in (YARDSTICK, "triton", *BACKENDS):
        if name == "math" or name in times:
            continue  # `math` stores all scores: never the fastest, and often out of memory
        reason = call.refused_by(name)
        if reason:
            failed[name] = reason
            continue
        try:
            off = float((call.by(name) - wanted).abs().max())
            if name != YARDSTICK and not off <= bound:
                failed[name] = f"differs from {YARDSTICK} by {off:.2g}, which rounding does not explain"
            else:
                times[name] = _milliseconds(functools.partial(call.by, name))
        except Exception as error:  # a backend that refuses this shape raises when it is called
            failed[name] = str(error).splitlines()[0]
    return Choice(min(times, key=lambda name: times[name]), times, failed)


def _milliseconds(run: Callable[[], Tensor], warmup: int = 2, rounds: int = 5) -> float:
    for _ in range(warmup):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / rounds
