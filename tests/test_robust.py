"""Changes to a pipeline by users and other libraries: guidance still acts, or the call is refused in one sentence."""

import copy
import functools
import inspect
import io
import pickle
import types
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from accelerate.utils import compile_regions
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig

import stgfast
from stgfast import BySigma, EngineError, Guidance, Perturbation, SettingsError, UnsupportedPipelineError
from stgfast.integrations import ADAPTERS
from tests import models
from tests.integrations.families import cogvideox, images, ltx, mochi, wan
from tests.integrations.family import with_blocks
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

LTX, WAN, COGVIDEOX, MOCHI = ltx.FAMILIES[0], wan.FAMILIES[0], cogvideox.FAMILIES[0], mochi.FAMILIES[0]
SD3, FLUX, SDXL = images.FAMILIES
RESIDUAL, ATTENTION = Guidance(Perturbation([2])), Guidance(Perturbation([2], kind="attention"))


# Compiled blocks


COMPILED = (1, 2)  # the perturbed block, and the one before it


def compiled_forwards(blocks):
    for number in COMPILED:
        blocks[number].forward = torch.compile(blocks[number].forward, backend="eager")


def compiled_blocks(blocks):
    for number in COMPILED:
        blocks[number] = torch.compile(blocks[number], backend="eager")


def compiled_attentions(blocks):
    for number in COMPILED:
        blocks[number].attn1 = torch.compile(blocks[number].attn1, backend="eager")


@pytest.mark.float32
@pytest.mark.parametrize("guidance", [RESIDUAL, ATTENTION], ids=["residual", "attention"])
@pytest.mark.parametrize("how", [compiled_forwards, compiled_blocks, compiled_attentions])
@pytest.mark.parametrize("family", [LTX, WAN], ids=lambda family: family.name)
def test_blocks_compiled_in_other_ways(family, how, guidance):
    torch.compiler.reset()
    pipe = family.build()
    how(pipe.transformer.transformer_blocks if family is LTX else pipe.transformer.blocks)
    family.check(family.run(stgfast.accelerate(pipe, guidance)), guidance)


@pytest.mark.float32
@pytest.mark.parametrize("kind", ["attention", "blur"])
def test_blocks_compiled_inside_of_a_layer(kind):
    """A layer of SDXL is a transformer; diffusers compiles each block in it."""
    torch.compiler.reset()
    pipe = SDXL.build()
    pipe.unet.compile_repeated_blocks(backend="eager")
    guidance = Guidance(Perturbation([3], kind=kind, scale=3.0))
    given = SDXL.facts.oblong if kind == "blur" else {}
    SDXL.check(SDXL.run(stgfast.accelerate(pipe, guidance), **given), guidance, **given)


@pytest.mark.float32
def test_regions_compiled_by_accelerate_stay_compiled():
    torch.compiler.reset()
    runs = []

    def backend(graph, inputs):
        return lambda *args: (runs.append(graph), graph(*args))[1]

    pipe = WAN.build()
    pipe.transformer = compile_regions(pipe.transformer, backend=backend)
    WAN.run(pipe)
    stock = len(runs)
    runs.clear()
    WAN.check(WAN.run(stgfast.accelerate(pipe, RESIDUAL, max_rows="all")), RESIDUAL)
    assert len(runs) == stock


@pytest.mark.again
@pytest.mark.float32
def test_a_unet_of_several_widths_compiled_whole():
    """Its blocks are compiled one by one: there are more kinds of them than torch.compile allows for one function."""
    torch.compiler.reset()
    widths = {"block_out_channels": (32, 64, 96), "attention_head_dim": (2, 4, 6)}
    unet = diffusers.UNet2DConditionModel(
        layers_per_block=2,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=72,
        cross_attention_dim=16,
        **widths,
    )
    pipe = SDXL.build()
    pipe.unet = torch.compile(unet.eval(), backend="eager", fullgraph=True)
    SDXL.run(stgfast.accelerate(pipe, Guidance(Perturbation([4], kind="attention"))), height=16, width=16)


