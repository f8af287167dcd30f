"""Guiders with perturbed passes: their own passes are shared, and correct where those of diffusers are not."""

import functools
import inspect
import math
import sys

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.guiders import SmoothedEnergyGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig, _gaussian_blur_2d

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from stgfast.proof.plain import blurred
from tests.integrations.families.hunyuan_video15 import FACTS, FAMILIES, arguments, build
from tests.oracle import perturbing
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

HUNYUAN = FAMILIES[0]
OBLONG = FACTS.oblong
DEPTH = 5
RANGE = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
PAG_RANGE = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}


def skipping(layers=(3,), **settings):
    config = LayerSkipConfig(list(layers), fqn="transformer_blocks")
    return SkipLayerGuidance(**{"guidance_scale": 4.0, "skip_layer_config": config, **RANGE, **settings})


def pag(layers=(3,), **settings):
    given = {"guidance_scale": 4.0, "perturbed_guidance_layers": list(layers), **PAG_RANGE, **settings}
    return PerturbedAttentionGuidance(**given)


def smoothing(layers=(3,), **settings):
    return SmoothedEnergyGuidance(**{"guidance_scale": 4.0, "seg_guidance_layers": list(layers), **settings})


def with_guider(guider):
    pipe = HUNYUAN.pipe()
    pipe.register_modules(guider=guider)
    return pipe


def clip(guider, accelerate=False, steps=3, **settings):
    # Guiders of diffusers leave hooks on the model.
    pipe = stgfast.accelerate(with_guider(guider)) if accelerate else build(guider=guider)
    with torch.no_grad():
        return pipe(**{**arguments(1), **OBLONG, "num_inference_steps": steps}, **settings).frames


@functools.cache
def with_cfg():
    return clip(ClassifierFreeGuidance(guidance_scale=4.0))


def passes_written_out(guider, kind, sigma=None, steps=3):
    """The formula of the guider, on separate passes; the perturbed one has the arguments of the conditional one."""
    pipe = build(guider=guider)
    forward, called = pipe.transformer.forward, []

    def record(**kwargs):
        called.append(kwargs)
        return forward(**kwargs)

    def guided(data):
        names = [batch.__guidance_identifier__ for batch in data]
        preds = dict(zip(names, (batch.noise_pred for batch in data), strict=True))
        for name in preds.keys() & {"pred_cond_skip", "pred_cond_seg"}:
            with perturbing(FACTS, pipe.transformer, [3], kind, sigma=sigma):
                preds[name] = forward(**called[0])[0]
        called.clear()
        return guider.forward(**preds)

    guider.prepare_models = lambda denoiser: setattr(guider, "_count_prepared", guider._count_prepared + 1)
    guider.cleanup_models = lambda denoiser: None
    pipe.transformer.forward = record
    pipe.guider.__class__ = type(type(guider).__name__, (type(guider),), {"__call__": lambda self, data: guided(data)})
    with torch.no_grad():
        return pipe(**{**arguments(1), **OBLONG, "num_inference_steps": steps}).frames


