"""The fastest attention for unperturbed layers: `attention="auto"`.

Each call of scaled dot product attention in a block's attention modules becomes a call of `masked_attention`, which
chooses by shape. A mask that excludes the last keys of a row becomes the row's number of keys. These keys are then not
read, and kernels without masks can be used. To find out, the mask is read once, for which the host waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout
from stgfast.batching.one_call import Keys, no_keys, unfit
from stgfast.batching.sdpa import Scores, answering
from stgfast.batching.seam import Call, compiled
from stgfast.kernels import masked_attention

NOTHING = -10000.0  # added to a score, this or less removes it; diffusers uses it for additive masks


class Fastest:
    """The faster attention for these modules in one pass of the denoiser. Masks do not change within a pass."""

    def __init__(self, modules: Collection[nn.Module]):
        self.modules = modules
        self._looked: list[tuple[Tensor, Keys | None]] = []

    def of(self, module: nn.Module, plain: Call) -> Call:
        """A call of a module with faster attention, if the module is one of these."""
        if module not in self.modules:
            return plain
        return lambda *args, **kwargs: self.call(plain, Arguments(module, args, kwargs))

    def keys_of(self, module: nn.Module) -> Callable[[Scores], Keys | None]:
        return self.keys if module in self.modules else no_keys

    def call(self, plain: Call, arguments: Arguments) -> Any:
        """The replacement of an attention module's call."""
        with answering(arguments.module, self.attend):
            return arguments.given_to(plain)

    def attend(self, scores: Scores) -> Tensor:
        if scores.beyond or scores.attend is not None:
            return scores.plain()
        mask, keys = scores.mask, self.keys(scores)
        lengths = keys.lengths if keys is not None else ()
        out = masked_attention(
            scores.q,
            scores.k,
            scores.v,
            kv_len=lengths or None,
            bias=mask if keys is None else None,
            scale=scores.scale,
        )
        if keys is not None and keys.queries:
            for row, length in zip(out, lengths, strict=True):
                row[:, length:] = 0.0
        return out

    def keys(self, scores: Scores) -> Keys | None:
        """The numbers of keys in a call's mask, if it excludes the last keys of rows and no others."""
        mask, rows = scores.mask, scores.q.shape[0]
        if mask is None:
            return Keys(())
        if mask.ndim != 4 or mask.shape[0] not in (1, rows) or mask.shape[3] != scores.k.shape[2]:
            return None
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        for seen, known in self._looked:
            if _one(seen, mask):
                return known
        keys = _keys(mask, rows)
        if mask.shape[2] == 1:  # a mask for each query is too large to store
            self._looked.append((mask, keys))
        return keys


def quickened(layout: Layout) -> frozenset[nn.Module]:
    """The attention modules of a model's blocks whose calls can be replaced: not those within compiled code."""
    return frozenset(
        module
        for unit in layout.units
        if not any(map(compiled, unit.module.modules()))
        for module in unit.module.modules()
        if hasattr(module, "processor") and not unfit(module)
    )


def _one(mask: Tensor, other: Tensor) -> bool:
    """Whether two masks are views of the same memory."""
    return (
        mask.data_ptr() == other.data_ptr()
        and mask.shape == other.shape
        and mask.stride() == other.stride()
        and mask.dtype == other.dtype
    )


def _keys(mask: Tensor, rows: int) -> Keys | None:
    if mask.dtype != torch.bool:
        added = mask
        mask = added == 0
        if not bool((mask | (added <= NOTHING)).all()):
            return None
    keys = mask.any(dim=2).any(dim=1)  # (rows, keys)
    count = keys.sum(dim=1)
    first = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
    queries = mask.shape[2] > 1
    if queries and mask.shape[2] != mask.shape[3]:
        return None
    whole = first[:, None, None] & first[:, None, :, None] if queries else first[:, None, None]
    read = torch.cat([count, (mask == whole).all().to(count.dtype)[None]]).tolist()  # one read from the device
    *lengths, right = read
    if not right or not all(lengths):
        return None
    if all(length == keys.shape[1] for length in lengths):
        return Keys(())
    return Keys(tuple(lengths) * (rows // len(lengths)), queries)
