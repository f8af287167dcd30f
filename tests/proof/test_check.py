"""`verify`: correct facts pass in every dtype and for changed pipelines; wrong ones are named."""

import contextlib
import importlib.util
import inspect
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from diffusers import hooks
from peft import LoraConfig

import stgfast
from stgfast import EngineError, Guidance, Perturbation, SettingsError
from stgfast.batching.layout import Layout
from stgfast.integrations import ADAPTERS
from tests import precision
from tests.integrations import test_ltx2
from tests.integrations.family import with_blocks
from tests.integrations.test_families import FAMILIES, NEEDS_A_GPU, lowered
from tests.precision import distance, same


def guidance_for(family, **others):
    early, late = family.layers
    parts = [Perturbation([late, early][n:], kind=kind, scale=1.5 - n) for n, kind in enumerate(family.kinds)]
    return Guidance(parts, rescale=0.7, **others)


def verdict_on(pipe, family, **settings):
    return stgfast.verify(pipe, **{**family.arguments(1, cfg=family.cfg is not None), **settings})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_passes(family):
    """In float32 and bfloat16. No comparison comes close to its limit, and the pipeline is unchanged afterwards."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.bfloat16 and family.name.startswith(NEEDS_A_GPU):
            continue
        with precision.computing_in(dtype):
            low = lowered(family, dtype)
            pipe = stgfast.accelerate(low.build(), guidance_for(family))
            before = dict(vars(pipe))
            verdict = verdict_on(pipe, low)
        assert verdict.ok, verdict
        for line in verdict.lines:
            if line.budget:
                precision.within(line.error, line.budget)
        assert len(verdict.lines) >= (4 if family.cfg is None else 5)
        counted = [note for note in verdict.notes if "block-rows ran" in note]
        wanted = sum(family.histories(pipe, guidance_for(family), family.cfg is not None))
        assert sum(int(note.split(": ")[1].split()[0]) for note in counted) == wanted
        assert vars(pipe) == before
        for model in family.denoisers(pipe):
            assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


def test_the_table_is_in_words():
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.pipe(), guidance_for(family))
    said = str(verdict_on(pipe, family))
    assert said.startswith("LTXPipeline: accelerated guidance is equal to the plain method.")
    for what in (
        "uncond",
        "cond",
        "residual, layers 1, 3, scale 1",
        "the prediction passed to the scheduler",
        "at scale 0",
    ):
        assert f"step 1 of 2, pipe.transformer: {what}" in said or what in said


def compiled_blocks(pipe):
    blocks = getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks
    for block in blocks[1:3]:  # the first that is perturbed, and one that is not
        block.compile(backend="eager", fullgraph=True)


class Int8(torch.nn.Linear):
    """Weights as int8 with a scale for each row, as in weight-only quantisation."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.stored.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def int8(pipe):
    for module in [part for part in pipe.transformer.modules() if type(part) is torch.nn.Linear]:
        scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        module.register_buffer("stored", (module.weight.detach() / scale).round().to(torch.int8))
        module.register_buffer("scale", scale)
        module.__class__ = Int8


def quantised(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def with_lora(pipe):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


def offloaded(pipe):
    hooks.apply_group_offloading(pipe.transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


CHANGES = {
    "compiled": compiled_blocks,
    "int8 weights": int8,
    **({"int8 weights of torchao": quantised} if importlib.util.find_spec("torchao") else {}),
    "a LoRA": with_lora,
    "group offload": offloaded,
    "fp8 layerwise casting": cast,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["LTX", "Wan", "CogVideoX"])
def test_a_pipeline_that_was_changed_passes(name, change):
    family = FAMILIES[name]
    pipe = stgfast.accelerate(family.build(), guidance_for(family))
    change(pipe)
    verdict = verdict_on(pipe, family)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", ["LTX", "EasyAnimate", "Mochi"])
def test_a_rescale_of_the_pipelines_own(name):
    """It is no weighted sum, but the formula with the same rescale."""
    family = FAMILIES[name]
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1]), rescale=0.3))
    takes = "guidance_rescale" in inspect.signature(type(pipe).__call__).parameters
    verdict = verdict_on(pipe, family, **({"guidance_rescale": 0.7} if takes else {}))
    assert verdict.ok, verdict
    assert sum("by the formula with rescale 0.7" in line.what for line in verdict.lines) == takes


