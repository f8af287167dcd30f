"""Which jobs are rendered together, and how many: those whose calls differ in nothing but prompt, seed and rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from stgfast.integrations.spec import EACH
from stgfast.render.jobs import Job


@dataclass(frozen=True)
class Task:
    """A job in hand."""

    id: int
    file: str
    job: Job
    model: str


@dataclass(frozen=True)
class Batch:
    """Jobs that are rendered in one call. `shape` is what their memory depends on, and where.

    lonely  an actor has nothing else in hand beside it: should it die, it is known of what
    """

    tasks: tuple[Task, ...]
    shape: str
    lonely: bool = False

    def __len__(self) -> int:
        return len(self.tasks)


def stack_of(job: Job, images: str = "") -> str:
    """Jobs with the same are one call of the pipeline, which takes images as its adapter says."""
    data = job.to_dict()
    apart = {name: data.get(name) for name in ("width", "height", "num_frames", "steps", "guidance", "pipeline")}
    apart["negative"] = job.negative_prompt is not None  # pipelines have a negative prompt of their own
    if job.image is not None:
        apart["image"] = "each its own" if images == EACH else job.image_sha256
    return json.dumps(apart, sort_keys=True)


def shape_of(job: Job) -> str:
    """What decides how much memory a clip takes, in short: its size, and how many branches guide it."""
    size = " x ".join("?" if side is None else str(side) for side in (job.num_frames, job.height, job.width))
    branches = "" if job.guidance is None else f", {len(job.guidance.perturbations)} weak"
    return f"{size}{branches}{', image' if job.image else ''}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this, or what caused it, says that memory ran out; on a CPU torch has no class for it."""
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
