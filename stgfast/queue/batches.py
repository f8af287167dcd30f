"""Which jobs are rendered together, and how many: those whose calls differ only in prompt, seed and rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from stgfast.queue.job import Job

EACH = "each"  # a pipeline's call takes images as a list, one for each clip


@dataclass(frozen=True)
class Task:
    """A claimed job."""

    id: int
    file: str
    job: Job
    model: str


@dataclass(frozen=True)
class Batch:
    """Jobs that are rendered in one call.

    Attributes:
        shape: what the memory of a clip depends on, beside the device.
        lonely: the process that renders it has no other batch, so that the cause is known if the process dies.
        limit: the seconds that the batch may take; None if nothing is known yet, and then `quiet` applies.
        quiet: the seconds that the batch may take without progress.
    """

    tasks: tuple[Task, ...]
    shape: str
    lonely: bool = False
    limit: float | None = None
    quiet: float | None = None

    def __len__(self) -> int:
        return len(self.tasks)


def takes_more(batches: Iterable[Batch], most: int) -> bool:
    """Whether a process with these batches takes another one: not beside a lonely batch, and only up to a number."""
    there = list(batches)
    return len(there) < most and not any(batch.lonely for batch in there)


def stack_of(job: Job, images: str = "") -> str:
    """A key: jobs with the same key can be one call of the pipeline, which takes images as its adapter says."""
    data = job.to_dict()
    apart = {name: data.get(name) for name in ("width", "height", "num_frames", "steps", "guidance", "pipeline")}
    apart["negative"] = job.negative_prompt is not None  # pipelines have a default negative prompt
    if job.solver:
        apart["solver"] = job.solver
    if job.loras:
        apart["loras"] = [[lora.sha256, lora.weight, lora.second] for lora in job.loras]
    if job.image is not None:
        apart["image"] = "each its own" if images == EACH else job.image_sha256
    return json.dumps(apart, sort_keys=True)


def shape_of(job: Job) -> str:
    """A key for the memory that a clip needs: its size, and the number of branches."""
    size = " x ".join("?" if side is None else str(side) for side in (job.num_frames, job.height, job.width))
    branches = "" if job.guidance is None else f", {len(job.guidance.perturbations)} weak"
    return f"{size}{branches}{', image' if job.image else ''}"
