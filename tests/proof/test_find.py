"""With an empty table of pipelines, found facts give the plain method's result, or the call is refused."""

import dataclasses
import logging
from unittest import mock

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError, UnsupportedPipelineError
from stgfast.integrations import ADAPTERS
from stgfast.proof.written import written
from tests.integrations import test_ltx2
from tests.integrations.test_families import FAMILIES
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

GUIDANCE = Guidance(Perturbation([1]))
# Facts that cannot be found, and why.
NOT = {
    "LTX, long": "which nothing on the pipeline says",  # one step less in every window than the pipeline counts
    "CogVideoX from an image": "which nothing that it was called with says",  # a scale of CFG of its own in every step
    "SkyReels-V2 forced, frame after frame": "which no argument of the call says",  # more steps than were asked for
}
# A layer of these has a second self-attention, which a kind also changes: it is not found.
OTHER = {"Stable Diffusion 3": ("residual",), "Wan VACE": ("residual", "attention")}


@pytest.fixture
def empty_table():
    with mock.patch.dict(ADAPTERS, clear=True):
        yield


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_found_gives_the_plain_result(family, empty_table, caplog):
    early, late = family.layers
    kinds = OTHER.get(family.name, family.kinds)
    parts = [Perturbation([late, early][n:], kind=one, scale=1.5 - n) for n, one in enumerate(kinds)]
    guidance = Guidance(parts, rescale=0.7)
    pipe = stgfast.accelerate(family.pipe(), guidance)
    cfg = family.cfg is not None
    if family.name in NOT:
        with pytest.raises(UnsupportedPipelineError, match=NOT[family.name]):
            family.run(pipe, 1, cfg)
        return
    with caplog.at_level(logging.WARNING, "stgfast"):
        made = family.run(pipe, 1, cfg)
    same(made, family.plain(guidance, 1, cfg))
    said = [record.getMessage() for record in caplog.records if record.name == "stgfast"]
    assert len(said) == 1
    assert said[0].startswith(f"{type(family.pipe()).__name__} is not in the table")


def test_what_guides_by_more_than_cfg_is_not_taken_for_it(empty_table):
    pipe = stgfast.accelerate(test_ltx2.pipeline(), GUIDANCE)
    with pytest.raises(UnsupportedPipelineError, match="guides by more than CFG itself"):
        test_ltx2.call(pipe)


def test_a_call_of_another_kind_is_found_anew(empty_table):
    """Facts that are correct for one call may be wrong for another: this one changes its scale in each step."""
    family = FAMILIES["CogVideoX"]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    made = family.run(pipe)
    with pytest.raises(UnsupportedPipelineError, match="which nothing that it was called with says"):
        family.run(pipe, use_dynamic_cfg=True)
    assert torch.equal(family.run(pipe), made)
    longer = {"num_inference_steps": 3}
    same(family.run(pipe, **longer), family.plain(GUIDANCE, **longer))


def test_each_kind_of_call_keeps_its_own_facts(empty_table):
    """The facts of a call without CFG differ from those of a call with it."""
    family = FAMILIES["HunyuanVideo"]
    pipe = stgfast.accelerate(family.pipe(), GUIDANCE)
    with_cfg, without = family.run(pipe), family.run(pipe, cfg=False)
    same(with_cfg, family.plain(GUIDANCE))
    same(without, family.plain(GUIDANCE, cfg=False))
    ran = forwards(family, pipe)
    assert torch.equal(family.run(pipe), with_cfg)
    assert torch.equal(family.run(pipe, cfg=False), without)
    assert len(ran) == 6


def test_calls_that_are_alike_are_looked_over_once(empty_table):
    family = FAMILIES["Wan"]
    pipe = stgfast.accelerate(family.build(), GUIDANCE)
    family.run(pipe)
    ran = forwards(family, pipe)
    embeds = {name: value + 1 for name, value in family.arguments(1).items() if name.endswith("prompt_embeds")}
    family.run(pipe, **embeds, generator=torch.Generator().manual_seed(7))
    assert len(ran) == 4  # cond and uncond, in both steps


def test_a_call_without_guidance_is_not_looked_over(empty_table):
    family = FAMILIES["LTX"]
    stock, pipe = family.pipe(), stgfast.accelerate(family.pipe(), GUIDANCE)
    assert torch.equal(family.run(pipe, stg_scale=0.0), family.run(stock))
    with pytest.raises(SettingsError, match="its facts are found at its first guided call"):
        stgfast.explain(pipe, **family.arguments(1))
    family.run(pipe)
    assert stgfast.explain(pipe, **family.arguments(1)).block_rows > 0
    assert torch.equal(family.run(stgfast.restore(pipe)), family.run(stock))


def test_its_default_is_a_late_layer(empty_table):
    family = FAMILIES["Mochi"]
    pipe = stgfast.accelerate(family.pipe())
    same(family.run(pipe), family.plain(Guidance(Perturbation([4]))))


def forwards(family, pipe):
    """Counts the calls of the denoiser from now on."""
    ran = []
    for model in family.denoisers(pipe):
        model.register_forward_pre_hook(lambda *given: ran.append(True))
    return ran


@pytest.mark.parametrize("name", ["LTX", "Wan", "HunyuanVideo", "Stable Video Diffusion"])
def test_looking_costs_one_step_and_touches_nothing_else(name):
    family = dataclasses.replace(FAMILIES[name], shared=False)
    pipe = family.pipe()
    ran, before = forwards(family, pipe), dict(vars(pipe))
    given = family.arguments(1)
    states = [generator.get_state() for generator in given["generator"]]
    random = torch.get_rng_state()
    touched = mock.Mock(side_effect=AssertionError("a file, or the network"))
    with mock.patch("builtins.open", touched), mock.patch("socket.socket.connect", touched):
        adapter = stgfast.Adapter.of(pipe, **given)
    calls = 1 if adapter.protocol == "stacked" else 2
    assert len(ran) == calls
    assert vars(pipe) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(given["generator"], states, strict=True))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_said_is_python_that_makes_it(family):
    if family.name in NOT:
        pytest.skip("its facts are not found")
    adapter = stgfast.Adapter.of(family.pipe(), **family.arguments(1, cfg=family.cfg is not None))
    names = {}
    exec(written(adapter), names)
    assert written(names["adapter"]) == written(adapter)
    assert names["adapter"].pipeline == adapter.pipeline
