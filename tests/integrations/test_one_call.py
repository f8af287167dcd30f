"""One attention for all rows of a marked layer, for any attention class, in Triton's interpreter."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.engine import Run
from stgfast.integrations import ADAPTERS
from tests import precision
from tests.integrations.test_families import FAMILIES, NEEDS_A_GPU, lowered
from tests.launches import launched

pytestmark = pytest.mark.interpreted
ATTENDING = {name: family for name, family in FAMILIES.items() if "attention" in family.kinds}
every = pytest.mark.parametrize("family", ATTENDING.values(), ids=ATTENDING)
# One family for each protocol, with and without a stack between blocks, with and without more rows in a block.
SOME = {name: ATTENDING[name] for name in ("LTX", "Wan", "Mochi", "CogVideoX", "Stable Diffusion XL", "modular LTX")}

# Each place in a frame is a row of its attention in time.
SMALL = {"Latte": {"num_inference_steps": 1}}


@contextmanager
def steps_done():
    """The number of steps of each run that ends."""
    done, finish = [], Run.finish

    def finished(run):
        done.append(run.steps_done)
        finish(run)

    with mock.patch.object(Run, "finish", finished):
        yield done


def marked(pipe, layers):
    """The number of self-attentions in these layers of a pipeline's denoisers; if there are two denoisers, both have
    the same.
    """
    layouts = ADAPTERS[type(pipe).__name__].layouts(pipe).values()
    (count,) = {sum(len(unit.attentions) for unit in layout.units if unit.layer in layers) for layout in layouts}
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@every
def test_one_launch_for_every_marked_attention(family, dtype):
    if dtype is torch.float16 and family.name.startswith(NEEDS_A_GPU):
        pytest.skip(f"needs a GPU: a layer of {family.name} has no float16 on a CPU")
    early, late = family.layers
    guidance = Guidance([Perturbation([late], kind="attention"), Perturbation([early, late], kind="attention")])
    cfg, small = family.cfg is not None, SMALL.get(family.name, {})
    with precision.computing_in(torch.float64):
        exact = family.plain(guidance, 1, cfg, **small)
    with precision.computing_in(dtype):
        low = lowered(family, dtype)
        plain = low.plain(guidance, 1, cfg, **small)
        pipe = stgfast.accelerate(low.build(), guidance, max_rows="all")
        with launched() as launches, steps_done() as steps:
            made = low.run(pipe, 1, cfg, **small)
    precision.no_worse(made, plain, exact)
    assert len(launches) == marked(pipe, family.layers) * sum(steps)
    assert all(0 < masked < rows for rows, masked in launches)


@pytest.mark.parametrize("family", SOME.values(), ids=SOME)
def test_however_many_branches_and_prompts(family):
    pipe, cfg = family.pipe(), family.cfg is not None
    layer = family.layers[1]
    counts = []
    for branches, prompts in ((1, 1), (1, 2), (3, 2)):
        parts = [Perturbation([layer - n, layer], kind="attention") for n in range(branches)]
        stgfast.accelerate(pipe, Guidance(parts), max_rows="all")
        with launched() as launches, steps_done() as steps:
            family.run(pipe, prompts, cfg)
        layers = {number for part in parts for number in part.layers}
        counts.append(len(launches) / sum(steps) / marked(pipe, layers))
    assert counts == [1, 1, 1]
