"""The peak memory of a call beyond what was there before. It is counted from what operations allocate and release,
on a CPU or on the meta device, so it is the same everywhere and does not depend on an allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Count the bytes of all living tensors within the block, and their maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0
        self.most: int = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            part.untyped_storage() for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)
        }
        output = operation(*args, **(kwargs or {}))
        for part in pytree.tree_leaves(output):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                if storage not in given and storage not in self._known:
                    size = storage.nbytes()
                    self._known[storage] = size
                    weakref.finalize(storage, self._gone, size)
                    self.bytes += size
        self.most = max(self.most, self.bytes)
        return output

    def _gone(self, size: int) -> None:
        self.bytes -= size


def peak_of(call: Callable[[], Any]) -> int:
    """The peak bytes of a call."""
    with Peak() as peak, torch.no_grad():
        call()
    most: int = peak.most
    return most
