"""Arguments of a call, and one clear sentence for wrong ones, before anything runs."""

import functools
import math
import re

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError, UnsupportedPipelineError
from stgfast.integrations import ADAPTERS
from tests import models
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

GUIDANCE = Guidance(Perturbation([2], scale=1.0))


def clip(pipe, family="mochi", **changes):
    call = {**models.sizes(family, num_inference_steps=2), **changes}
    return pipe(**models.prompt(family, 2), **call, generator=models.generators(2)).frames


def guided(family="mochi", guidance=GUIDANCE, pipe=None, **options):
    return stgfast.accelerate(pipe or models.shared(models.pipeline, family), guidance, **options)


@functools.cache
def usual():
    """The clip of Mochi with its usual guidance."""
    return clip(guided())


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ({"stg_scale": 2.0}, Guidance(Perturbation([2], scale=2.0))),
        ({"stg_layers": [1, 4]}, Guidance(Perturbation([1, 4]))),
        ({"stg_mode": "attention"}, Guidance(Perturbation([2], kind="attention"))),
        ({"stg_rescale": 0.4}, Guidance(Perturbation([2]), rescale=0.4)),
        ({"stg_scale": [0, 2]}, Guidance(Perturbation([2], scale=[0, 2]))),
        ({"stg": Guidance(Perturbation([5]))}, Guidance(Perturbation([5]))),
        ({"stg_scale": 0, "stg_rescale": 0.4}, Guidance(rescale=0.4)),
        # The argument names of the authors' code.
        ({"stg_applied_layers_idx": [3], "stg_scale": 1.5}, Guidance(Perturbation([3], scale=1.5))),
        ({"do_rescaling": True}, Guidance(Perturbation([2]), rescale=0.7)),
        ({"stg_scale": 0.0, "do_rescaling": True}, Guidance(rescale=0.7)),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)
def test_settings_of_one_call(settings, alike):
    pipe = guided()
    assert torch.equal(clip(pipe, **settings), clip(guided(guidance=alike)))
    assert torch.equal(clip(pipe), usual()), "a call's settings are for that call alone"


def test_do_rescaling_false_switches_rescaling_off():
    pipe = guided(guidance=Guidance(Perturbation([2]), rescale=0.7))
    assert torch.equal(clip(pipe, do_rescaling=False), usual())


def test_the_papers_arguments_give_the_papers_result_for_wan():
    """With the default guidance only: the authors' code perturbs the unconditional branch and extrapolates from CFG."""
    pipe = stgfast.accelerate(models.pipeline("wan"))
    explicit = guided("wan", Guidance(Perturbation([2], scale=1.0, of="uncond", base="guided")))
    assert torch.equal(clip(pipe, "wan", stg_applied_layers_idx=[2], stg_scale=1.0), clip(explicit, "wan"))


def test_the_pipelines_own_rescale_is_about_guided_predictions():
    pipe = guided("ltx")
    expected = clip(guided("ltx", Guidance(Perturbation([2]), rescale=0.3)), "ltx")
    same(clip(pipe, "ltx", guidance_rescale=0.3), expected)
    inside = clip(pipe, "ltx", guidance_rescale=0.3, stg=Guidance(Perturbation([2]), rescale=0.9))
    same(inside, expected)
    both = clip(pipe, "ltx", guidance_rescale=0.3, stg_rescale=0.6)
    expected = clip(guided("ltx", Guidance(Perturbation([2]), rescale=0.6)), "ltx")
    same(both, expected)


def test_a_cfg_schedule_takes_the_place_of_the_pipelines_scale():
    scheduled = guided(guidance=Guidance(Perturbation([2]), cfg=[4.0] * 2))
    same(clip(scheduled, guidance_scale=9.0), clip(guided(), guidance_scale=4.0))


@pytest.mark.parametrize("family", ["mochi", "wan"])
def test_a_cfg_scale_of_1_does_not_compute_the_unconditional_branch(family):
    pipe = guided(family, Guidance(Perturbation([2]), cfg=1.0), models.pipeline(family))
    blocks = pipe.transformer.transformer_blocks if family == "mochi" else pipe.transformer.blocks
    rows = []
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    without = clip(pipe, family)
    assert rows == [2] * 2  # two prompts, one branch
    same(without, clip(guided(family), family, guidance_scale=1.0))