def test_a_pipeline_that_does_more_than_a_rescale_is_refused():
    """Here the combined prediction gets the norm of the conditional one, which would undo guidance."""
    family = FAMILIES["LTX"]
    module = sys.modules[type(family.pipe()).__module__]

    def normed(combined, cond, guidance_rescale=0.0):
        return combined * cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)

    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1])))
    with mock.patch.object(module, "rescale_noise_cfg", normed):
        verdict = verdict_on(pipe, family, guidance_rescale=0.7)
    assert not verdict.ok
    assert "the pipeline's own step, by the formula with rescale 0.7" in verdict.reason


ASKED = [{"max_rows": 1}, {"max_rows": "all"}, {"attention": "auto"}, {"compile": {"backend": "eager"}}]


@pytest.mark.parametrize("options", ASKED, ids=str)
def test_as_it_is_accelerated(options):
    family = FAMILIES["Mochi"]
    pipe = stgfast.accelerate(family.pipe(), guidance_for(family), **options)
    verdict = verdict_on(pipe, family)
    assert verdict.ok, verdict


def test_schedules_are_checked_where_they_act_most():
    """Here in the last step; the first two run no model."""
    family = FAMILIES["Wan"]
    guidance = Guidance(Perturbation([2], scale=[0.0, 0.0, 1.5]), cfg=[1.0, 2.0, 3.0])
    pipe = stgfast.accelerate(family.build(), guidance)
    ran = []
    pipe.transformer.register_forward_pre_hook(lambda *given: ran.append(True))
    verdict = verdict_on(pipe, family, num_inference_steps=3)
    assert verdict.ok, verdict
    assert all(line.what.startswith("step 3 of 3") for line in verdict.lines)
    assert len(ran) < 16


def test_blur_and_kinds_of_uncond():
    family = FAMILIES["Wan"]
    parts = [Perturbation([1], kind="blur", sigma=0.8), Perturbation([2], of="uncond", base="cond")]
    verdict = verdict_on(stgfast.accelerate(family.pipe(), Guidance(parts)), family)
    assert verdict.ok, verdict
    assert len(verdict.lines) == 6


@pytest.mark.parametrize("prompts", [1, 2])
def test_ltx2_passes(prompts):
    verdict = ltx2_verdict(stgfast.accelerate(test_ltx2.pipeline()), prompts)
    assert verdict.ok, verdict


def ltx2_verdict(pipe, prompts):
    made = {}

    class Given(Exception):
        pass

    def take(**given):
        made.update(given)
        raise Given

    with contextlib.suppress(Given):
        test_ltx2.call(take, prompts)
    return stgfast.verify(pipe, **made)


# Wrong facts


def test_a_mark_that_is_dropped_is_named():
    """The engine leaves out one of two layers."""
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1, 3])))
    marks = Layout.marks
    with mock.patch.object(Layout, "marks", lambda self, part: {n: m for n, m in marks(self, part).items() if n != 3}):
        verdict = verdict_on(pipe, family)
    assert not verdict.ok
    assert verdict.failed[0].what.endswith(": residual, layers 1, 3, scale 1")
    assert verdict.wrong == ("step 1 of 2, pipe.transformer: residual at layer 3 is wrong",)
    assert "NOT equal" in str(verdict)


def test_a_call_without_guidance_has_nothing_to_verify():
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.pipe(), guidance_for(family))
    with pytest.raises(SettingsError, match="got a call without guidance"):
        verdict_on(pipe, family, stg_scale=0.0)