def test_a_forward_compiled_whole_is_refused():
    pipe = WAN.build()
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")
    with pytest.raises(SettingsError, match=r"use pipe\.transformer = torch\.compile\(pipe\.transformer\)"):
        stgfast.accelerate(pipe, RESIDUAL)


def test_a_block_that_goes_around_its_attention_raises():
    pipe = LTX.build()
    for block in pipe.transformer.transformer_blocks:
        attention = block.attn1
        block.attn1.__class__ = type(
            "Other", (type(attention),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
        )
    with pytest.raises(EngineError, match="attention of block 2: got a block that ran without a call of Other"):
        LTX.run(stgfast.accelerate(pipe, ATTENTION))


# Runs that are not guided to their end


def test_a_model_that_is_exchanged_during_a_call_raises():
    pipe, other = stgfast.accelerate(WAN.build(), RESIDUAL), wan.transformer(7)

    def exchange(pipe, step, time, tensors):
        pipe.transformer = other
        return {}

    with pytest.raises(EngineError, match=r"guided steps: got 1 steps, expected 4; was pipe\.transformer replaced"):
        WAN.run(pipe, num_inference_steps=4, callback_on_step_end=exchange)


def test_a_model_that_is_not_called_as_a_module_raises():
    pipe = WAN.build()
    cls = type(pipe.transformer)
    pipe.transformer.__class__ = type("Other", (cls,), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(EngineError, match="guided steps: got 0 steps, expected 2"):
        WAN.run(stgfast.accelerate(pipe, RESIDUAL))


def test_wrong_facts_of_an_adapter():
    adapter = ADAPTERS["LTXPipeline"]
    wrong = replace(adapter, protocol="sequential")
    with pytest.raises(EngineError, match="guided steps: got 1 steps, expected 2"):
        LTX.run(stgfast.accelerate(LTX.pipe(), RESIDUAL, adapter=wrong, verify=False))
    two = next(family for family in wan.FAMILIES if family.name == "Wan of two transformers")
    one = replace(ADAPTERS["WanPipeline"], denoisers=("transformer",))
    with pytest.raises(EngineError, match="guided steps: got 1 steps, expected 2"):
        two.run(stgfast.accelerate(two.pipe(), RESIDUAL, adapter=one, verify=False))
    with pytest.raises(SettingsError, match="protocol of an adapter: got 'stackd', expected one of stacked"):
        replace(adapter, protocol="stackd")
    with pytest.raises(SettingsError, match="lists of a model's blocks: got 'transformer_blocks', expected a tuple"):
        with_blocks(adapter, lists="transformer_blocks")
    with pytest.raises(SettingsError, match="blocks of an adapter: got 'transformer_blocks', expected a Blocks"):
        replace(adapter, blocks="transformer_blocks")
    with pytest.raises(SettingsError, match=r"sample of an adapter: got 'sample', expected an argument of LTX"):
        stgfast.accelerate(LTX.pipe(), RESIDUAL, adapter=replace(adapter, sample="sample"))


@pytest.mark.float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_that_copies_what_it_was_handed(dtype):
    """Before its second call, so a tensor that is filled in later is not used."""
    pipe = WAN.build()
    pipe.transformer.to(dtype)
    embeds = {name: value.to(dtype) for name, value in WAN.arguments(1).items() if name.endswith("prompt_embeds")}
    expected = WAN.run(stgfast.accelerate(pipe, RESIDUAL), **embeds)
    copying = lambda self, *a, **k: tuple(x.clone() for x in super(type(self), self).__call__(*a, **k))  # noqa: E731
    pipe.transformer.__class__ = type("Copying", (type(pipe.transformer),), {"__call__": copying})
    made = WAN.run(pipe, **embeds)
    assert distance(made, expected) < 40 * torch.finfo(dtype).eps
    assert distance(made, WAN.run(pipe, stg_scale=0.0, **embeds)) > 1e-2


# Classes


def test_what_is_made_of_an_accelerated_pipeline_is_the_original():
    pipe, stock = stgfast.accelerate(LTX.pipe(), RESIDUAL), LTX.pipe()
    expected = LTX.run(stock)
    for made in (type(pipe)(**pipe.components), type(pipe).from_pipe(pipe)):
        made.set_progress_bar_config(disable=True)
        assert type(made) is type(stock)
        assert torch.equal(LTX.run(made), expected)
        assert torch.equal(LTX.run(stgfast.accelerate(made, RESIDUAL), stg_scale=0.0), expected)
        assert torch.equal(LTX.run(stgfast.restore(made)), expected)
    LTX.check(LTX.run(pipe), RESIDUAL)


def test_nothing_leads_around_the_guidance():
    pipe = stgfast.accelerate(LTX.pipe(), RESIDUAL)
    call = type(pipe).__call__
    assert inspect.unwrap(call) is call
    other = stgfast.accelerate(LTX.pipe(), RESIDUAL)
    type(pipe).__call__ = lambda self, *args, **kwargs: "another"
    assert pipe() == "another"
    LTX.check(LTX.run(other), RESIDUAL)  # the class of an accelerated pipeline is its own


def test_a_pipeline_pickles_and_comes_back_accelerated():
    pipe = stgfast.accelerate(LTX.pipe(), ATTENTION, max_rows=2)
    expected = LTX.run(pipe)
    back = pickle.load(io.BytesIO(pickle.dumps(pipe)))
    assert torch.equal(LTX.run(back), expected)
    assert type(stgfast.restore(back)) is diffusers.LTXPipeline
    for adapter in ADAPTERS.values():
        assert pickle.loads(pickle.dumps(adapter)).pipeline == adapter.pipeline


def test_a_subclass_of_the_class_of_an_accelerated_pipeline_stays_one():
    pipe = stgfast.accelerate(LTX.pipe(), RESIDUAL)
    pipe.__class__ = type("Reading", (type(pipe),), {})
    expected, copied = LTX.run(pipe), copy.copy(pipe)
    assert type(copied) is type(pipe)
    assert torch.equal(LTX.run(copied), expected)


class Mine(diffusers.LTXPipeline):
    pass


class Other(diffusers.LTXPipeline):
    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt=prompt, **kwargs)


def test_a_subclass_is_what_it_inherits_from():
    pipe = LTX.pipe()
    pipe.__class__ = Mine
    LTX.check(LTX.run(stgfast.accelerate(pipe, RESIDUAL)), RESIDUAL)
    assert type(stgfast.restore(pipe)) is Mine
    pipe.__class__ = Other
    with pytest.raises(UnsupportedPipelineError, match="got Other, a LTXPipeline with a __call__ of its own"):
        stgfast.accelerate(pipe, RESIDUAL)
    with pytest.raises(
        UnsupportedPipelineError, match=r"arguments of Other.__call__: got self, prompt, kwargs, expected"
    ):
        stgfast.accelerate(pipe, RESIDUAL, adapter=ADAPTERS["LTXPipeline"])


def test_wrapped_models_are_refused():
    pipe = WAN.pipe()
    pipe.transformer = torch.nn.DataParallel(pipe.transformer)
    with pytest.raises(SettingsError, match=r"pipe\.transformer: got DataParallel, expected a model with blocks"):
        stgfast.accelerate(pipe, RESIDUAL)


# Replacements of a model's forward


def replaced(module, home, **state):
    """A forward as another library replaces it."""
    code = compile("def forward(*args, **kwargs): return original(*args, **kwargs)", home, "exec")
    space = {"__name__": home, "original": module.forward, **state}
    exec(code, space)
    return space["forward"]


@pytest.mark.parametrize("of", ["model", "block", "class"])
def test_a_forward_of_another_library_is_refused_before_and_after(of, monkeypatch):
    pipe = LTX.build()
    stgfast.accelerate(pipe, RESIDUAL)
    where = pipe.transformer if of != "block" else pipe.transformer.transformer_blocks[1]
    if of == "class":
        forward = functools.partial(replaced(where, "teacache.patch"))
        monkeypatch.setattr(type(where), "forward", forward)
    else:
        where.forward = functools.update_wrapper(
            functools.partial(replaced(where, "cache_dit.caching")), type(where).forward
        )
    said = r"forward of LTXVideoTransformer\w+ in pipe\.transformer: got one from (teacache\.patch|cache_dit\.caching)"
    with pytest.raises(SettingsError, match=said):
        LTX.run(pipe)
    stgfast.restore(pipe)
    with pytest.raises(SettingsError, match=said):
        stgfast.accelerate(pipe, RESIDUAL)


# Projections and adapters


@pytest.mark.parametrize("family", [WAN, FLUX, COGVIDEOX], ids=lambda family: family.name)
def test_a_lora_on_fused_projections(family):
    def build(other=False):
        pipe = family.build(other=other)
        pipe.transformer.fuse_qkv_projections()
        torch.manual_seed(3)
        names = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
        return pipe

    fused = replace(family, build=build)
    cfg = family.cfg is not None
    fused.check(fused.run(stgfast.accelerate(fused.build(), ATTENTION), cfg=cfg), ATTENTION, cfg=cfg)


def with_flux_adapter():
    pipe = FLUX.build()
    torch.manual_seed(5)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))
        models.spread(block.attn.processor)
    projection = ImageProjection(image_embed_dim=12, cross_attention_dim=16, num_image_text_embeds=4)
    models.spread(projection)
    pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return pipe


