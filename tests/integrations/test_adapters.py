"""Adapters against diffusers itself: what they say of models, blocks and attention is so."""

import inspect

import pytest
import torch

from stgfast.integrations import ADAPTERS
from tests import models
from tests.oracle import _identity as oracle_identity

PIPELINES = {models.index()["models"][family]["pipeline"]: family for family in models.FAMILIES}


def only(layouts):
    (layout,) = layouts.values()
    return layout


def attentions(layout):
    return [module for unit in layout.units for _, module in unit.attentions]


def modules(layout):
    return [*(unit.module for unit in layout.units), *attentions(layout)]


def names(function):
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("pipeline", ADAPTERS)
def test_rows_are_arguments_of_denoiser_block_or_attention(pipeline):
    adapter = ADAPTERS[pipeline]
    layout = only(adapter.layouts(models.pipeline(PIPELINES[pipeline])))
    known = names(type(layout.denoiser).forward)
    for module in modules(layout):
        known |= names(type(module).forward)
        known |= names(module.processor.__call__) if hasattr(module, "processor") else set()
    assert adapter.rows <= known
    assert set(adapter.state) <= adapter.rows


@pytest.mark.parametrize("pipeline", ADAPTERS)
def test_every_argument_with_a_row_for_every_sample_is_known(pipeline):
    """Seen from inside of the modules: with 5 prompts and no CFG, what has 5 rows is per row."""
    adapter, family = ADAPTERS[pipeline], PIPELINES[pipeline]
    pipe = models.pipeline(family)
    layout = only(adapter.layouts(pipe))
    found = set()

    def look(module, args, kwargs):
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            first = value[0] if isinstance(value, tuple) else value
            if isinstance(first, torch.Tensor) and first.ndim and first.shape[0] == 5:
                found.add(name)

    for module in (layout.denoiser, *modules(layout)):
        module.register_forward_pre_hook(look, with_kwargs=True)
    pipe(**models.prompt(family, 5), **models.sizes(family, guidance_scale=1.0), generator=models.generators(5))
    assert found <= adapter.rows
    assert found >= set(adapter.state)


@pytest.mark.parametrize("pipeline", ADAPTERS)
def test_identity_attention_is_attention_that_returns_values(pipeline):
    adapter, family = ADAPTERS[pipeline], PIPELINES[pipeline]
    pipe = models.pipeline(family, models.transformer(family, seed=1))
    layout = only(adapter.layouts(pipe))
    compared = []

    for attention in attentions(layout):
        forward = attention.forward

        def compare(*args, attention=attention, forward=forward, **kwargs):
            mine = adapter.identity(attention, *args, **kwargs)
            theirs = oracle_identity(forward)(*args, **kwargs)
            both = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
            for one, other in both:
                torch.testing.assert_close(one, other)
            compared.append(True)
            return forward(*args, **kwargs)

        attention.forward = compare
    pipe(**models.prompt(family, 2), **models.sizes(family, guidance_scale=1.0), generator=models.generators(2))
    assert len(compared) == 4 * layout.depth


@pytest.mark.parametrize("pipeline", [name for name, adapter in ADAPTERS.items() if adapter.attend])
def test_attend_is_the_models_own_attention(pipeline):
    """For plain rows, for identity rows, and for several rows of one input."""
    adapter, family = ADAPTERS[pipeline], PIPELINES[pipeline]
    pipe = models.pipeline(family, models.transformer(family, seed=1))
    layout = only(adapter.layouts(pipe))
    assert layout.attend is adapter.attend
    compared = []

    for attention in attentions(layout):
        forward = attention.forward

        def compare(*args, attention=attention, forward=forward, **kwargs):
            plain, values = forward(*args, **kwargs), oracle_identity(forward)(*args, **kwargs)
            masked, source = [False, True, True, False], [1, 0, 1, 0]
            mine = adapter.attend(attention, masked, source, *args, **kwargs)
            for one, both in zip(mine, zip(plain, values, strict=True), strict=True):
                expected = torch.stack([both[mask][row] for mask, row in zip(masked, source, strict=True)])
                torch.testing.assert_close(one, expected)
            compared.append(True)
            return plain

        attention.forward = compare
    given = models.prompt(family, 2)
    given["prompt_attention_mask"] = torch.rand(given["prompt_attention_mask"].shape) > 0.4  # valid tokens anywhere
    pipe(**given, **models.sizes(family, guidance_scale=1.0), generator=models.generators(2))
    assert len(compared) == 4 * layout.depth


def test_attend_gives_way_to_another_processor():
    class Custom(type(models.transformer("mochi").transformer_blocks[0].attn1.processor)):
        pass

    pipe = models.pipeline("mochi")
    pipe.transformer.transformer_blocks[3].attn1.processor = Custom()
    assert only(ADAPTERS["MochiPipeline"].layouts(pipe)).attend is None
