"""Blurred queries: where rows of one input diverge, and what cannot be blurred."""

import diffusers
import pytest
import torch
from torch import nn

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.batching.layout import Grid
from stgfast.errors import EngineError
from stgfast.integrations import ADAPTERS
from stgfast.proof.plain import blurred
from tests.integrations import test_ltx2
from tests.integrations.families import kandinsky5
from tests.integrations.family import with_blocks
from tests.integrations.test_families import FAMILIES
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

MOCHI = FAMILIES["Mochi"]
# Plain, two blurs, identity and residual, all at one layer.
MIXED = Guidance(
    [
        Perturbation([1, 3], kind="blur", sigma=0.6),
        Perturbation([1], kind="blur", scale=0.5, of="uncond"),
        Perturbation([1], kind="attention", scale=0.5),
        Perturbation([1], scale=0.5),
    ],
    rescale=0.7,
)


def made(family, guidance, prompts=1, **settings):
    return family.run(stgfast.accelerate(family.build(), guidance, **settings), prompts, **family.facts.oblong)


@pytest.mark.parametrize("name", ["Mochi", "CogVideoX", "Stable Video Diffusion", "Flux"])
def test_all_kinds_at_one_layer(name):
    family = FAMILIES[name]
    expected = family.plain(MIXED, 2, **family.facts.oblong)
    same(made(family, MIXED, 2), expected)
    same(made(family, MIXED, 2, max_rows=1), expected)


def test_one_call_for_all_rows_is_left_where_some_are_blurred():
    """That call has one projection for all rows of an input."""
    adapter = with_blocks(ADAPTERS["MochiPipeline"], attend_on=("cpu", "cuda"))
    expected = MOCHI.plain(MIXED, 2, **MOCHI.facts.oblong)
    same(made(MOCHI, MIXED, 2, adapter=adapter), expected)


def test_along_space_is_all_that_there_is():
    family = FAMILIES["Stable Video Diffusion"]
    both, spatial = (Guidance(Perturbation([1], kind="blur", sigma=1.0, axis=axis)) for axis in ("", "spatial"))
    pipe = stgfast.accelerate(family.pipe(), Guidance([*both.perturbations, *spatial.perturbations]))
    assert max(stgfast.explain(pipe, **family.arguments(1)).phases[0].rows) == 3  # one history
    assert torch.equal(made(family, both), made(family, spatial))


@pytest.mark.float32
def test_compiled_blocks():
    guidance = Guidance(Perturbation([1], kind="blur", sigma=0.6))
    pipe = MOCHI.build()
    pipe.transformer.transformer_blocks[1].compile(backend="eager")
    oblong = MOCHI.facts.oblong
    MOCHI.check(MOCHI.run(stgfast.accelerate(pipe, guidance), **oblong), guidance, **oblong)


@pytest.mark.parametrize("sigma", [0.8, float("inf")])
def test_kandinsky_5_seen_from_inside(sigma):
    """Queries are rounded to bfloat16 afterwards, and are too small there to affect predictions."""
    family = kandinsky5.FAMILIES[0]
    pipe = stgfast.accelerate(family.build(), Guidance(Perturbation([1], kind="blur", sigma=sigma)), max_rows="all")
    seen = []
    norm = pipe.transformer.visual_transformer_blocks[1].self_attention.query_norm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(2)))
    family.run(pipe, cfg=False, width=48)
    assert len(seen) == 2 * family.steps[0]  # blurred rows need a call of their own
    for (plain,), (perturbed,) in zip(seen[::2], seen[1::2], strict=True):
        frames = blurred(plain.unflatten(0, (3, 2, 3)), sigma).flatten(0, 2)
        torch.testing.assert_close(perturbed, frames, rtol=0, atol=1e-5)
        assert distance(perturbed, plain) > 0.01


def test_where_tokens_are_not_known():
    with pytest.raises(SettingsError, match="kind of perturbation: got 'blur', expected attention or isolate or resid"):
        stgfast.accelerate(test_ltx2.pipeline(), Guidance(Perturbation([1], kind="blur")))
    family = kandinsky5.FAMILIES[0]
    pipe = kandinsky5.builder(diffusers.Kandinsky5T2VPipeline, attention_type="nabla")()
    stgfast.accelerate(pipe, Guidance(Perturbation([1], kind="blur")))
    with pytest.raises(SettingsError, match="a blur of queries: expected a model of full attention, got nabla"):
        family.run(pipe)


def test_fused_projections():
    pipe = FAMILIES["CogVideoX"].build()
    pipe.fuse_qkv_projections()
    with pytest.raises(SettingsError, match=r"queries at layer 3: got fused projections.*unfuse_qkv_projections"):
        stgfast.accelerate(pipe, Guidance(Perturbation([3], kind="blur")))
    stgfast.accelerate(pipe, Guidance(Perturbation([3])))


def test_queries_that_another_part_makes():
    """An attention whose queries do not come from the part in its adapter must not count as blurred."""
    grid = ADAPTERS["MochiPipeline"].blocks.grid
    adapter = with_blocks(ADAPTERS["MochiPipeline"], grid=Grid(grid.size, query="unused"))
    pipe = MOCHI.build()
    pipe.transformer.transformer_blocks[1].attn1.unused = nn.Identity()
    stgfast.accelerate(pipe, Guidance(Perturbation([1], kind="blur")), adapter=adapter)
    with pytest.raises(EngineError, match="queries made by 'unused': got 0 calls, expected one"):
        MOCHI.run(pipe)
