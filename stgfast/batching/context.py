"""Tokens that diffusers shards over processes (context parallelism): between the beginning and the end of a model, each
process has a shard of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.errors import EngineError


def context_of(denoiser: nn.Module) -> Any | None:
    """How a model's tokens are sharded, or None."""
    return getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)


def as_spread(arguments: Arguments) -> Arguments:
    """The arguments as a block uses them: some blocks have hooks that take a shard of the tokens."""
    module = unwrapped(arguments.module)
    registry = getattr(module, "_diffusers_hook", None)
    for name, hook in registry.hooks.items() if registry is not None else ():
        if name.startswith("cp_input"):
            args, kwargs = hook.pre_forward(module, *arguments.args, **arguments.kwargs)
            arguments = Arguments(arguments.module, tuple(args), kwargs)
    return arguments


def over_all(context: Any, tokens: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of tokens along dimension 1 that needs all of them, for a process that has a shard."""
    group = context._flattened_mesh.get_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [tokens // size + (number < tokens % size) for number in range(size)]  # as in `tensor_split`

    def changed(shard: Tensor) -> Tensor:
        if shard.shape[1] != counts[rank]:
            raise EngineError(
                f"tokens of a frame, split over {size} processes: got {shard.shape[1]} on rank {rank}, expected "
                f"{counts[rank]} of the video's {tokens}, and no others"
            )
        padded = shard.new_zeros(shard.shape[0], max(counts), shard.shape[2])
        padded[:, : counts[rank]] = shard
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, group=group)
        whole = torch.cat([one[:, :count] for one, count in zip(every, counts, strict=True)], dim=1)
        return change(whole).tensor_split(size, dim=1)[rank]

    return changed
