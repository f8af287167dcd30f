"""The number of steps of a pipeline, its noise levels, and what it passes to its scheduler."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

CallArguments = Mapping[str, Any]  # the arguments of one pipeline call by name, defaults filled in


def steps_of_pipe(pipe: Any) -> int:
    return int(pipe.num_timesteps)


def steps_of_scheduler(pipe: Any) -> int:
    return len(pipe.scheduler.timesteps)


def steps_of_call(call: CallArguments, strength: str = "") -> int:
    """The number of steps that a call asks for. The argument named by `strength` says which fraction of them is
    made.
    """
    own = next((call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None), None)
    steps = len(own) if own is not None else int(call["num_inference_steps"])
    return min(int(steps * call[strength]), steps) if strength else steps


def schedule_of_call(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    """The call's own timesteps or sigmas, or its number of steps."""
    names = ("timesteps", "sigmas", "num_inference_steps")
    return next({name: call[name]} for name in names if call.get(name) is not None)


def scheduled(pipe: Any, schedule: Mapping[str, Any]) -> Any:
    """A copy of the pipeline's scheduler with the timesteps that it will have."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(**schedule)
    return scheduler


def steps_back(pipe: Any, steps: int) -> frozenset[int]:
    """The coming steps before which a scheduler of `stgfast.restart` adds noise, when it has its timesteps."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "restarts"):
        return frozenset()
    times = [float(time) for time in scheduler.timesteps[-steps:]]
    falls = [later < time for time, later in itertools.pairwise(times)]
    return frozenset(number for number, fall in enumerate(falls, 1) if fall is not falls[-1])


def even_sigmas(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    """Sigmas from 1 down in equal steps, if the call has no sigmas of its own."""
    own, steps = call.get("sigmas"), call["num_inference_steps"]
    return {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1] if own is None else own}


def shifted(pipe: Any, tokens: int, base: int, most: int, low: float, high: float) -> Mapping[str, Any]:
    """mu, on a line through (base, low) and (most, high). The scheduler's configuration may have other points."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    base, most = config.get("base_image_seq_len", base), config.get("max_image_seq_len", most)
    low, high = config.get("base_shift", low), config.get("max_shift", high)
    return {"mu": low + (tokens - base) * (high - low) / (most - base)}


def latent_tokens(pipe: Any, call: CallArguments) -> int:
    """The number of tokens of LTX-Video and LTX-2: one for each position in the latents. LTX-2 has a default for
    frames.
    """
    frames = ((call["num_frames"] or 121) - 1) // pipe.vae_temporal_compression_ratio + 1
    side = pipe.vae_spatial_compression_ratio
    return int(frames * (call["height"] // side) * (call["width"] // side))


def sigmas_of_scheduler(pipe: Any) -> list[float]:
    """The sigmas of a scheduler's steps, without its last one, at which it ends. They are fractions of noise, also
    if the scheduler counts fractions of data.
    """
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[: len(pipe.scheduler.timesteps)]]
    return [1.0 - sigma for sigma in sigmas] if pipe.scheduler.config.get("invert_sigmas") else sigmas


def last_sigmas(pipe: Any, steps: int) -> list[float]:
    """The last sigmas of the scheduler: if a call makes fewer steps than the scheduler has, it leaves out the first
    ones.
    """
    return sigmas_of_scheduler(pipe)[-steps:]
