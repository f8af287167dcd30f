"""How much memory a call takes at its peak, beyond what was there before: counted, on a CPU or on a device without
numbers, from what every operation allocates and what is let go of. The same everywhere, and no allocator's habits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Within it, the bytes of all tensors made and not let go of yet, and the most that there were at once."""

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
    """The most bytes at once that a call makes."""
    with Peak() as peak, torch.no_grad():
        call()
    most: int = peak.most
    return most