def test_a_callback_may_change_the_cfg_scale():
    def change(pipe, step, time, tensors):
        pipe._guidance_scale = 2.0
        return {}

    pipe = guided()
    expected = clip(guided(guidance=Guidance(Perturbation([2]), cfg=[4.5, 2])))
    same(clip(pipe, callback_on_step_end=change), expected)


def test_dynamic_cfg_of_cogvideox():
    """`use_dynamic_cfg` changes the scale after the call of the denoiser; the clip follows those scales."""
    from stgfast.integrations import ADAPTERS

    pipe, scales = guided(pipe=models.pipeline("cogvideox")), []
    call = {"guidance_scale": 6.0, "use_dynamic_cfg": True}
    announced = []

    def note(pipe, step, time, tensors):
        scales.append(pipe.guidance_scale)
        return {}

    adapter = ADAPTERS["CogVideoXPipeline"]
    pipe.transformer.register_forward_pre_hook(
        lambda module, args: announced.append(adapter.live(pipe, call, "transformer"))
    )
    dynamic = clip(pipe, "cogvideox", use_dynamic_cfg=True, callback_on_step_end=note)
    assert announced == scales
    assert len(set(scales)) > 1
    expected = clip(guided("cogvideox", Guidance(Perturbation([2]), cfg=scales)), "cogvideox")
    same(dynamic, expected)


@pytest.mark.parametrize("family", ["mochi", "wan"])
def test_a_denoiser_output_that_is_no_tuple(family):
    """Pipelines request tuples; a denoiser may be wrapped by one that does not return them."""
    expected = clip(guided(family), family)
    pipe = guided(pipe=models.pipeline(family))

    class Other(type(pipe.transformer)):
        def forward(self, **kwargs):
            assert not kwargs.pop("return_dict")
            return super().forward(**kwargs, return_dict=True)

    pipe.transformer.__class__ = Other
    assert torch.equal(clip(pipe, family), expected)


class Unknown:
    pass


class CogVideoXPipe:
    pass


def without_denoiser():
    pipe = models.pipeline("mochi")
    pipe.transformer = None
    return pipe


