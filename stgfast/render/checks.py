"""What a model cannot do of a job, known before its weights are loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import re
from typing import Any

from stgfast.batching.execution import AS_IT_IS
from stgfast.errors import SettingsError, wrong
from stgfast.installed import Installed, bound_call, settled
from stgfast.queue.batches import stack_of
from stgfast.queue.job import Job
from stgfast.render.calls import RATES, arguments_of, frames_argument
from stgfast.render.loras import lacking
from stgfast.render.models import Model
from stgfast.solvers import SOLVERS, check_solver

# The attributes of pipelines for the number of frames per latent frame.
STEPS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_frame_scale_factor")
CHECKED = 10_000  # number of remembered calls


def check(model: Model, job: Job) -> None:
    """Raise if this pipeline cannot do a job."""
    job = model.completed(job)
    _check_fields(model, job)
    key = f"{stack_of(job)} {bool(job.prompt)} {json.dumps(job.recipe)}"
    if key not in model.checked:  # most jobs only differ in prompt and seed
        _check_values(model, job)
        _own_check(model, job)
        _check_frames(model, job)
        settled_job = model.settled(job)
        _check_solver(model, settled_job.solver)
        try:
            _check_call(model, settled_job)
        except SettingsError as error:
            if job.guidance is not None or model.given is not None:
                raise
            raise SettingsError(f"guidance: got none, and the default does not fit this model: {error}") from None
        if len(model.checked) > CHECKED:
            model.checked.clear()
        model.checked.add(key)


def _check_fields(model: Model, job: Job) -> None:
    kind, known = model.kind.__name__, model.parameters
    lacks = lacking(model.kind, job.loras)
    if lacks:
        raise wrong("loras", len(job.loras), lacks)
    for name in ("image", "negative_prompt", "width", "height"):
        value = getattr(job, name)
        if value is not None and name not in known:
            raise wrong(name, value[:60] if isinstance(value, str) else value, f"none: {kind} takes none")
    if job.image is None and model.needs_image:
        raise wrong("image", None, f"one: {kind} begins with an image")
    if job.negative_prompt is None and model.adapter.clips.negative:
        raise wrong("negative_prompt", None, f"one, if an empty one: {kind} fails without")
    for name in job.pipeline:
        if name not in known or name in ("self", "args", "kwargs"):
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or ", ".join(known)
            raise wrong("pipeline", name, f"an argument of {kind}, such as {near}")


def _check_values(model: Model, job: Job) -> None:
    """Raise if further arguments of the call have the wrong type."""
    for name, value in job.pipeline.items():
        parameter = model.parameters[name]
        default = parameter.default
        if _takes_tensors_alone(parameter):
            raise wrong("pipeline", name, "an argument that is no tensor: a job has plain values")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise wrong(f"pipeline, {name}", value, "true or false")
        elif isinstance(default, int | float) and not number and not (value is None or isinstance(value, list)):
            raise wrong(f"pipeline, {name}", value, f"a number, such as {default}")
        elif isinstance(default, str) and not isinstance(value, str):
            raise wrong(f"pipeline, {name}", value, f"text, such as {default!r}")
        if name in RATES and number and not 0.1 <= value <= 240:
            raise wrong(f"pipeline, {name}", value, "frames in a second, from 0.1 to 240")


def _check_frames(model: Model, job: Job) -> None:
    """Raise for a number of frames that would be rounded silently: the VAE makes several frames from one, except for
    the first, and the pipeline's own number has that form.
    """
    pipe, asked = model.skeleton, job.num_frames
    if pipe is None or asked is None:
        return
    step = next((value for name in STEPS if isinstance(value := getattr(pipe, name, None), int)), 1)
    own = model.parameters[frames_argument(model.parameters)].default
    if step > 1 and isinstance(own, int) and (own - 1) % step == 0 and (asked - 1) % step:
        below = (asked - 1) // step * step + 1
        raise wrong("num_frames", asked, f"{below} or {below + step}, as {model.kind.__name__} makes them")


def _check_solver(model: Model, name: str) -> None:
    if name and getattr(model.skeleton, "scheduler", None) is not None:
        check_solver(model.skeleton, name)
    elif name and name not in SOLVERS:
        raise wrong("solver", name, f"one of {', '.join(SOLVERS)}")


def _check_call(model: Model, job: Job) -> None:
    """The engine's own check of the call."""
    pipe = model.skeleton
    if pipe is None:
        return
    installed = Installed(model.adapter, job.guidance, AS_IT_IS, None, model.kind)
    call = arguments_of(pipe, [dataclasses.replace(job, image=None, image_sha256=None, prompt=job.prompt or " ")])
    given = {"stg": call.pop("stg")} if "stg" in call else {}
    bound = bound_call(installed, inspect.signature(model.kind.__call__).bind_partial, pipe, **call)
    settled(pipe, installed, bound.arguments, given)


def _own_check(model: Model, job: Job) -> None:
    """The pipeline's own check of its arguments, as far as it works without weights."""
    checks = getattr(model.kind, "check_inputs", None)
    if checks is None:
        return
    frames = frames_argument(model.parameters)
    call = {name: p.default for name, p in model.parameters.items() if p.default is not p.empty}
    given = {"width": job.width, "height": job.height, frames: job.num_frames, "num_inference_steps": job.steps}
    call |= {name: value for name, value in given.items() if value is not None}
    call |= {**job.pipeline, "prompt": job.prompt, "negative_prompt": job.negative_prompt}
    call |= {"image": None if job.image is None else _placeholder()}
    taken = list(inspect.signature(checks).parameters)[1:]
    try:
        checks(
            model.skeleton or object.__new__(model.kind),
            **{name: value for name, value in call.items() if name in taken},
        )
    except ValueError as error:
        raise SettingsError(f"{model.kind.__name__}: {error}") from None
    except (AttributeError, TypeError):
        # It needs weights: the call itself checks this again.
        return


def _takes_tensors_alone(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    words = set(re.findall(r"\w+", annotation.__name__ if isinstance(annotation, type) else str(annotation)))
    tensors = {"Tensor", "FloatTensor", "LongTensor"}
    return bool(words & tensors) and words <= tensors | {
        "torch",
        "None",
        "NoneType",
        "list",
        "List",
        "Optional",
        "Union",
    } | {"typing"}


@functools.cache
def _placeholder() -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16))
