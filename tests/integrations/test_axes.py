"""Models with attention along two axes, perturbed along one, the other or both."""

import inspect

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.integrations import ADAPTERS
from tests.integrations.families import latte, stable_video_diffusion
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {family.name: family for module in (latte, stable_video_diffusion) for family in module.FAMILIES}
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
AXES = {
    "spatial": ["spatial"],
    "temporal": ["temporal"],
    "both": ["spatial", "temporal"],
    "whole and one": ["", "temporal"],
}


def along(axes, layers, kind="attention"):
    return Guidance([Perturbation(layers, kind=kind, scale=1.5 - n, axis=axis) for n, axis in enumerate(axes)])


@every
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_an_axis_equals_the_plain_method(family, axes, prompts):
    def clip(axes):
        return family.run(stgfast.accelerate(family.pipe(), along(axes, family.layers)), prompts)

    made = clip(axes)
    same(made, family.plain(along(axes, family.layers), prompts))
    assert all(distance(clip(other), made) > 1e-3 for other in AXES.values() if other != axes)


@every
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_no_history_along_an_axis_runs_twice(family, axes):
    guidance = along(axes, family.layers[1:])
    stock, pipe = family.pipe(), family.pipe()
    with family.counted(stock) as one:
        family.run(stock, 2)
    stgfast.accelerate(pipe, guidance)
    with family.counted(pipe) as guided:
        family.run(pipe, 2)
    wanted = family.histories(pipe, guidance, True)
    assert [2 * made for made in guided] == [count * per for count, per in zip(wanted, one, strict=True)]
    assert max(wanted) == 2 + len(axes)


@every
def test_max_rows_along_axes(family):
    guidance = along(AXES["both"], family.layers)
    expected = family.run(stgfast.accelerate(family.pipe(), guidance), 2)
    same(family.run(stgfast.accelerate(family.pipe(), guidance, max_rows=1), 2), expected)


@every
def test_every_argument_with_rows_for_every_sample_is_known(family):
    """Observed inside the modules: with 5 samples and no CFG, arguments with a multiple of 5 rows are per row."""
    pipe = family.build()
    adapter = ADAPTERS[type(pipe).__name__]
    (layout,) = adapter.layouts(pipe).values()
    attentions = [module for unit in layout.units for _, module in unit.attentions]
    found = set()

    def look(module, args, kwargs):
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            if isinstance(value, torch.Tensor) and value.ndim and len(value) % 5 == 0:
                found.add(name)

    for module in (layout.denoiser, *(unit.module for unit in layout.units), *attentions):
        module.register_forward_pre_hook(look, with_kwargs=True)
    family.run(pipe, 5, cfg=False)
    assert found <= adapter.blocks.rows
    assert found >= {adapter.sample, *adapter.blocks.state}
