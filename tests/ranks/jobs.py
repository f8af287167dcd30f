"""What the processes of these tests run."""

import torch
import torch.distributed as dist

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.test_families import FAMILIES
from tests.precision import computing_in

WORLD = None


def guidance_of(family, **settings):
    """Two weak branches that fork at different depths."""
    early, late = family.layers
    kinds = family.kinds if len(family.kinds) > 1 else family.kinds * 2
    parts = [Perturbation([(late, early)[n]], kind=kind, scale=1.5 - n) for n, kind in enumerate(kinds[:2])]
    return Guidance(parts, **settings)


def clips(names, prompts=1, dtype="float64", settings=None, **accelerated):
    """By family, a clip that is divided over the processes, and the block-rows that this one computed."""
    made = {}
    with computing_in(getattr(torch, dtype)):
        for name in names:
            family = FAMILIES[name]
            pipe = family.pipe()
            guidance = guidance_of(family, **(settings or {}))
            stgfast.accelerate(pipe, guidance, branches=dist.group.WORLD, **accelerated)
            with family.counted(pipe) as rows:
                clip = family.run(pipe, prompts)
            made[name] = clip, sum(rows)
    return made


def tried(names):
    import traceback
    made = {}
    for name in names:
        try:
            made |= clips([name])
        except Exception:
            made[name] = traceback.format_exc()
    return made
