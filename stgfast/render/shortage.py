"""Memory that ran out: how it is told, and what can be given back."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, or what caused it, says that memory ran out; on a CPU torch has no class for it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (MemoryError, torch.OutOfMemoryError)):
            return True
        said = str(seen) if isinstance(seen, RuntimeError) else ""
        if "DefaultCPUAllocator: can't allocate memory" in said or "OutOfMemoryError: " in said:  # of another process
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free(device: torch.device) -> None:
    """Give back what the allocator keeps for later; it may be in pieces too small for what comes."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
