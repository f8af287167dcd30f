"""Out of memory: how it is recognized, and what can be released."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, or its cause, says that memory ran out. torch has no error class for it on a CPU."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (MemoryError, torch.OutOfMemoryError)):
            return True
        text = str(seen) if isinstance(seen, RuntimeError) else ""
        if "DefaultCPUAllocator: can't allocate memory" in text or "OutOfMemoryError: " in text:  # from another process
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free(device: torch.device) -> None:
    """Release what the allocator keeps for later, which may be too fragmented for the next request."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