ACCELERATE = {
    "an unknown pipeline": (lambda: stgfast.accelerate(Unknown()), "pipeline: got Unknown, expected one of the "),
    "no way to compile": (
        lambda: stgfast.accelerate(models.pipeline("mochi"), compile="max-autotune"),
        "compile: got 'max-autotune', expected True, False, or arguments of torch.compile",
    ),
    "an unknown relative": (
        lambda: stgfast.accelerate(CogVideoXPipe()),
        "(the closest are CogVideoXPipeline, ",
    ),
    "what an adapter takes": (
        lambda: stgfast.accelerate(Unknown()),
        "in accelerate(pipe, adapter=stgfast.Adapter(...)) with at least pipeline, protocol, blocks, defaults",
    ),
    "an adapter of another": (
        lambda: stgfast.accelerate(models.pipeline("mochi"), adapter=ADAPTERS["WanPipeline"]),
        "adapter: got 'WanPipeline', expected one for MochiPipeline",
    ),
    "no denoiser": (
        lambda: stgfast.accelerate(without_denoiser()),
        "pipe.transformer: got None, expected the model whose steps are to be guided",
    ),
    "a layer out of range": (
        lambda: guided(guidance=Guidance(Perturbation([2, 6]))),
        "layers, MochiPipeline: got [6], expected numbers from 0 to 5",
    ),
    "default layers out of range": (
        lambda: stgfast.accelerate(models.pipeline("mochi")),
        "the default layers of this model, MochiPipeline: got [34], expected numbers from 0 to 5; choose some with "
        "stgfast.Guidance(stgfast.Perturbation([...]))",
    ),
    "max_rows of 0": (lambda: guided(max_rows=0), "max_rows: got 0, expected a number of rows, 1 or more"),
    "max_rows below 0": (lambda: guided(max_rows=-3), "max_rows: got -3, expected a number of rows, 1 or more"),
    "a fraction of a row": (lambda: guided(max_rows=1.5), "max_rows: got 1.5"),
    "guidance of another kind": (lambda: guided(guidance={"scale": 1}), "guidance: got {'scale': 1}, expected a stgf"),
    "explain before accelerate": (
        lambda: stgfast.explain(models.pipeline("mochi")),
        "MochiPipeline is not accelerated: call stgfast.accelerate(pipe) first",
    ),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_wrong_input_to_accelerate(name):
    make, message = ACCELERATE[name]
    with pytest.raises((SettingsError, UnsupportedPipelineError), match=re.escape(message)):
        make()


TWO = Guidance([Perturbation([2]), Perturbation([3])])
UNCOND = Guidance(Perturbation([2], of="uncond"))
CALLS = {
    "a layer out of range": ({"stg_layers": [99]}, "layers, MochiPipeline: got [99], expected numbers from 0 to 5"),
    "empty layers": ({"stg_layers": []}, "layers: got [], expected layer numbers such as [8]"),
    "empty layers at scale 0": ({"stg_layers": [], "stg_scale": 0}, "layers: got []"),
    "an unknown mode": ({"stg_mode": "STG"}, "kind of perturbation: got 'STG', expected 'attention' (STG-A), "),
    "NaN": ({"stg_scale": math.nan}, "scale: got nan, expected a finite number"),
    "infinity": ({"stg_scale": math.inf}, "scale: got inf, expected a finite number"),
    "a short schedule": (
        {"stg_scale": [1, 2, 3], "num_inference_steps": 4},
        "scale of perturbed0: got 3 numbers, expected 4, one for every step",
    ),
    "a long schedule": ({"stg_rescale": [0.5] * 5}, "rescale: got 5 numbers, expected 2, one for every step"),
    "a schedule that breaks later": (
        {"stg_scale": lambda p: math.inf if p > 0.4 else 1.0},
        "scale of perturbed0 at progress 0.5: got inf",
    ),
    "two names for layers": ({"stg_layers": [1], "stg_applied_layers_idx": [2]}, "expected only one of them: both set"),
    "two names for rescale": (
        {"stg_rescale": 0.7, "do_rescaling": True},
        "expected only one of them: both set the same",
    ),
    "guidance and settings": (
        {"stg": GUIDANCE, "stg_scale": 1},
        "settings beside stg: got ['stg_scale'], expected none",
    ),
    "no Guidance": ({"stg": 2.0}, "stg: got 2.0, expected a stgfast.Guidance"),
    "a branch that needs CFG": (
        {"stg": UNCOND, "guidance_scale": 1.0},
        "a perturbation of uncond against uncond: got a call without CFG, expected guidance_scale above 1",
    ),
    "a CFG schedule without CFG": (
        {"stg": Guidance(cfg=3.0), "guidance_scale": 1.0},
        "a cfg schedule: got a call without CFG",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_input_to_a_call(name):
    settings, message = CALLS[name]
    pipe = guided()
    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(SettingsError, match=re.escape(message)):
        clip(pipe, **settings)
    assert not ran
    hook.remove()
    assert torch.equal(clip(pipe), usual())


def test_one_scale_for_two_perturbations():
    pipe = guided(guidance=TWO)
    with pytest.raises(SettingsError, match="scale of one perturbation: got 2 perturbations"):
        clip(pipe, stg_scale=2.0)
    assert torch.equal(clip(pipe, stg_scale=0), clip(models.pipeline("mochi")))


def test_hunyuan_says_how_to_switch_cfg_on():
    with pytest.raises(SettingsError, match="expected true_cfg_scale above 1 and a negative_prompt"):
        clip(guided("hunyuan", UNCOND), "hunyuan")


def test_a_typo_is_not_swallowed():
    with pytest.raises(TypeError, match="stg_scal"):
        clip(guided(), stg_scal=1.0)


def test_cfg_switched_off_under_a_branch_that_needs_it():
    def cut(pipe, step, time, tensors):
        pipe._guidance_scale = 1.0
        return {name: tensor[-2:] for name, tensor in tensors.items() if name == "prompt_embeds"}

    with pytest.raises(SettingsError, match="CFG was switched off at step 1, but the guidance needs it"):
        clip(
            guided("ltx", UNCOND),
            "ltx",
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
