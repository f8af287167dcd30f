"""Adapters against diffusers: the facts about models, blocks and attention are correct."""

import collections
import inspect
from unittest import mock

import diffusers
import pytest
import torch

from stgfast.batching.arguments import Arguments
from stgfast.integrations import ADAPTERS, known_class
from stgfast.proof.plain import values_alone
from tests import models
from tests.integrations.test_families import FAMILIES

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def layouts(pipe):
    return list(ADAPTERS[type(pipe).__name__].layouts(pipe).values())


def attentions(layout):
    return [module for unit in layout.units for _, module in unit.attentions]


def modules(layout):
    return [*(unit.module for unit in layout.units), *attentions(layout)]


def names(function):
    return set(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def pipes():
    return {name: family.build() for name, family in FAMILIES.items()}


@pytest.mark.xdist_group("pipelines.py")  # these import all pipelines
def test_every_pipeline_has_a_family(pipes):
    """LTX-2 has tests of its own, because it makes its passes itself."""
    tested = {type(pipe).__name__ for pipe in pipes.values()}
    assert {name for name in ADAPTERS if not name.startswith("LTX2")} == tested


def test_other_blocks_inherit_no_facts():
    """The blocks of a modular pipeline call its model, so a subclass needs the same blocks as its parent."""
    parent = diffusers.Wan22ModularPipeline
    assert known_class(type("Mine", (parent,), {})) is parent
    assert known_class(type("Mine", (parent,), {"default_blocks_name": "MyBlocks"})) is None
    assert known_class(diffusers.Wan22VaceModularPipeline) is diffusers.Wan22VaceModularPipeline
    assert known_class(type("Mine", (diffusers.WanPipeline,), {})) is diffusers.WanPipeline


@pytest.mark.xdist_group("pipelines.py")  # these import all pipelines
def test_rows_are_arguments_of_denoiser_block_or_attention(pipes):
    known = collections.defaultdict(set)
    for pipe in pipes.values():
        for layout in layouts(pipe):
            for module in (layout.denoiser, *modules(layout)):
                known[type(pipe).__name__] |= names(type(module).forward)
                known[type(pipe).__name__] |= (
                    names(module.processor.__call__) if hasattr(module, "processor") else set()
                )
    for pipeline, arguments in known.items():
        assert ADAPTERS[pipeline].blocks.rows <= arguments, pipeline
        assert set(ADAPTERS[pipeline].blocks.state) <= ADAPTERS[pipeline].blocks.rows, pipeline


@every
def test_identity_attention_is_attention_that_returns_values(family):
    if "attention" not in family.kinds:
        pytest.skip(f"{family.name} has no attention perturbation")
    pipe = family.build()
    identity = ADAPTERS[type(pipe).__name__].blocks.identity
    compared = []
    for layout in layouts(pipe):
        for attention in attentions(layout):
            forward = attention.forward

            def compare(*args, attention=attention, forward=forward, **kwargs):
                with mock.patch.object(attention, "forward", forward):
                    mine = identity(attention, *args, **kwargs)
                theirs = values_alone(forward, Arguments(attention, args, kwargs))
                both = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
                for one, other in both:
                    torch.testing.assert_close(one, other)
                compared.append(attention)
                return forward(*args, **kwargs)

            attention.forward = compare
    family.run(pipe, 1)
    assert set(compared) == {module for layout in layouts(pipe) for module in attentions(layout)}


MOCHI = FAMILIES["Mochi"]


def test_attend_is_the_models_own_attention():
    """For plain rows, for identity rows, and for several rows of one input."""
    pipe = models.pipeline("mochi", models.transformer("mochi", seed=1))
    adapter = ADAPTERS["MochiPipeline"]
    (layout,) = layouts(pipe)
    assert layout.attend is adapter.blocks.attend
    compared = []

    for attention in attentions(layout):
        forward = attention.forward

        def compare(*args, attention=attention, forward=forward, **kwargs):
            plain, values = forward(*args, **kwargs), values_alone(forward, Arguments(attention, args, kwargs))
            masked, source = [False, True, True, False], [1, 0, 1, 0]
            mine = adapter.blocks.attend(attention, masked, source, *args, **kwargs)
            for one, both in zip(mine, zip(plain, values, strict=True), strict=True):
                expected = torch.stack([both[mask][row] for mask, row in zip(masked, source, strict=True)])
                torch.testing.assert_close(one, expected)
            compared.append(True)
            return plain

        attention.forward = compare
    given = models.prompt("mochi", 2)
    given["prompt_attention_mask"] = torch.rand(given["prompt_attention_mask"].shape) > 0.4  # valid tokens anywhere
    pipe(**given, **models.sizes("mochi", guidance_scale=1.0), generator=models.generators(2))
    assert len(compared) == 4 * layout.depth


def test_attend_gives_way_to_another_processor():
    class Custom(type(models.transformer("mochi").transformer_blocks[0].attn1.processor)):
        pass

    pipe = models.pipeline("mochi")
    pipe.transformer.transformer_blocks[3].attn1.processor = Custom()
    (layout,) = layouts(pipe)
    assert layout.attend is None