def embeds(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kind", ["residual", "blur"])
def test_an_ip_adapter_of_flux(layer, kind):
    guidance = Guidance(Perturbation([layer], kind=kind))
    given = {
        "ip_adapter_image_embeds": [embeds(1, 2, 1, 12)],
        "negative_ip_adapter_image_embeds": [embeds(2, 2, 1, 12)],
    }
    if kind == "blur":
        given |= FLUX.facts.oblong
    family = replace(FLUX, build=lambda other=False: with_flux_adapter())
    made = [family.run(stgfast.accelerate(family.pipe(), guidance, max_rows=n), 2, **given) for n in (1, None, "all")]
    expected = family.plain(guidance, 2, **given)
    for clip in made:
        same(clip, expected)
    given |= {"ip_adapter_image_embeds": [embeds(3, 2, 1, 12)]}
    assert distance(family.run(stgfast.accelerate(family.pipe(), guidance), 2, **given), expected) > 1e-4
    if kind == "residual" and layer == 0:
        with pytest.raises(SettingsError, match="layer 0, whose attention has an IP-Adapter: got 'attention'"):
            stgfast.accelerate(family.pipe(), Guidance(Perturbation([0], kind="attention")))


@pytest.mark.parametrize("cfg", [True, False])
def test_an_ip_adapter_of_stable_diffusion_3(cfg):
    def build(other=False):
        pipe = SD3.build()
        model = pipe.transformer
        torch.manual_seed(5)
        for block in model.transformer_blocks:
            block.attn.processor = SD3IPAdapterJointAttnProcessor2_0(32, 32, 8, 32, 1.0)
            models.spread(block.attn.processor)
        model.image_proj = IPAdapterTimeImageProjection(12, 32, 32, 1, 8, 4, 4, timestep_in_dim=320)
        models.spread(model.image_proj)
        model.eval()
        return pipe

    family = replace(SD3, build=build)
    given = {"ip_adapter_image_embeds": embeds(3, 2 if cfg else 1, 5, 12)}
    made = [family.run(stgfast.accelerate(build(), RESIDUAL, max_rows=n), 2, cfg, **given) for n in (1, None, "all")]
    expected = family.plain(RESIDUAL, 2, cfg, **given)
    for clip in made:
        same(clip, expected)


# Schedules


def test_schedules_are_any_numbers_in_a_row():
    listed = Perturbation([2], scale=[0.0, 0.5, 1.0])
    for row in (
        np.linspace(0, 1, 3),
        np.linspace(0, 1, 3, dtype=np.float32),
        torch.linspace(0, 1, 3),
        (number / 2 for number in range(3)),
        types.MappingProxyType({0.0: 1, 0.5: 1, 1.0: 1}).keys(),
    ):
        assert Perturbation([2], scale=row) == listed
    assert Perturbation([2], scale=np.float32(1.5)).scale == torch.tensor(1.5) == 1.5
    for wrong in (np.zeros((2, 2)), torch.zeros(2, 2), np.array([]), {0: 1.0}):
        with pytest.raises(SettingsError, match="scale: got"):
            Perturbation([2], scale=wrong)


def test_sigmas_of_mochi_are_shares_of_noise():
    """Its released scheduler has fractions of data."""
    pipe = MOCHI.pipe()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    schedule = BySigma([(0.9, 3.0), (0.5, 2.0), (0.0, 1.0)])
    stgfast.accelerate(pipe, Guidance(Perturbation([2], scale=schedule)))
    seen = []
    adapter = ADAPTERS["MochiPipeline"]

    def note(pipe, step, time, tensors):
        seen[:] = adapter.sigmas(pipe, 8)
        return {}

    MOCHI.run(pipe, num_inference_steps=8, callback_on_step_end=note)
    assert seen[0] == 1.0
    assert seen == sorted(seen, reverse=True)
    explained = stgfast.explain(pipe, **MOCHI.arguments(1) | {"num_inference_steps": 8})
    assert explained.phases[0].weights["perturbed0"] == -3.0


def test_denoising_ends_early():
    schedule = {"num_inference_steps": 5, "denoising_end": 0.6}
    listed = Guidance(Perturbation([3], kind="attention", scale=[1.0, 2.0, 3.0]))
    pipe = stgfast.accelerate(SDXL.pipe(), listed)
    explained = stgfast.explain(pipe, **SDXL.arguments(1) | schedule)
    assert sum(phase.steps for phase in explained.phases) == 3
    made = SDXL.run(pipe, **schedule)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    levels = [(sigma, scale) for sigma, scale in zip(sigmas, (1.0, 2.0, 3.0), strict=False)]
    by_sigma = Guidance(Perturbation([3], kind="attention", scale=BySigma(levels)))
    assert torch.equal(SDXL.run(stgfast.accelerate(SDXL.pipe(), by_sigma), **schedule), made)


def test_sigmas_of_a_part_of_a_run():
    """`strength` skips the first steps and their sigmas."""
    family = next(family for family in wan.FAMILIES if family.name == "Wan from a video")
    listed = Guidance(Perturbation([2], scale=[1.0, 2.0]))
    pipe = stgfast.accelerate(family.pipe(), listed)
    expected = family.run(pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[2:4]]  # of four steps, the last two
    by_sigma = Guidance(Perturbation([2], scale=BySigma(list(zip(sigmas, (1.0, 2.0), strict=True)))))
    assert torch.equal(family.run(stgfast.accelerate(family.pipe(), by_sigma)), expected)


def test_a_window_without_a_step_is_said():
    pipe = stgfast.accelerate(SD3.pipe(), Guidance(Perturbation([2]), start=0.01, stop=0.2))
    with pytest.raises(
        SettingsError, match=r"start and stop: got \(0.01, 0.2\), expected a part of the run with at least"
    ):
        SD3.run(pipe, num_inference_steps=5)


def test_too_many_perturbations_are_said():
    with pytest.raises(SettingsError, match="perturbations: got '6 of them', expected at most 5"):
        Guidance([Perturbation([n]) for n in range(6)])
    guidance = Guidance(
        [Perturbation([n], scale=0.3) for n in range(4)] + [Perturbation([1], of="uncond", base="guided")]
    )
    WAN.check(WAN.run(stgfast.accelerate(WAN.pipe(), guidance)), guidance)


def test_a_default_that_needs_cfg_says_what_does_not():
    with pytest.raises(SettingsError, match=r"without CFG, Guidance\(Perturbation\(\[...\]\)\) perturbs cond"):
        WAN.run(stgfast.accelerate(WAN.pipe(), Guidance(Perturbation([2], of="uncond", base="guided"))), cfg=False)