OTHER_PROTOCOL = {"stacked": "sequential", "sequential": "stacked", "embedded": "stacked"}
WRONG = {
    "protocol": lambda a: replace(a, protocol=OTHER_PROTOCOL[a.protocol]),
    "order": lambda a: replace(a, order=a.order[::-1]),
    "a row argument missing": lambda a: with_blocks(a, rows=a.blocks.rows - {"temb"}),
    "another one missing": lambda a: with_blocks(a, rows=a.blocks.rows - {"encoder_hidden_states"}),
    "a row argument too many": lambda a: with_blocks(a, rows=a.blocks.rows | {"image_rotary_emb", "rotary_emb"}),
    "state": lambda a: with_blocks(a, state=a.blocks.state[::-1] if len(a.blocks.state) > 1 else ("temb",)),
    "state with one too many": lambda a: with_blocks(a, state=(*a.blocks.state, "temb")),
    "blocks of another list": lambda a: with_blocks(a, lists=("norm_out",)),
    "float32": lambda a: replace(a, float32=not a.float32),
    "learned sigma": lambda a: replace(a, learned_sigma=True),
    "early": lambda a: replace(a, early=not a.early),
    "the path of attention": lambda a: with_blocks(a, attention="attn2"),
    "full": lambda a: with_blocks(a, full=not a.blocks.full),
    "the scale": lambda a: replace(a, live=lambda pipe, call, denoiser: 2.0),
    "steps": lambda a: replace(a, steps=lambda pipe: 3),
    "denoisers": lambda a: replace(a, denoisers=("vae",)),
    "sample": lambda a: replace(a, sample="timestep"),
}
# The fact that a message names.
NAMED = {
    "protocol": "protocol: the adapter says",
    "learned sigma": "learned_sigma=False gives the right result",
    "the scale": "live: the adapter says that step 1 combines with a scale of 2",
    "steps": "steps: the adapter says 3, the pipeline makes 2",
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["residual", "attention"])
@pytest.mark.parametrize("name", ["LTX", "Wan", "CogVideoX"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_facts_raise_or_do_no_harm(wrong, name, kind):
    family = FAMILIES[name]
    early, late = family.layers
    guidance = Guidance(Perturbation([early, late], kind=kind), rescale=0.7)
    right = ADAPTERS[type(family.pipe()).__name__]
    ran, refused = [], ""
    try:
        pipe = stgfast.accelerate(family.pipe(), guidance, adapter=WRONG[wrong](right))
        made = family.run(pipe, 2, callback_on_step_end=lambda *given: ran.append(True) or {})
    except (EngineError, SettingsError) as error:
        refused = str(error)
    if refused:
        assert not ran, "no step of the call has run"
    else:
        same(made, family.plain(guidance, 2))
    if wrong in NAMED:
        assert NAMED[wrong] in refused


def test_verification_can_be_switched_off():
    """Then a wrong protocol is noticed only at the end of the run."""
    family = FAMILIES["LTX"]
    wrong = replace(ADAPTERS["LTXPipeline"], order=("cond", "uncond"))
    right = family.run(stgfast.accelerate(family.pipe(), guidance_for(family)))
    made = family.run(stgfast.accelerate(family.pipe(), guidance_for(family), adapter=wrong, verify=False))
    assert distance(made, right) > 0.1
    with pytest.raises(EngineError, match="order: the adapter says cond, uncond"):
        family.run(stgfast.accelerate(family.pipe(), guidance_for(family), adapter=wrong))


def test_a_known_pipeline_is_verified_where_it_is_asked_for():
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.build(), guidance_for(family), verify=True)
    ran = []
    pipe.transformer.register_forward_pre_hook(lambda *given: ran.append(True))
    family.run(pipe)
    first = len(ran)
    family.run(pipe)
    assert len(ran) - first == 2 < first
