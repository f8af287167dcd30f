"""A step whose branches are divided over processes: its time, the plan's prediction, and what is sent.

torchrun starts the processes. Each number of ranks takes turns, using the first of them while the others wait. All must
agree before anything is timed. A step takes as long as on its slowest rank; on a CPU this is processor time, without
waiting.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from stgfast.bench.measure import agreeing, result, rounds_of, significant
from stgfast.bench.models import DTYPES, MODELS
from stgfast.bench.steps import ALLOWED
from stgfast.bench.variants import Bench
from stgfast.errors import wrong
from stgfast.explained import Explanation
from stgfast.ranks.wire import device_of, joined, ranks_of


def begin(device: str) -> bool:
    """Join the processes that torchrun started. Returns whether this is the first, which prints."""
    if not dist.is_torchelastic_launched():
        raise wrong("--ranks", "one process", "several: torchrun --nproc-per-node N -m stgfast.cli bench --ranks")
    return joined(device_of(device)).rank == 0


def over_ranks(name: str, *, size: str, device: str, steps: int | None, rounds: int) -> dict[str, Any]:
    rank, most = dist.get_rank(), dist.get_world_size()
    alone = Bench(MODELS[name], size, device, steps)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, most + 1)}
    benches = {count: _divided(alone, groups[count]) for count in groups if rank < count}
    makes = alone.arguments()["num_inference_steps"]

    clips: dict[int, Any] = {}
    received = {}
    for count, group in groups.items():
        dist.barrier()
        if count in benches:
            ranks = ranks_of(group)
            before = ranks.received
            clips[count] = benches[count].stgfast()  # also the warm-up
            received[count] = (ranks.received - before) // makes
    distances = agreeing(
        name, {str(count): clip for count, clip in clips.items()}, str(min(clips)), ALLOWED[DTYPES[size]]
    )

    def longest(count: int) -> float:
        dist.barrier()
        return float(max(_of_all(benches[count].timed("stgfast").step if count in benches else 0.0)))

    taken = rounds_of({count: partial(longest, count) for count in groups}, rounds)
    seconds = {count: statistics.median(times) for count, times in taken.items()}
    explained = alone.explained()
    planned = {count: _planned(replace(explained, ranks=count)) for count in groups}
    return result(
        "ranks",
        device,
        model=name,
        size=size,
        steps=makes,
        rounds=rounds,
        ranks=most,
        seconds={count: significant(value) for count, value in seconds.items()},
        over_one={count: significant(value / seconds[1]) for count, value in seconds.items()},
        predicted={count: significant(max(loads) / max(planned[1])) for count, loads in planned.items()},
        block_rows=planned,
        received={count: [one for one in _of_all(received.get(count)) if one is not None] for count in groups},
        distance=distances,
    )


def _divided(bench: Bench, group: Any) -> Bench:
    other = copy.copy(bench)
    other.branches = group
    return other


def _planned(explained: Explanation) -> list[float]:
    """The block-rows of each rank in a step."""
    steps = sum(phase.steps for phase in explained.phases)
    loads = [0.0] * explained.ranks
    for phase in explained.phases:
        for times, plans in phase.kinds:
            division = explained.division(plans)
            loads = [load + times * division.load(rank) / steps for rank, load in enumerate(loads)]
    return [significant(load) for load in loads]


def _of_all(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
