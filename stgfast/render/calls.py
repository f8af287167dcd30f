"""Jobs as the arguments of one call of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch

from stgfast.installed import installed_on
from stgfast.integrations.clips import EACH
from stgfast.queue.job import Job, read_image

RATES = ("frame_rate", "fps")  # the arguments of calls for frames per second
FRAMES = ("num_frames", "video_length", "frames")  # the arguments of pipelines for the number of frames


def frames_argument(known: Collection[str]) -> str:
    return next(name for name in FRAMES if name in known)


def arguments_of(pipe: Any, jobs: Sequence[Job]) -> dict[str, Any]:
    """The arguments. Each call starts with new generators: one for each job, on the CPU, so that they are the same
    on any machine.
    """
    first = jobs[0]
    known = inspect.signature(type(pipe).__call__).parameters
    frames = frames_argument(known)
    sizes = {"width": first.width, "height": first.height, frames: first.num_frames}
    given = {**sizes, "num_inference_steps": first.steps, "stg": first.guidance}
    call: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    call |= first.pipeline
    of_each: dict[str, list[Any]] = {"generator": [torch.Generator().manual_seed(job.seed) for job in jobs]}
    if "prompt" in known:
        of_each["prompt"] = [job.prompt for job in jobs]
    if first.negative_prompt is not None:
        of_each["negative_prompt"] = [job.negative_prompt for job in jobs]
    if first.image is not None:
        several = len(jobs) > 1 and installed_on(pipe).adapter.clips.images == EACH
        call["image"] = [read_image(str(job.image)) for job in jobs] if several else read_image(first.image)
    # Some pipelines take single values, not lists.
    call |= {name: values if len(jobs) > 1 else values[0] for name, values in of_each.items()}
    return {**call, "output_type": "np"}
