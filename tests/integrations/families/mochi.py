"""Mochi: a list of blocks, a stacked call, text tokens in the blocks."""

import diffusers

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, first_two, lying


def build(other=False):
    # As released, with sigmas that are fractions of data.
    released = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler = diffusers.FlowMatchLCMScheduler() if other else released
    return models.pipeline("mochi", models.transformer("mochi", seed=1), scheduler=scheduler)


def arguments(prompts, cfg=True):
    sizes = models.sizes("mochi", num_inference_steps=2, guidance_scale=4.0 if cfg else 1.0)
    return {**sizes, **models.prompt("mochi", prompts), "generator": models.generators(prompts)}


FAMILIES = [
    Family(
        "Mochi",
        build,
        arguments,
        Facts(stacked=True, unchanged=first_two, oblong={"width": 48}, lies=lying((2, 2, 3))),
        cfg=4.0,
    )
]