CASES = {
    "skipped layers": (skipping, {}, "residual"),
    "skipped layers, rescaled": (skipping, {"guidance_rescale": 0.6}, "residual"),
    "skipped layers, original formulation": (skipping, {"use_original_formulation": True}, "residual"),
    "skipped layers without CFG": (skipping, {"guidance_scale": 1.0}, "residual"),
    "skipped layers in part of the steps": (skipping, {"skip_layer_guidance_stop": 0.9}, "residual"),
    "perturbed attention": (pag, {}, "attention"),
    "perturbed attention, rescaled, without CFG": (
        pag,
        {"guidance_scale": 1.0, "guidance_rescale": 0.6},
        "attention",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shared_passes_are_the_guiders_own(case):
    made_by, settings, kind = case
    expected = passes_written_out(made_by(**settings), kind)
    same(clip(made_by(**settings), accelerate=True), expected)
    assert distance(expected, with_cfg()) > 1e-3


SMOOTHED = {
    "the mean": ({}, math.inf),
    "a Gaussian, rescaled, original formulation": (
        {"seg_blur_sigma": 0.8, "guidance_rescale": 0.6, "use_original_formulation": True},
        0.8,
    ),
    "a threshold of its own": ({"seg_blur_sigma": 2.0, "seg_blur_threshold_inf": 1.5}, math.inf),
    "without CFG, in part of the steps": (
        {"seg_blur_sigma": 0.8, "guidance_scale": 1.0, "seg_guidance_stop": 0.9},
        0.8,
    ),
}


@pytest.mark.parametrize("case", SMOOTHED.values(), ids=SMOOTHED)
def test_smoothed_passes_are_blurred_in_frames(case):
    settings, sigma = case
    expected = passes_written_out(smoothing(**settings), "blur", sigma)
    same(clip(smoothing(**settings), accelerate=True), expected)
    assert distance(expected, passes_written_out(smoothing(**settings), "blur", 0.1)) > 1e-3


def test_smoothing_of_diffusers():
    """The guider of diffusers never blurs a pass, and its blur has mean and Gaussian exchanged."""
    assert torch.equal(clip(smoothing()), with_cfg())
    queries = torch.randn(1, 9, 4)
    mean, gauss = (blurred(queries.unflatten(1, (3, 3)), sigma).flatten(1, 2) for sigma in (math.inf, 1e7))
    below, above = (_gaussian_blur_2d(queries.clone(), 61, sigma, 9999.0) for sigma in (1.0, 1e7))
    torch.testing.assert_close(below, mean)
    torch.testing.assert_close(above, gauss)


def test_where_diffusers_fails():
    """The skipped passes of diffusers do not support this model, and layers given as a list are refused."""
    with pytest.raises(ValueError, match="HunyuanVideo15TransformerBlock"):
        clip(skipping())
    given = {"guidance_scale": 4.0, "skip_layer_guidance_layers": [3], **RANGE}
    with pytest.raises(TypeError):
        clip(SkipLayerGuidance(**given))
    expected = clip(skipping(), accelerate=True)
    assert torch.equal(clip(SkipLayerGuidance(**given), accelerate=True), expected)


def test_no_history_runs_twice():
    pipe = stgfast.accelerate(with_guider(skipping(stop=1.0)))
    with HUNYUAN.counted(pipe) as rows, torch.no_grad():
        pipe(**{**arguments(1), "num_inference_steps": 4})
    # the first step is before the guider's range: it acts where start * steps < step
    assert rows == [2 * 4] * 4 + [2 + 3 * 3]
    explained = stgfast.explain(pipe, **{**arguments(1), "num_inference_steps": 4})
    assert [phase.rows for phase in explained.phases] == [(2,) * 5, (2, 2, 2, 2, 3)]


def test_the_guider_is_left_as_it_was():
    guider = skipping()
    before = set(vars(guider))
    pipe = stgfast.accelerate(with_guider(guider))
    with torch.no_grad():
        pipe(**arguments(1))
    assert set(vars(guider)) == before
    assert pipe.guider is guider
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.transformer_blocks)


def test_a_guidance_beside_a_guider_of_cfg():
    """What the guider does besides CFG, the engine does: rescale, or the original formulation."""
    guidance = Guidance(Perturbation([3]))
    plain = stgfast.accelerate(with_guider(ClassifierFreeGuidance(guidance_scale=4.0)), guidance)
    expected = HUNYUAN.run(plain, stg_rescale=0.6)
    for settings in ({"guidance_scale": 4.0}, {"guidance_scale": 3.0, "use_original_formulation": True}):
        guider = ClassifierFreeGuidance(guidance_rescale=0.6, **settings)
        same(HUNYUAN.run(stgfast.accelerate(with_guider(guider), guidance)), expected)


def test_reuse_beside_a_guider_of_weak_passes():
    """Its passes are extrapolated too, in the call of the denoiser that would compute them."""
    guidance, steps = Guidance(reuse=2, reuse_cfg=2), {"num_inference_steps": 9}
    pipe = stgfast.accelerate(with_guider(skipping()), guidance)
    explained = stgfast.explain(pipe, **{**arguments(1), **steps})
    with HUNYUAN.counted(pipe) as rows, torch.no_grad():
        pipe(**{**arguments(1), **steps})
    assert sum(rows) == explained.block_rows
    exact = stgfast.accelerate(with_guider(skipping()))
    assert explained.block_rows < 0.8 * stgfast.explain(exact, **{**arguments(1), **steps}).block_rows


WRONG = {
    "layers": (skipping((7,)), None, r"layers of SkipLayerGuidance: got \[7\], expected numbers from 0 to 4"),
    "stack": (
        SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1], fqn="blocks"), **RANGE),
        None,
        "fqn of SkipLayerGuidance: got 'blocks', expected one of transformer_blocks",
    ),
    "other queries": (
        SmoothedEnergyGuidance(seg_guidance_config=SmoothedEnergyGuidanceConfig([1], "auto", ["to_k"])),
        None,
        r"queries of SmoothedEnergyGuidance: got \['to_k'\], expected None or \['to_q'\]",
    ),
    "layers of a blur": (
        smoothing((5,)),
        None,
        r"layers of SmoothedEnergyGuidance: got \[5\], expected numbers from 0",
    ),
    "half a block": (
        SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1], skip_ff=False), **RANGE),
        None,
        "expected all its layers to skip the whole block",
    ),
    "both": (skipping(), Guidance(Perturbation([1])), "expected one of the two"),
    "another": (
        diffusers.AdaptiveProjectedGuidance(),
        Guidance(Perturbation([1])),
        "guider: got AdaptiveProjectedGuidance, expected ClassifierFreeGuidance, or SkipLayerGuidance",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_guiders_say_so(name):
    guider, guidance, message = WRONG[name]
    pipe = stgfast.accelerate(with_guider(guider), guidance)
    with pytest.raises(SettingsError, match=message):
        HUNYUAN.run(pipe)


NEEDS_KORNIA = "FrequencyDecoupledGuidance"  # only its name is used


def test_every_guider_of_diffusers_is_shared_or_refused_by_name():
    """No guider runs unshared, or with another formula, without an error."""
    known = {"ClassifierFreeGuidance", "SkipLayerGuidance", "PerturbedAttentionGuidance", "SmoothedEnergyGuidance"}
    modules = [sys.modules[name] for name in sys.modules if name.startswith("diffusers.guiders.")]
    base = diffusers.guiders.guider_utils.BaseGuidance
    found = {
        cls for module in modules for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, base)
    } - {base}
    assert known < {cls.__name__ for cls in found}
    for cls in found:
        if cls.__name__ in known:
            continue
        needs = {"guidance_scales": [4.0, 2.0], "auto_guidance_layers": [1], "dropout": 0.1}
        given = {name: value for name, value in needs.items() if name in inspect.signature(cls).parameters}
        guider = object.__new__(cls) if cls.__name__ == NEEDS_KORNIA else cls(**given)
        pipe = stgfast.accelerate(with_guider(guider), Guidance(Perturbation([1])))
        with pytest.raises(SettingsError, match=f"guider: got {cls.__name__}, expected ClassifierFreeGuidance"):
            pipe(**arguments(1))


def test_a_guider_that_the_next_call_begins_anew():
    """If clips are decoded while the next one starts, the next call takes the guider before the first one ends."""
    guidance, done = Guidance(Perturbation([1])), []
    pipe = stgfast.accelerate(with_guider(ClassifierFreeGuidance(guidance_scale=4.0)), guidance)
    expected = pipe(**arguments(1)).frames
    step = pipe.scheduler.step

    def stepped(*args, **kwargs):
        done.append(True)
        if len(done) == 2:
            pipe.guider._num_inference_steps = None
        return step(*args, **kwargs)

    pipe.scheduler.step = stepped
    assert torch.equal(pipe(**arguments(1)).frames, expected)
    assert len(done) == 2
